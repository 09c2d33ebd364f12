"""FlashInfer's planner, in C++: our workspaces have room for whatever it plans, and not too much.

It runs on the host, so it runs here, as if for a device of 132 multiprocessors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flashinfer_planner import NoRoom, Planner
from rows import named

from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.model.backend.flashinfer.workspaces import (
    graph_bytes,
    graph_plan_bytes,
    workspace_bytes,
)

pytestmark = pytest.mark.triton

NUM_PROCESSORS = 132
PAGE_SIZE = 16
# Of the plan of a call that is in no graph: FlashInfer's own.
PLAN_BYTES = 8 << 20
SHAPES = (
    (32, 8, 64),
    (64, 8, 128),
    (9, 3, 64),
    (8, 8, 128),
    (16, 2, 256),
    (32, 32, 64),
    (12, 2, 128),
    (16, 1, 64),
)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return Planner(tmp_path_factory.mktemp("planner"), NUM_PROCESSORS)


def starts(counts):
    return np.append(0, np.cumsum(counts))


def calls(rng, count):
    """Rows and pages of the requests of a call: decodes, chunks, mixed ones, groups."""
    for number in range(count):
        most, pages = ((9000, 100), (8, 700), (300, 200), (64, 9000))[number % 4]
        size = int(rng.integers(1, most + 1))
        rows = (
            np.ones(size, np.int64),
            rng.integers(1, 3000, size),
            rng.choice([1, 1, 1, 50, 700], size),
            rng.integers(1, 200, size),
        )[number % 4]
        num_pages = rng.integers(1, pages, size)
        if number % 7 == 0:
            num_pages[:] = num_pages.max()
        if number % 11 == 0:
            num_pages[1:] = 1
        yield rows, num_pages


def count_refused(planner, heads, share):
    """Of many calls, those for which a share of the workspace is too small."""
    room = int(share * workspace_bytes(heads, NUM_PROCESSORS))
    sizes = heads.num_heads, heads.num_kv_heads, heads.head_dim
    num_refused = 0
    for rows, pages in calls(np.random.default_rng(0), 120):
        try:
            planner.plan(
                starts(rows),
                starts(pages),
                sizes,
                PAGE_SIZE,
                is_graph=False,
                num_bytes=room,
                num_plan_bytes=PLAN_BYTES,
            )
        except NoRoom:
            num_refused += 1
    return num_refused


def test_the_workspace_has_room_for_every_call(planner):
    for shape in SHAPES:
        with named(shape):
            heads = ModelHeads(*shape, torch.bfloat16)
            assert count_refused(planner, heads, 1.0) == 0
    assert count_refused(planner, ModelHeads(*SHAPES[0], torch.bfloat16), 0.5) > 0


def graph_plan(planner, heads, pages, num_bytes, num_plan_bytes):
    return planner.plan(
        np.arange(len(pages) + 1),
        starts(pages),
        (heads.num_heads, heads.num_kv_heads, heads.head_dim),
        PAGE_SIZE,
        is_graph=True,
        num_bytes=num_bytes,
        num_plan_bytes=num_plan_bytes,
    )


def test_all_plans_of_a_graph_launch_the_same_kernels(planner):
    """Also those of rows without a sequence, with which it is recorded."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        heads = ModelHeads(*shape, torch.bfloat16)
        for num_rows in (1, 2, 16, 17, 48, 128, 512):
            room = graph_bytes(heads, NUM_PROCESSORS, num_rows)
            plan_room = graph_plan_bytes(heads, NUM_PROCESSORS, num_rows)
            launched = set()
            for number in range(12):
                pages = rng.integers(0, (2, 50, 8000)[number % 3], num_rows)
                if number == 0:
                    pages[:] = 0
                if number % 5 == 1:
                    pages[num_rows // 2 :] = 0
                copied, launch = graph_plan(planner, heads, pages, room, plan_room)
                assert copied <= plan_room
                launched.add(launch)
            with named((shape, num_rows)):
                assert len(launched) == 1


def test_workspaces_of_graphs_that_are_smaller_are_too_small(planner):
    heads = ModelHeads(*SHAPES[0], torch.bfloat16)
    room = graph_bytes(heads, NUM_PROCESSORS, 128)
    plan_room = graph_plan_bytes(heads, NUM_PROCESSORS, 128)
    pages = np.full(128, 10)
    graph_plan(planner, heads, pages, room, plan_room)
    with pytest.raises(NoRoom, match="batch_prefill_tmp"):
        graph_plan(planner, heads, pages, room * 3 // 4, plan_room)
    with pytest.raises(NoRoom, match="batch_prefill"):
        graph_plan(planner, heads, pages, room, plan_room // 3)
