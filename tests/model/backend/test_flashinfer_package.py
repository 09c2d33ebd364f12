"""The installed FlashInfer, as far as it runs without a device: its signatures, and its wrappers.

Its wrappers are Python around compiled kernels. Here they run as they are, on tensors of the CPU.
Only what they load as kernels is replaced, by the arithmetic of the stand-in.
"""

from __future__ import annotations

import importlib
import inspect
import random
from types import SimpleNamespace

import flashinfer_stand_in as stand_in
import numpy as np
import pytest
import torch
from attention_batches import CPU, DenseOracle, attend, make_cache, random_steps, random_world
from checkpoints import VOCAB_SIZE
from graph_stand_ins import RepeatingGraphs, add_graphs
from rows import named
from worker_driver import Enter, make_driver

from tokasaurus.model import backend as backends
from tokasaurus.model.backend.base import ModelHeads, PrefixGroups, Rotation, SequenceRows
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
    """FlashInfer appends to e4m3 here: Triton's interpreter does not round to it."""
    for kept_dtype in (None, torch.float8_e4m3fn):
        heads = ModelHeads(32, 8, 64, torch.float16, kept_dtype)
        with named(kept_dtype):
            assert why_not_built(FlashInferBackend, heads, CPU) is None


def decodes(source, page_table):
    count = int(source.integers(1, 7))
    lengths = source.integers(1, page_table.shape[1] * 16 + 1, count).astype(np.int32)
    return SequenceRows(
        slots=source.permutation(8)[:count].astype(np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=page_table,
        num_decodes=count,
    )


def rotation_of(num_rows):
    angles = torch.rand(num_rows, 1, 32) * 6
    return Rotation(angles.cos(), angles.sin())


def test_a_plan_of_a_graph_attends_as_the_plan_of_each_batch_does(kernels):
    """Attention is made once, as it is recorded. Rows without a sequence write nothing."""
    num_heads, num_kv_heads, num_columns = 4, 2, 20
    source = np.random.default_rng(0)
    torch.manual_seed(0)
    page_table = torch.randperm(8 * num_columns + 1).to(torch.int32)[1:].view(8, num_columns)
    shape = 8 * num_columns + 1, 16, num_kv_heads, 64, torch.float16
    caches = [make_cache(*shape) for _ in range(2)]
    for one, other in zip(
        caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
    ):
        other.copy_(one.normal_())
    plain, fixed = (FlashInferBackend(cache, num_heads) for cache in caches)
    graph = fixed.graph_plan(6, page_table, num_columns * 16)
    assert graph.fill(None)
    recorded = graph.attention()
    for step in range(6):
        rows = decodes(source, page_table)
        count = len(rows.slots)
        heads = torch.full((6, num_heads + 2 * num_kv_heads, 64), torch.nan).half()
        heads[:count].normal_()
        rotation = rotation_of(6)
        assert graph.fill(rows)
        output = recorded.attend(0, heads, rotation, None)
        exact = Rotation(*(each[:count] for each in rotation))
        expected = plain.plan(rows).attend(0, heads[:count], exact, None)
        with named(step):
            torch.testing.assert_close(output[:count], expected)
            assert torch.equal(caches[0].keys[0], caches[1].keys[0])
            assert torch.equal(caches[0].values[0], caches[1].values[0])


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
    backend = FlashInferBackend(make_cache(160, 16, 1, 64, torch.float16), 4)
    graph = backend.graph_plan(6, torch.zeros(8, 20, dtype=torch.int32), 320)
    lengths, zero = np.full(4, 100, np.int32), np.zeros(1, np.int32)
    rows = SequenceRows(
        np.arange(4, dtype=np.int32),
        np.arange(5, dtype=np.int32),
        lengths,
        lengths - 1,
        torch.zeros(8, 20, dtype=torch.int32),
        4,
        PrefixGroups(zero, zero + 4, zero, zero, zero, zero + 2),
    )
    assert not graph.fill(rows)


def test_graphs_give_the_tokens_of_the_reference(kernels, checkpoint, monkeypatch):
    """Of sequences that decode together in changing numbers, as graphs of two sizes."""
    monkeypatch.setattr(backend_module, "_why_not", lambda: None)
    monkeypatch.setattr(backend_module, "_why_not_built", lambda _: None)
    monkeypatch.setitem(backends._BACKENDS, "cpu", (FlashInferBackend, ReferenceBackend))
    path = checkpoint("qwen3", num_heads=4, num_kv_heads=2, head_dim=64)
    source = random.Random(0)
    prompts = [[source.randrange(VOCAB_SIZE) for _ in range(n)] for n in (60, 7, 33)]

    def tokens(attention):
        driver = make_driver(
            path,
            attention=attention,
            dtype="float16",
            linear="plain",
            max_tokens_per_forward=64,
            max_seqs_per_forward=4,
            num_slots=4,
        )
        graphs = None
        if attention == "flashinfer":
            graphs = add_graphs(driver.worker, (2, 4), 256, RepeatingGraphs)
        driver.worker.warm_up()
        found = []
        for slot, prompt in enumerate(prompts):
            driver.start(slot)
            found += driver.step(prefill=[Enter(slot, prompt)]).token_ids.tolist()
        for slots in ([0], [2, 0], [0, 1, 2], [1, 2], [1, 2, 0], [2, 1, 0]):
            found += driver.step(decode=slots).token_ids.tolist()
        return found, graphs

    found, graphs = tokens("flashinfer")
    assert graphs.recorded == [4, 2]
    assert graphs.replayed == [2, 2, 4, 2, 4, 4]
    assert found == tokens("reference")[0]
