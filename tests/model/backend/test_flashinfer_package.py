"""The installed FlashInfer, as far as it runs without a device: its signatures, and its wrappers.

Its wrappers are Python around compiled kernels. Here they run as they are, on tensors of the CPU.
Only what they load as kernels is replaced, by the arithmetic of the stand-in.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import flashinfer_stand_in as stand_in
import numpy as np
import pytest
import torch
from attention_batches import CPU, DenseOracle, attend, make_cache, random_steps, random_world
from rows import named

from tokasaurus.model.backend.base import ModelHeads
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
        """The kernel's plan reads these on the host, as numbers of 4 bytes."""
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
        return [num_rows]

    def paged_run(self, *arguments):
        (_, _, plan, query, keys, values) = arguments[:6]
        query_starts, page_starts, pages, last_page_lengths, out, lse = arguments[6:12]
        mask_mode, layout, window = arguments[12:15]
        scale = arguments[25]
        assert layout == HND
        assert window == -1
        assert plan == [len(query)]
        assert query.dtype == keys.dtype == out.dtype
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
    for dtype, tolerance in ((torch.float16, 0.005), (torch.bfloat16, 0.04)):
        for num_heads, num_kv_heads, head_dim, page_size in ((4, 2, 128, 16), (8, 1, 64, 7)):
            torch.manual_seed(0)
            num_pages = 3 * ceil_div(200, page_size)
            cache = make_cache(num_pages, page_size, num_kv_heads, head_dim, dtype)
            backend, oracle = FlashInferBackend(cache, num_heads), DenseOracle()
            for rows in random_steps(np.random.default_rng(num_heads), 3, 4, page_size):
                total = num_heads + 2 * num_kv_heads
                heads = torch.randn(len(rows.positions), total, head_dim).to(dtype)
                parts = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
                expected = oracle.attend(rows, *parts)
                with named((dtype, num_heads)):
                    output = attend(backend, rows, *parts).double()
                    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    assert set(kernels.loaded.generations) == {"fa2"}
    assert set(kernels.calls) == {(4, 2), (8, 1)}


def test_groups_match_the_reference(kernels):
    num_grouped = 0
    for seed in range(8):
        page_size = (16, 20, 8)[seed % 3]
        plain, grouped, _ = random_world(np.random.default_rng(seed), page_size)
        torch.manual_seed(seed)
        cache = make_cache(plain.page_table.numel(), page_size, 2, 64, torch.float16)
        for tensor in cache.keys + cache.values:
            tensor.normal_()
        backend = FlashInferBackend(cache, 4)
        heads = torch.randn(len(plain.positions), 8, 64).half()
        parts = heads.split([4, 2, 2], dim=1)
        with named(seed):
            output = attend(backend, grouped, *parts)
            num_grouped += sum(backend.grouped_rows)
            expected = attend(ReferenceBackend(cache, 4), grouped, *parts)
            torch.testing.assert_close(output, expected, atol=0.005, rtol=0.005)
    assert num_grouped > 100


def test_the_probe_passes(kernels):
    heads = ModelHeads(32, 8, 64, torch.bfloat16)
    assert why_not_built(FlashInferBackend, heads, CPU) is None
