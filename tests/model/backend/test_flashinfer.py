"""The FlashInfer backend with a stand-in for the library, against the reference.

FlashInfer's kernels have no fp32. The stand-in is given it, so that what the backend composes shows
without rounding. It refuses what FlashInfer would refuse.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import flashinfer_stand_in as stand_in
import numpy as np
import pytest
import torch
from attention_batches import (
    CPU,
    add_prefill,
    attend,
    grouped_decodes,
    large_group,
    make_cache,
    random_heads,
    random_world,
)
from attention_checks import (
    check_empty_sequences,
    check_first_member,
    check_large_group,
    check_nested_groups,
    check_prompts_and_decodes,
)
from rows import named

from tokasaurus.model.backend.base import (
    BackendOptions,
    HeadNorms,
    ModelHeads,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.flashinfer.backend import FlashInferBackend
from tokasaurus.model.backend.flashinfer.wrappers import Wrappers
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.triton import backend as triton_backend
from tokasaurus.model.backend.triton.backend import TritonBackend
from tokasaurus.model.float8 import E4M3

DTYPES = [(torch.float32, 2e-5), (torch.float16, 0.005), (torch.bfloat16, 0.04)]
SHAPES = [  # num_heads, num_kv_heads, head_dim, page_size
    (1, 1, 64, 16),
    (4, 2, 128, 16),
    (8, 1, 64, 7),
    (3, 1, 256, 64),
    (5, 5, 64, 1),
    (14, 2, 64, 20),
]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(stand_in, "DTYPES", [*stand_in.DTYPES, torch.float32])


def test_prompts_and_decodes_match_dense_attention():
    for dtype, tolerance in DTYPES:
        check_prompts_and_decodes(FlashInferBackend, SHAPES, dtype, tolerance)


def test_random_nested_groups_match_the_reference():
    num_grouped = num_apart = 0
    for dtype, tolerance in DTYPES:
        checked = check_nested_groups(FlashInferBackend, SHAPES, 12, dtype, tolerance)
        for backend, rows, count in checked:
            num_grouped += count
            levels = backend.plan(rows)._levels
            num_apart += sum(isinstance(level.rows, torch.Tensor) for level in levels)
    assert num_grouped > 100
    assert num_apart > 10


def test_a_large_group_changes_no_result():
    """Its rows follow each other, so nothing is gathered."""
    for dtype, tolerance in DTYPES:
        backend, rows = check_large_group(FlashInferBackend, dtype, tolerance)
        assert [level.rows for level in backend.plan(rows)._levels] == [slice(0, 40)]


def test_a_group_reads_its_prefix_through_its_first_member():
    check_first_member(FlashInferBackend)


def test_groups_that_save_no_bytes_are_not_taken():
    """A partial result in fp16, with 8 query heads and one key head, is as much as 4 positions.

    It is written and read, as is what it is merged with: 16 positions. So a page of 16 saves
    nothing.
    """
    _, grouped = large_group(70, 50, 16)
    cache = make_cache(120, 16, 1, 64, torch.float16)
    for use_groups, taken in ((None, (0, 70, 2)), (True, (70, 70, 2)), (False, (0, 0, 0))):
        backend = FlashInferBackend(cache, 8, BackendOptions(use_groups=use_groups))
        for num_rows, num_columns, expected in zip((70, 70, 2), (1, 3, 50), taken, strict=True):
            rows, columns = (np.array([count], np.int32) for count in (num_rows, num_columns))
            groups = replace(grouped.groups, num_decodes=rows, num_columns=columns)
            backend.plan(replace(grouped, groups=groups))
            with named((use_groups, num_rows, num_columns)):
                assert backend.grouped_rows.num_decodes == expected


def test_keys_and_values_may_be_in_e4m3():
    """The reference reads the same numbers, but for keys that are rounded to their neighbours."""
    for seed in range(6):
        plain, grouped, _ = random_world(np.random.default_rng(seed), 16)
        outputs = []
        for backend in (FlashInferBackend, ReferenceBackend):
            torch.manual_seed(seed)
            options = {"dtype": torch.float16, "kept_dtype": E4M3}
            cache = make_cache(plain.page_table.numel(), 16, 2, 64, **options)
            for tensor in cache.keys + cache.values:
                tensor.copy_(torch.randn(tensor.shape))
            parts = random_heads(len(plain.positions), 4, 2, 64, torch.float16)
            outputs.append(attend(backend(cache, 4), grouped, *parts))
            assert cache.keys[0].dtype == E4M3
        with named(seed):
            torch.testing.assert_close(*outputs, atol=0.005, rtol=0.005)


def test_flashinfer_appends_where_triton_runs_but_does_not_round_to_e4m3(monkeypatch):
    monkeypatch.setattr(TritonBackend, "why_not", classmethod(lambda *_: None))
    monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
    table = torch.zeros(4, 4, dtype=torch.int32)
    for capability, kept_dtype, is_appended in (
        ((8, 0), None, False),
        ((8, 0), E4M3, True),
        ((8, 9), E4M3, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        cache = make_cache(4, 16, 1, 64, torch.float16, kept_dtype=kept_dtype)
        with named((capability, kept_dtype)):
            backend = FlashInferBackend(cache, 2)
            assert (backend._shape is None) == is_appended
            if is_appended:
                assert backend.graph_plan(2, table, 64) is None


def test_sequences_of_no_rows_and_of_one_position_pass():
    check_empty_sequences(FlashInferBackend)


def test_heads_are_normed_rotated_and_stored_as_the_reference_does():
    """Only this layer is written."""
    plain, _ = grouped_decodes(np.random.default_rng(0), 16)
    rows = add_prefill(plain, 5)
    num_rows = len(rows.positions)
    torch.manual_seed(0)
    angles = torch.rand(num_rows, 1, 32) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    # A part of something wider, as a fused product may give it.
    heads = torch.randn(num_rows, 11, 64).half()[:, 3:]
    weights = (torch.rand(2, 64) + 0.5).half()
    for norms in (None, HeadNorms(*weights, 1e-5)):
        caches, outputs = [], []
        for backend in (FlashInferBackend, ReferenceBackend):
            cache = make_cache(10 * 8, 16, 2, 64, torch.float16, num_layers=2)
            for tensor in cache.keys + cache.values:
                tensor.zero_()
            outputs.append(backend(cache, 4).plan(rows).attend(1, heads, rotation, norms))
            caches.append(cache)
        with named(norms is not None):
            assert not caches[0].keys[0].any()
            assert torch.equal(caches[0].keys[1], caches[1].keys[1])
            assert torch.equal(caches[0].values[1], caches[1].values[1])
            torch.testing.assert_close(*outputs, atol=0.003, rtol=0.003)


def test_the_third_generation_is_for_long_chunks():
    """128 rows of one of 4 heads are a tile. They fill it by half, and 12 multiprocessors."""
    cache = make_cache(60, 16, 1, 128, torch.float16)
    backend = FlashInferBackend(cache, 4)
    backend._wrappers._has_fa3 = True
    backend._wrappers._num_processors = 12
    for counts, expected in (
        ([300], "fa3"),
        ([128, 128], "fa2"),
        ([128, 128, 128], "fa3"),
        ([384, 1, 1, 1, 1, 1], "fa2"),
        ([150, 150], "fa3"),
        ([130, 130], "fa3"),
    ):
        counts = np.array(counts, np.int32)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        rows = SequenceRows(
            slots=np.arange(len(counts), dtype=np.int32),
            query_starts=starts,
            kv_lengths=counts,
            positions=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
            page_table=torch.arange(len(counts) * 30, dtype=torch.int32).view(-1, 30) % 60,
        )
        with named(counts):
            ((wrapper, _),) = backend.plan(rows)._own
            assert wrapper._backend == expected


def test_two_wrappers_take_turns_and_wait_for_the_copy_of_their_last_plan(monkeypatch):
    log = []

    class Event:
        def synchronize(self):
            log.append(("wait", self))

        def record(self):
            log.append(("record", self))

    wrappers = Wrappers(stand_in, ModelHeads(2, 1, 64, torch.float16), torch.float16, CPU)
    turns = [wrappers._take("decodes", wrappers._make_decode) for _ in range(5)]
    assert turns[0] is not turns[1]
    assert turns == [turns[0], turns[1]] * 2 + [turns[0]]
    turn = turns[0]
    turn._copied = Event()
    monkeypatch.setattr(turn.wrapped, "plan", lambda *_, **__: log.append(("plan", turn)))
    turn.plan()
    assert [what for what, _ in log] == ["wait", "plan", "record"]


def run_wrongly(wrong):
    """One request of three rows, with something wrong."""
    workspace = torch.zeros(8, dtype=torch.uint8)
    wrapper = stand_in.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")
    three, two = (torch.tensor([0, last], dtype=torch.int32) for last in (3, 2))
    lengths = torch.tensor([3], dtype=torch.int32)
    query = torch.zeros(3, 2, 64, dtype=torch.float16)
    cache = [torch.zeros(2, 1, 16, 64, dtype=torch.float16) for _ in range(2)]
    out = torch.empty_like(query)
    if wrong == "strides":
        out = out.transpose(0, 1).contiguous().transpose(0, 1)
    elif wrong == "page size":
        cache = [each[:, :, :8] for each in cache]
    if wrong != "no plan":
        wrapper.plan(
            two if wrong == "rows" else three.long() if wrong == "indices" else three,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1], dtype=torch.int32),
            lengths,
            2,
            1,
            64,
            16,
            causal=True,
            sm_scale=0.1,
            q_data_type=torch.bfloat16 if wrong == "dtype" else torch.float16,
            kv_data_type=torch.float16,
            seq_lens=lengths,
            max_token_per_sequence=2 if wrong == "rows" else 3,
        )
    wrapper.run(query, tuple(cache), out=out)


def test_the_stand_in_refuses_what_flashinfer_cannot_do():
    """The tests here rely on it."""
    run_wrongly("nothing")
    for wrong, reason in (
        ("dtype", "queries are torch.float16, and torch.bfloat16 was planned"),
        ("rows", "and 2 rows were planned"),
        ("page size", r"pages are \(1, 8, 64\)"),
        ("strides", "the output is not contiguous"),
        ("no plan", "before plan"),
        ("indices", "is torch.int64, not int32"),
    ):
        with named(wrong), pytest.raises(ValueError, match=reason):
            run_wrongly(wrong)
