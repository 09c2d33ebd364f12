"""Graphs of decodes with Triton's kernels, interpreted: fixed grids, rows without a sequence."""

from __future__ import annotations

import pytest
import torch
from attention_checks import check_graph_leaves_groups, check_graph_plan, decode_in_graphs
from graph_stand_ins import launch_recorded
from oracle import assert_greedy

from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    monkeypatch.setattr(planning, "SHORTEST_TASK", 64)


def test_a_plan_of_a_graph_attends_as_the_plan_of_each_batch_does():
    for num_heads, num_kv_heads in ((4, 1), (2, 2)):
        check_graph_plan(TritonBackend, num_heads, num_kv_heads, torch.float32, is_made_once=False)


def test_a_batch_with_a_group_is_not_planned_for_a_graph():
    check_graph_leaves_groups(TritonBackend, torch.float32)


def test_recorded_kernels_give_the_tokens_of_transformers(checkpoint, monkeypatch):
    """Of sequences that decode together in changing numbers, as graphs of two sizes."""
    from triton.runtime import interpreter

    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", launch_recorded(interpreter.GridExecutor.__call__)
    )
    path = checkpoint("qwen3", num_heads=4, num_kv_heads=2, head_dim=64)
    for each in decode_in_graphs(path, attention="triton"):
        assert_greedy(path, *each)
