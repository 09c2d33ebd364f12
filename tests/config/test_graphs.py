"""Which batches run as CUDA graphs."""

from __future__ import annotations

import pytest
from rows import named

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.graphs import check_graphs, graph_sizes


def test_graphs_reach_from_one_step_to_what_a_batch_can_have():
    for flags, max_seqs, expected in (
        ({}, 1024, tuple(range(16, 129, 16))),
        ({}, 128, tuple(range(16, 129, 16))),
        ({}, 33, (16, 32, 48)),
        ({}, 1, (16,)),
        ({"cudagraph_max_size": 6, "cudagraph_step": 2}, 1024, (2, 4, 6)),
        ({"cudagraph_max_size": 6, "cudagraph_step": 6}, 2, (6,)),
        ({"use_cudagraphs": False}, 1024, ()),
    ):
        config = EngineConfig.from_flags(**flags)
        with named((flags, max_seqs)):
            assert graph_sizes(config, "cuda", max_seqs) == expected
            assert graph_sizes(config, "cpu", max_seqs) == ()


def problems_of(device, **flags):
    problems: list[str] = []
    check_graphs(EngineConfig.from_flags(**flags), device, problems)
    return problems


def test_sizes_that_are_no_multiple_of_the_step_are_refused_with_the_remedy():
    assert problems_of("cuda", cudagraph_max_size=100) == [
        "cudagraph_max_size=100 is not a multiple of cudagraph_step=16; set it to 112"
    ]
    assert problems_of("cpu", cudagraph_max_size=8) == [
        "cudagraph_max_size=8 is not a multiple of cudagraph_step=16; set it to 16, or"
        " cudagraph_step to 8"
    ]
    assert problems_of("cuda", cudagraph_max_size=8, use_cudagraphs=False) == []
    assert problems_of("cuda") == []


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_torch_does_not_make_graphs_inside_of_graphs(mode):
    flags = {"torch_compile": True, "torch_compile_config": {"mode": mode}}
    (line,) = problems_of("cuda", **flags)
    assert line.startswith(f"torch_compile_config.mode={mode} makes CUDA graphs of its own")
    assert problems_of("cpu", **flags) == []
    assert problems_of("cuda", **flags, use_cudagraphs=False) == []
    assert problems_of("cuda", torch_compile=True) == []
