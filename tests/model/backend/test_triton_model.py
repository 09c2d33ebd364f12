"""Whole models with the Triton backend, interpreted: the oracle is transformers in fp32."""

from __future__ import annotations

import pytest
from attention_checks import check_greedy_tokens, check_same_samples, count_groups

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted

pytestmark = pytest.mark.triton

HEADER = "Every dinosaur in this park has a name, a favourite food and a friend. "
PROMPTS = [HEADER + text for text in ("Once upon a time,", "A B C D A B C", "2 + 3 =")]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    monkeypatch.setattr(planning, "SHORTEST_TASK", 64)


def test_greedy_tokens_are_those_of_transformers(checkpoint):
    check_greedy_tokens(checkpoint, "triton")


def samples(attention, **flags):
    """Of prompts that begin together, when their header's pages are cached."""
    params = SamplingParams(n=4, temperature=0.8, max_tokens=5, seed=3, logprobs=0)
    # The warm-up runs the largest batches, which takes the interpreter long.
    sizes = {"max_tokens_per_forward": 64, "max_seqs_per_forward": 12, "kv_cache_num_tokens": 2048}
    with LLM(attention=attention, device="cpu", page_size=4, **sizes, **flags) as llm:
        llm.generate(HEADER, SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [sample for output in outputs for sample in output.outputs]


@pytest.mark.engine
def test_an_engine_with_shared_prefixes_draws_the_tokens_of_the_reference(monkeypatch):
    grouped = count_groups(monkeypatch, TritonBackend)
    expected = samples("reference", use_hydragen=False)
    found = samples(
        "triton", use_hydragen=True, hydragen_min_group_size=2, hydragen_min_prefix_len=8
    )
    check_same_samples(found, expected, grouped)
