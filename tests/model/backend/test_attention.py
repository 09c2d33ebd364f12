"""Every attention backend against dense attention in float64, on batches like the worker's."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_batches import (
    CPU,
    HEADS,
    MAX_LENGTH,
    DenseOracle,
    add_prefill,
    attend,
    grouped_decodes,
    large_group,
    make_cache,
    random_steps,
    random_world,
)
from rows import named

from tokasaurus.errors import ConfigError
from tokasaurus.model import instruction_sets
from tokasaurus.model.backend import choose_backend
from tokasaurus.model.backend.base import (
    BackendOptions,
    HeadNorms,
    PrefixGroups,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.cpu import build, compiled
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.rounding import ceil_div

SETS = [instructions.name for instructions in usable_sets()]


@pytest.fixture(params=["reference", *SETS])
def backend_of(request):
    """Makes the reference, and the compiled backend in every instruction set of this processor."""

    def get(cache, num_heads):
        if request.param == "reference":
            return ReferenceBackend(cache, num_heads)
        return CompiledBackend(cache, num_heads, BackendOptions(request.param))

    return get


def check_against_dense(backend_of, num_heads, num_kv_heads, head_dim, page_size):
    rng = np.random.default_rng(num_heads * 100 + page_size)
    torch.manual_seed(0)
    cache = make_cache(4 * ceil_div(MAX_LENGTH, page_size), page_size, num_kv_heads, head_dim)
    backend, oracle = backend_of(cache, num_heads), DenseOracle()
    for rows in random_steps(rng, 4, 6, page_size):
        heads = torch.randn(len(rows.positions), num_heads + 2 * num_kv_heads, head_dim) * 2
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        output = attend(backend, rows, query, key, value)
        expected = oracle.attend(rows, query, key, value)
        torch.testing.assert_close(output.double(), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_attention_in_fp32_matches_dense_attention(backend_of, page_size):
    for heads in HEADS:
        with named(heads):
            check_against_dense(backend_of, *heads, page_size)


def check_half_precision(backend_of, dtype, tolerance, num_heads, num_kv_heads, head_dim):
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    cache = make_cache(3 * 13, 16, num_kv_heads, head_dim, dtype)
    backend, oracle = backend_of(cache, num_heads), DenseOracle()
    for rows in random_steps(rng, 3, 5, 16):
        heads = torch.randn(len(rows.positions), num_heads + 2 * num_kv_heads, head_dim).to(dtype)
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        output = attend(backend, rows, query, key, value)
        expected = oracle.attend(rows, query, key, value)
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_half_precision_rounds_the_inputs_and_the_result_but_not_the_sums(backend_of):
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
        for heads in [(6, 2, 24), (9, 3, 64), (8, 1, 128), (4, 4, 32), (5, 5, 80)]:
            with named((dtype, *heads)):
                check_half_precision(backend_of, dtype, tolerance, *heads)


def test_the_compiled_kernel_widens_every_kind_of_fp16_number():
    """With a single key the output is its value."""
    rows = SequenceRows(
        *(np.array(x, np.int32) for x in ([0], [0, 1], [1], [0])),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
    )
    one = torch.ones(1, 1, 8, dtype=torch.float16)
    for special in (0.0, -0.0, 6e-8, 5.9e-5, 65504.0, -1.5):
        cache = make_cache(1, 16, 1, 8, torch.float16)
        value = torch.full((1, 1, 8), special, dtype=torch.float16)
        output = attend(CompiledBackend(cache, 1), rows, one, one, value)
        assert torch.equal(output, value), special


def test_large_scores_do_not_overflow(backend_of):
    cache = make_cache(4, 16, 1, 16)
    rows = SequenceRows(
        np.array([0], np.int32),
        np.array([0, 40], np.int32),
        np.array([40], np.int32),
        np.arange(40, dtype=np.int32),
        torch.arange(4, dtype=torch.int32).view(1, 4),
    )
    torch.manual_seed(0)
    # Scores of whole numbers are exact in every order of addition. Only the sum of values rounds.
    query, key = torch.randint(-3, 4, (2, 40, 1, 16)) * 100.0
    value = torch.randn(40, 1, 16)
    output = attend(backend_of(cache, 1), rows, query, key, value)
    expected = DenseOracle().attend(rows, query, key, value)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_heads_are_normed_and_rotated_before_they_are_stored(backend_of):
    """The definition is that of the papers, in float64, over several dtypes and shapes."""
    num_rows = 7
    for num_heads, num_kv_heads, head_dim in HEADS:
        cache = make_cache(1, 16, num_kv_heads, head_dim)
        torch.manual_seed(0)
        heads = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim)
        angles = torch.rand(num_rows, 1, head_dim // 2) * 6
        query_norm, key_norm = torch.rand(2, head_dim) + 0.5
        rows = SequenceRows(
            *(np.array(x, np.int32) for x in ([0], [0, num_rows], [num_rows], range(num_rows))),
            page_table=torch.zeros(1, 1, dtype=torch.int32),
        )
        for norms in (None, HeadNorms(query_norm, key_norm, 1e-3)):
            prepared = []
            for part, weight in zip(
                heads.double().split([num_heads, num_kv_heads, num_kv_heads], dim=1),
                (query_norm, key_norm, None),
                strict=True,
            ):
                if norms is not None and weight is not None:
                    scale = (part.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
                    part = part * scale * weight
                if weight is not None:
                    pairs = torch.view_as_complex(torch.stack(part.chunk(2, dim=-1), -1))
                    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
                    part = torch.cat((turned.real, turned.imag), dim=-1)
                prepared.append(part)
            rotation = Rotation(angles.cos(), angles.sin())
            output = backend_of(cache, num_heads).plan(rows).attend(0, heads, rotation, norms)
            expected = DenseOracle().attend(rows, *prepared).flatten(1)
            with named(f"{num_heads} heads of {head_dim}, norms {norms is not None}"):
                torch.testing.assert_close(output.double(), expected, atol=5e-5, rtol=1e-5)
                stored = cache.keys[0][0, :, :num_rows].transpose(0, 1).double()
                torch.testing.assert_close(stored, prepared[1], atol=1e-5, rtol=1e-5)


def test_each_layer_has_its_own_keys_and_values(backend_of):
    cache = make_cache(1, 16, 1, 8, num_layers=2)
    rows = SequenceRows(
        *(np.array(x, np.int32) for x in ([0], [0, 2], [2], [0, 1])),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
    )
    backend = backend_of(cache, 1)
    ones = torch.ones(2, 1, 8)
    attend(backend, rows, ones, ones, ones, layer=0)
    attend(backend, rows, ones, ones, 2 * ones, layer=1)
    assert cache.values[0][0, 0, :2].eq(1).all()
    assert cache.values[1][0, 0, :2].eq(2).all()
    assert cache.values[0][0, 0, 2:].isnan().all()


def test_groups_change_no_result(backend_of):
    for num_heads, num_kv_heads, head_dim in HEADS:
        for page_size in (16, 100):
            rng = np.random.default_rng(page_size)
            torch.manual_seed(1)
            cache = make_cache(10 * 8, page_size, num_kv_heads, head_dim)
            for tensor in cache.keys + cache.values:
                tensor.normal_()
            backend = backend_of(cache, num_heads)
            plain, grouped = (add_prefill(rows, 5) for rows in grouped_decodes(rng, page_size))
            query, key, value = (
                torch.randn(len(plain.positions), heads, head_dim)
                for heads in (num_heads, num_kv_heads, num_kv_heads)
            )
            expected = attend(backend, plain, query, key, value)
            assert not expected.isnan().any()
            with named(f"{num_heads} heads of {head_dim}, pages of {page_size}"):
                output = attend(backend, grouped, query, key, value)
                check_groups_change_nothing(backend, output, expected, 5e-6)


def check_groups_change_nothing(backend, output, expected, tolerance):
    """The compiled kernel promises the same bits."""
    assert sum(backend.grouped_rows) > 0
    tolerance = 0 if isinstance(backend, CompiledBackend) else tolerance
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


TOLERANCES = [(torch.float32, 5e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]


def test_random_groups_of_decodes_and_chunks_change_no_result(backend_of, monkeypatch):
    """Against the same backend without groups, and against the reference with them.

    One thread adds up all ranges of a group; four threads share those of large groups.
    """
    num_mixed = 0
    for seed in range(24):
        num_threads = 1 + 3 * (seed // len(HEADS) % 2)
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        rng = np.random.default_rng(seed)
        num_heads, num_kv_heads, head_dim = HEADS[seed % len(HEADS)]
        page_size = (16, 40, 64, 100)[seed % 4]
        plain, grouped, shared = random_world(rng, page_size)
        num_mixed += bool((grouped.groups.num_decodes * grouped.groups.num_chunks).any())
        for dtype, tolerance in TOLERANCES:
            torch.manual_seed(seed)
            cache = make_cache(plain.page_table.numel(), page_size, num_kv_heads, head_dim, dtype)
            for tensor in cache.keys + cache.values:
                tensor.normal_()
            backend = backend_of(cache, num_heads)
            query, key, value = (
                torch.randn(len(plain.positions), heads, head_dim).to(dtype)
                for heads in (num_heads, num_kv_heads, num_kv_heads)
            )
            with named((seed, dtype)):
                expected = attend(backend, plain, query, key, value)
                assert not expected.isnan().any()
                output = attend(backend, grouped, query, key, value)
                step = 64 if isinstance(backend, CompiledBackend) else 1
                is_grouped = np.repeat(shared >= step, np.diff(plain.query_starts))
                count = np.count_nonzero
                num_decodes = plain.num_decodes
                assert backend.grouped_rows == (
                    count(is_grouped[:num_decodes]),
                    count(is_grouped[num_decodes:]),
                )
                if is_grouped.any():
                    check_groups_change_nothing(backend, output, expected, tolerance)
                reference = attend(ReferenceBackend(cache, num_heads), grouped, query, key, value)
                torch.testing.assert_close(output, reference, atol=tolerance, rtol=tolerance)
    assert num_mixed > 8


def test_the_reference_reads_the_prefix_of_a_group_once():
    """Reading it through another member's page table would show: their entries are broken."""
    plain, grouped = grouped_decodes(np.random.default_rng(3), 16)
    cache = make_cache(9 * 8, 16, 1, 8)
    for tensor in cache.keys + cache.values:
        tensor.normal_()
    query, key, value = (torch.randn(9, heads, 8) for heads in (2, 1, 1))
    backend = ReferenceBackend(cache, 2)
    expected = attend(backend, plain, query, key, value)
    torch.testing.assert_close(attend(backend, grouped, query, key, value), expected)
    broken = plain.page_table.clone()
    broken[plain.slots[3], 0] = broken[plain.slots[0], 0]
    output = attend(backend, replace(plain, page_table=broken), query, key, value)
    assert (output[3] - expected[3]).abs().max() > 1e-3
    output = attend(backend, replace(grouped, page_table=broken), query, key, value)
    torch.testing.assert_close(output, expected)


def test_groups_change_no_result_in_half_precision(backend_of):
    for dtype, tolerance in TOLERANCES:
        for num_heads, num_kv_heads, head_dim in [(9, 3, 64), (8, 2, 128), (6, 6, 40)]:
            torch.manual_seed(1)
            cache = make_cache(10 * 8, 16, num_kv_heads, head_dim, dtype)
            for tensor in cache.keys + cache.values:
                tensor.normal_()
            backend = backend_of(cache, num_heads)
            plain, grouped = grouped_decodes(np.random.default_rng(2), 16)
            query, key, value = (
                torch.randn(len(plain.positions), heads, head_dim).to(dtype)
                for heads in (num_heads, num_kv_heads, num_kv_heads)
            )
            expected = attend(backend, plain, query, key, value)
            with named((dtype, num_heads, head_dim)):
                output = attend(backend, grouped, query, key, value)
                check_groups_change_nothing(backend, output, expected, tolerance)


@pytest.fixture
def four_threads(monkeypatch):
    """Makes the kernel cut long work into parts, on every machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def test_a_large_group_is_cut_and_changes_no_result(backend_of, four_threads):
    for dtype, tolerance in TOLERANCES:
        torch.manual_seed(1)
        cache = make_cache(120, 16, 1, 64, dtype)
        for tensor in cache.keys + cache.values:
            tensor.normal_()
        backend = backend_of(cache, 3)
        plain, grouped = large_group(70, 50, 16)
        query, key, value = (torch.randn(70, heads, 64).to(dtype) for heads in (3, 1, 1))
        expected = attend(backend, plain, query, key, value)
        with named(dtype):
            output = attend(backend, grouped, query, key, value)
            check_groups_change_nothing(backend, output, expected, tolerance)


def test_the_states_of_grouped_prompts_take_no_more_memory_behind_a_longer_prefix(four_threads):
    """A state for each 512 tokens of the prefix would take gigabytes."""
    num_rows = 128
    for num_columns in (8, 400):
        cache = make_cache(num_columns + 8 * 8, 16, 2, 32)
        length = num_columns * 16 + num_rows
        shared = torch.arange(num_columns, dtype=torch.int32).repeat(8, 1)
        own = num_columns + torch.arange(64, dtype=torch.int32).view(8, 8)
        zero, all_chunks = np.zeros(1, np.int32), np.full(1, 8, np.int32)
        columns = np.full(1, num_columns, np.int32)
        rows = SequenceRows(
            slots=np.arange(8, dtype=np.int32),
            query_starts=np.arange(9, dtype=np.int32) * np.int32(num_rows),
            kv_lengths=np.full(8, length, np.int32),
            positions=np.tile(np.arange(length - num_rows, length, dtype=np.int32), 8),
            page_table=torch.cat((shared, own), dim=1),
            groups=PrefixGroups(zero, zero, zero, all_chunks, zero, columns),
        )
        plan = CompiledBackend(cache, 4).plan(rows)._plan
        assert plan.num_groups == 1
        assert plan.workspace_size == 8 * num_rows * 4 * 2 * (32 + 2)


def test_a_long_context_is_shared_out_to_threads(backend_of, four_threads):
    """A prompt of several blocks, then a single row, behind which most threads would rest."""
    for dtype, tolerance in TOLERANCES:
        torch.manual_seed(0)
        length, page_size = 700, 16
        cache = make_cache(ceil_div(length + 1, page_size), page_size, 1, 64, dtype)
        backend, oracle = backend_of(cache, 2), DenseOracle()
        table = torch.arange(cache.num_pages, dtype=torch.int32)[None]
        for start, count in ((0, length - 100), (length - 100, 100), (length, 1)):
            rows = SequenceRows(
                slots=np.zeros(1, np.int32),
                query_starts=np.array([0, count], np.int32),
                kv_lengths=np.array([start + count], np.int32),
                positions=np.arange(start, start + count, dtype=np.int32),
                page_table=table,
            )
            query, key, value = torch.randn(count, 4, 64).to(dtype).split([2, 1, 1], dim=1)
            expected = oracle.attend(rows, query, key, value)
            with named((dtype, start)):
                output = attend(backend, rows, query, key, value).double()
                torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_threads_share_out_large_tasks_by_their_heads(monkeypatch):
    """A thread takes all heads of a task, or ahead, only where that leaves enough to the others."""
    for lengths, num_threads, expected in (
        ([500] * 64, 4, (8, 1)),
        ([256] * 64 + [8000], 4, (1, 1)),
        ([500] * 8, 4, (1, 1)),
        ([400], 16, (1, 0)),
        ([400], 1, (8, 1)),
    ):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        count = len(lengths)
        rows = SequenceRows(
            slots=np.arange(count, dtype=np.int32),
            query_starts=np.arange(count + 1, dtype=np.int32),
            kv_lengths=np.array(lengths, np.int32),
            positions=np.array(lengths, np.int32) - 1,
            page_table=torch.zeros(count, ceil_div(max(lengths), 16), dtype=torch.int32),
            num_decodes=count,
        )
        plan = CompiledBackend(make_cache(1, 16, 8, 64), 32).plan(rows)._plan
        with named((lengths[-1], count, num_threads)):
            assert (plan.heads_at_once, plan.takes_ahead) == expected


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiled._library.cache_clear()
    yield
    compiled._library.cache_clear()


def test_without_a_compiler_auto_falls_back_and_compiled_is_refused(no_compiler, caplog):
    with caplog.at_level(logging.WARNING, "tokasaurus"):
        assert choose_backend("auto", CPU) is ReferenceBackend
    assert "no C++ compiler found" in caplog.text
    with pytest.raises(ConfigError, match=r"attention=compiled.*no C\+\+ compiler"):
        choose_backend("compiled", CPU)


def test_a_failing_compiler_is_reported_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false failed"):
        build.load_library(compiled._SOURCE)
    assert list((tmp_path / "tokasaurus").iterdir()) == []


def test_a_library_is_built_once_for_each_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 41; }')
    assert build.load_library(source).answer() == 41
    (kept,) = (tmp_path / "tokasaurus").iterdir()
    before = kept.stat().st_mtime_ns
    assert build.load_library(source).answer() == 41
    assert kept.stat().st_mtime_ns == before
    source.write_text('extern "C" int answer() { return 42; }')
    assert build.load_library(source).answer() == 42


def test_a_library_is_built_anew_when_a_header_beside_it_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }')
    for answer in (41, 42):
        header.write_text(f"#define ANSWER {answer}")
        assert build.load_library(source).answer() == answer


def test_old_libraries_and_abandoned_builds_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "tokasaurus"
    source = tmp_path / "answer.cpp"
    libraries = []

    def load(answer):
        source.write_text(f'extern "C" int answer() {{ return {answer}; }}')
        before = set(kept.glob("*.so"))
        library = build.load_library(source)
        libraries.extend(set(kept.glob("*.so")) - before)
        return library

    first = load(0)
    for name, age_s in (("abandoned", 10_000), ("new", 0)):
        (kept / f"build-{name}").mkdir()
        os.utime(kept / f"build-{name}", (time.time() - age_s,) * 2)
    (kept / "another-amx-0.so").touch()
    for answer in range(1, build._NUM_KEPT):
        load(answer)
    assert set(kept.glob("answer-*")) == set(libraries)
    for number, library in enumerate(libraries):
        os.utime(library, (number, number))
    load(0)  # it is not the oldest any more
    load(build._NUM_KEPT)
    assert set(kept.glob("answer-*")) == {libraries[0], *libraries[2:]}
    assert {path.name for path in kept.glob("[!a]*")} == {"build-new"}
    assert (kept / "another-amx-0.so").exists()
    assert first.answer() == 0
    assert load(1).answer() == 1


def test_processes_that_start_together_compile_once(monkeypatch, tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 41; }')
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(build.load_library, [source] * 4))
    assert [library.answer() for library in loaded] == [41] * 4
    assert log.read_text().count(" -c ") == 1


def set_processor(monkeypatch, tmp_path, features):
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(f"processor : 0\nflags : {' '.join(features)}\n\n")
    monkeypatch.setattr(instruction_sets, "_CPU_INFO", cpu_info)
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "x86_64")
    instruction_sets._processor_features.cache_clear()


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Gives the processor other features."""
    yield lambda features: set_processor(monkeypatch, tmp_path, features)
    instruction_sets._processor_features.cache_clear()


def test_auto_takes_the_best_instruction_set_that_the_processor_runs(processor):
    features = {each.name: each.features for each in instruction_sets.INSTRUCTION_SETS}
    for best in features:
        processor(features[best])
        with named(best):
            assert instruction_sets.candidate_sets("auto")[0].name == best
    processor([*features["avx2"], "amx_tile", "amx_bf16"])
    assert [each.name for each in usable_sets()] == ["avx2", "generic"]


def test_two_instruction_sets_multiply_bf16(processor):
    features = {each.name: each.features for each in instruction_sets.INSTRUCTION_SETS}
    for name, each in features.items():
        processor(each)
        expected = name if name in ("amx", "avx512_bf16") else None
        assert instruction_sets.bfloat16_instructions("auto") == expected, name
    processor(features["amx"])
    assert instruction_sets.bfloat16_instructions("avx512") is None
    assert instruction_sets.bfloat16_instructions("avx512_bf16") == "avx512_bf16"


def test_a_forced_instruction_set_that_the_processor_lacks_is_refused(processor):
    processor(instruction_sets.INSTRUCTION_SETS[2].features)
    expected = (
        "instruction_set=amx: this processor has no avx512_bf16, amx_tile, amx_bf16; "
        "set auto or avx512 or avx2 or generic"
    )
    for attention in ("auto", "compiled"):
        with pytest.raises(ConfigError, match=expected):
            choose_backend(attention, CPU, BackendOptions("amx"))


def test_auto_passes_over_an_instruction_set_that_the_compiler_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unknown = instruction_sets.InstructionSet("new", (), ("-march=unheard-of",))
    monkeypatch.setattr(
        instruction_sets, "INSTRUCTION_SETS", (unknown, instruction_sets.INSTRUCTION_SETS[-1])
    )
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 41; }')
    assert build.load_library(source).answer() == 41
    with pytest.raises(build.BuildError, match="unheard-of"):
        build.load_library(source, "new")


def test_an_extension_that_the_compiler_does_not_know_is_left_out(monkeypatch, tmp_path):
    """Rather than the whole set: an older compiler still builds the set itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(instruction_sets, "_processor_features", lambda: frozenset({"new"}))
    extended = instruction_sets.InstructionSet(
        "good", (), ("-DANSWER=42",), (("new", "-mnew-dot-products"),)
    )
    monkeypatch.setattr(
        instruction_sets, "INSTRUCTION_SETS", (extended, instruction_sets.INSTRUCTION_SETS[-1])
    )
    source = tmp_path / "answer.cpp"
    source.write_text(
        '#ifndef ANSWER\n#define ANSWER 41\n#endif\nextern "C" int answer() { return ANSWER; }'
    )
    for asked in ("auto", "good"):
        assert build.load_library(source, asked).answer() == 42, asked
        assert build.loaded_libraries(asked)["answer"].instruction_set == "good", asked


def test_auto_prefers_the_compiled_backend():
    assert choose_backend("reference", CPU) is ReferenceBackend
    assert choose_backend("compiled", CPU) is CompiledBackend
    assert choose_backend("auto", CPU) is CompiledBackend


def test_a_backend_of_another_device_is_refused():
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match="attention=compiled does not run on device=cuda: set"):
        choose_backend("compiled", cuda)
    assert choose_backend("auto", cuda) is ReferenceBackend
