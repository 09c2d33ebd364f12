"""The installed FlashInfer, as far as it runs without a device: its signatures, and its wrappers.

Its wrappers are Python around compiled kernels. Here they run as they are, on tensors of the CPU.
Only what they load as kernels is replaced, by the arithmetic of the stand-in.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import flashinfer_stand_in as stand_in
import pytest
import torch
from attention_batches import CPU, make_cache
from attention_checks import (
    check_graph_leaves_groups,
    check_graph_plan,
    check_nested_groups,
    check_prompts_and_decodes,
    decode_in_graphs,
)
from graph_stand_ins import RepeatingGraphs
from rows import named

from tokasaurus.model import backend as backends
from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.model.backend.flashinfer import backend as backend_module
from tokasaurus.model.backend.flashinfer.backend import FlashInferBackend
from tokasaurus.model.backend.flashinfer.probe import why_not_built
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.rounding import ceil_div

pytestmark = pytest.mark.triton

NON_CAUSAL, CAUSAL = 0, 1
HND = 1


class Kernels:
    """What FlashInfer's wrappers get when they load a module of prefill kernels."""

    def __init__(self):
        self.calls = []

    def build_and_load(self):
        return SimpleNamespace(plan=self.plan, paged_run=self.paged_run, ragged_run=None)

    def plan(self, *arguments):
        """The kernels' plan reads these on the host, as numbers of 4 bytes."""
        assert all(len(workspace) > 0 for workspace in arguments[:3])
        for tensor in arguments[3:6]:
            assert tensor.dtype == torch.int32
            assert tensor.device == CPU
            assert tensor.is_contiguous()
        query_starts, page_starts, lengths = (
            each.as_subclass(torch.Tensor) for each in arguments[3:6]
        )
        num_rows, num_requests, num_heads, num_kv_heads, page_size = arguments[6:11]
        assert num_rows == query_starts[-1]
        assert num_requests == len(query_starts) - 1 == len(page_starts) - 1 == len(lengths)
        assert torch.equal(ceil_div(lengths, page_size), page_starts.diff())
        self.calls.append((num_heads, num_kv_heads))
        # A device gets the plan in a copy.
        arguments[1].zero_()
        return [num_rows]

    def paged_run(self, *arguments):
        (_, _, plan, query, keys, values) = arguments[:6]
        query_starts, page_starts, pages, last_page_lengths, out, lse = arguments[6:12]
        mask_mode, layout, window = arguments[12:15]
        scale = arguments[25]
        assert layout == HND
        assert window == -1
        assert plan == [len(query)]
        assert query.dtype == out.dtype
        if keys.dtype == torch.float8_e4m3fn:
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        assert mask_mode in (NON_CAUSAL, CAUSAL)
        result, sums = stand_in.attend_paged(
            query,
            keys,
            values,
            query_starts,
            page_starts,
            pages,
            last_page_lengths,
            is_causal=mask_mode == CAUSAL,
            scale=scale,
        )
        out.copy_(result)
        if lse is not None:
            lse.copy_(sums)


def append(key, value, requests, positions, keys, values, pages, starts, lengths, layout):
    assert layout == HND
    arrays = requests, positions, (keys, values), pages, starts, lengths
    stand_in.append_paged_kv_cache(key, value, *arrays, kv_layout="HND")


@pytest.fixture
def kernels(monkeypatch):
    """Nothing is pinned without a device."""
    kernels = Kernels()
    modules = {
        name: importlib.import_module(f"flashinfer.{name}")
        for name in ("prefill", "decode", "page", "cascade")
    }
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    prefill = modules["prefill"].get_batch_prefill_module
    loaded = SimpleNamespace(generations=[])

    def load(generation, *sizes):
        loaded.generations.append(generation)
        # The cache of modules outlives a test.
        return inspect.unwrap(prefill)(generation, *sizes)

    monkeypatch.setattr(modules["prefill"], "gen_batch_prefill_module", lambda *_: kernels)
    for name in ("prefill", "decode"):
        monkeypatch.setattr(modules[name], "get_batch_prefill_module", load)
    page, cascade = (
        SimpleNamespace(append_paged_kv_cache=append),
        SimpleNamespace(merge_state_in_place=stand_in.merge_state_in_place),
    )
    monkeypatch.setattr(modules["page"], "get_page_module", lambda: page)
    monkeypatch.setattr(modules["cascade"], "get_cascade_module", lambda: cascade)
    kernels.loaded = loaded
    return kernels


def parameters(function):
    return inspect.signature(function).parameters


def test_the_stand_in_has_the_packages_signatures():
    """What is passed by position is in the same place. Defaults are the same."""
    package = importlib.import_module("flashinfer")
    assert package.__version__ == stand_in.__version__
    functions = [
        ("append_paged_kv_cache",),
        ("merge_state_in_place",),
        ("jit", "gen_batch_prefill_module"),
        *(
            (wrapper, method)
            for wrapper in (
                "BatchDecodeWithPagedKVCacheWrapper",
                "BatchPrefillWithPagedKVCacheWrapper",
            )
            for method in ("__init__", "plan", "run")
        ),
    ]
    for path in functions:
        ours, theirs = stand_in, package
        for name in path:
            ours, theirs = getattr(ours, name), getattr(theirs, name)
        theirs = parameters(theirs)
        places = list(theirs)
        with named(path):
            for place, (name, parameter) in enumerate(parameters(ours).items()):
                assert name in theirs
                assert parameter.default == theirs[name].default, name
                if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                    assert places[place] == name


def test_batches_match_dense_attention(kernels):
    shapes = (4, 2, 128, 16), (8, 1, 64, 7)
    for dtype, tolerance in ((torch.float16, 0.005), (torch.bfloat16, 0.04)):
        check_prompts_and_decodes(FlashInferBackend, shapes, dtype, tolerance)
    assert set(kernels.loaded.generations) == {"fa2"}
    assert set(kernels.calls) == {(4, 2), (8, 1)}


def test_groups_match_the_reference(kernels):
    checked = check_nested_groups(FlashInferBackend, [(4, 2, 64, 0)], 8, torch.float16, 0.005)
    assert sum(count for _, _, count in checked) > 100


def test_the_probe_passes(kernels):
    """FlashInfer appends to e4m3 here: Triton's interpreter does not round to it."""
    for kept_dtype in (None, torch.float8_e4m3fn):
        heads = ModelHeads(32, 8, 64, torch.float16, kept_dtype)
        with named(kept_dtype):
            assert why_not_built(FlashInferBackend, heads, CPU) is None


def test_a_plan_of_a_graph_attends_as_the_plan_of_each_batch_does(kernels):
    check_graph_plan(FlashInferBackend, 4, 2, torch.float16, is_made_once=True)


def test_graphs_share_room_and_each_has_tensors_of_its_own(kernels):
    cache = make_cache(80, 16, 1, 64, torch.float16)
    backend = FlashInferBackend(cache, 4)
    large, small = (backend._wrappers.of_graph(count, 40).wrapped for count in (8, 2))
    for name in ("_float_workspace_buffer", "_int_workspace_buffer"):
        assert getattr(large, name) is getattr(small, name)
    assert large._paged_kv_indices_buf.data_ptr() == small._paged_kv_indices_buf.data_ptr()
    assert large._paged_kv_indptr_buf.data_ptr() != small._paged_kv_indptr_buf.data_ptr()
    assert backend._wrappers.of_graph(16, 40).wrapped._int_workspace_buffer.numel() > (
        large._int_workspace_buffer.numel()
    )


def test_a_batch_with_a_group_is_not_planned_for_a_graph(kernels):
    check_graph_leaves_groups(FlashInferBackend, torch.float16)


def test_graphs_give_the_tokens_of_the_reference(kernels, checkpoint, monkeypatch):
    """Of sequences that decode together in changing numbers, as graphs of two sizes."""
    monkeypatch.setattr(backend_module, "_why_not", lambda: None)
    monkeypatch.setattr(backend_module, "_why_not_built", lambda _: None)
    monkeypatch.setitem(backends._BACKENDS, "cpu", (FlashInferBackend, ReferenceBackend))
    path = checkpoint("qwen3", num_heads=4, num_kv_heads=2, head_dim=64)
    found = decode_in_graphs(path, RepeatingGraphs, attention="flashinfer", dtype="float16")
    expected = decode_in_graphs(path, has_graphs=False, attention="reference", dtype="float16")
    assert [tokens for _, tokens, _ in found] == [tokens for _, tokens, _ in expected]
