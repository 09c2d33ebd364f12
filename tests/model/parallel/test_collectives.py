"""Sums, gathers, broadcasts and agreements of real processes."""

from __future__ import annotations

import os
import time

import pytest
import torch
from rows import named

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the last one, a message has many pieces, which end within a row.
SHAPES = ((1, 1), (3, 17), (16, 576), (257, 1153), (700, 601))
WAYS = pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])


def numbers(rank, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def expected_sum(size, shape, dtype):
    """In fp32, in the order of the ranks, rounded once."""
    total = numbers(0, shape, dtype).float()
    for rank in range(1, size):
        total = total + numbers(rank, shape, dtype).float()
    return total.to(dtype)


def sums(parallel):
    return [
        parallel.all_reduce(numbers(parallel.rank, shape, dtype))
        for dtype in DTYPES
        for shape in SHAPES
    ]


@WAYS
def test_sums_are_in_the_order_of_the_ranks_and_rounded_once(ranks, shared):
    for size in (2, 4):
        for rank, results in enumerate(ranks.run(size, sums, shared=shared)):
            cases = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
            for (dtype, shape), result in zip(cases, results, strict=True):
                with named(f"rank {rank} of {size}, {dtype}, {shape}"):
                    assert torch.equal(result, expected_sum(size, shape, dtype))


def gathers(parallel, all_columns):
    results = []
    for columns in all_columns:
        for num_rows in (1, 5, 300):
            whole = numbers(0, (num_rows, sum(columns)), torch.bfloat16)
            first = sum(columns[: parallel.rank])
            own = whole[:, first : first + columns[parallel.rank]]
            results.append((parallel.gather(own, columns), whole))
    return results


@WAYS
def test_rank_0_gets_the_columns_of_all(ranks, shared):
    for size, all_columns in ((2, [(3, 4), (700, 699)]), (4, [(1, 1, 1, 1), (900, 1, 65, 4000)])):
        for rank, results in enumerate(ranks.run(size, gathers, all_columns, shared=shared)):
            for result, whole in results:
                with named(f"rank {rank} of {size}, {tuple(whole.shape)}"):
                    assert torch.equal(result, whole if rank == 0 else whole[:0])


def broadcasts(parallel):
    results = []
    for count in (1, 1000, 100_000):
        x = torch.full((count,), parallel.rank, dtype=torch.int64)
        if parallel.rank == 0:
            x = torch.arange(count)
        parallel.broadcast(x)
        results.append(x)
    return results


@WAYS
def test_a_broadcast_replaces_what_other_ranks_have(ranks, shared):
    for size in (2, 4):
        for results in ranks.run(size, broadcasts, shared=shared):
            for result in results:
                assert torch.equal(result, torch.arange(len(result)))


def agreements(parallel):
    texts = [f"rank {parallel.rank} says ünïcode", ""]
    return [
        parallel.agree(text if parallel.rank in chosen else None)
        for text in texts
        for chosen in ((), (1,), (0, 1), (parallel.size - 1,))
    ]


@WAYS
def test_ranks_agree_on_what_the_first_one_found(ranks, shared):
    for size in (2, 4):
        speakers = (None, 1, 0, size - 1)
        said = [each if each is None else f"rank {each} says ünïcode" for each in speakers]
        expected = said + [each if each is None else "" for each in speakers]
        assert ranks.run(size, agreements, shared=shared) == [expected] * size


def mixed(parallel, seed, num_calls):
    """Calls of all kinds and sizes, while each rank now and then is late."""
    chance = torch.Generator().manual_seed(seed)
    late = torch.Generator().manual_seed(seed + 1 + parallel.rank)
    for number in range(num_calls):
        kind, num_rows, columns = (
            int(torch.randint(high, (), generator=chance)) for high in (3, 90, 2000)
        )
        shape = (num_rows + 1, columns + 1)
        if float(torch.rand((), generator=late)) < 0.05:
            time.sleep(float(torch.rand((), generator=late)) * 2e-3)
        if kind == 0:
            result = parallel.all_reduce(numbers(parallel.rank, shape, torch.float32, number))
            expected = numbers(0, shape, torch.float32, number)
            for rank in range(1, parallel.size):
                expected = expected + numbers(rank, shape, torch.float32, number)
        elif kind == 1:
            own = numbers(parallel.rank, shape, torch.float32, number)
            result = parallel.gather(own, [shape[1]] * parallel.size)
            every = [numbers(rank, shape, torch.float32, number) for rank in range(parallel.size)]
            expected = torch.cat(every, 1)
            expected = expected if parallel.rank == 0 else expected[:0]
        else:
            result = numbers(parallel.rank, shape, torch.float32, number)
            parallel.broadcast(result)
            expected = numbers(0, shape, torch.float32, number)
        assert torch.equal(result, expected), f"call {number}: {kind} {shape}"


def test_calls_of_all_kinds_follow_one_another(ranks):
    """No rank overwrites what another one still reads."""
    for size in (2, 4):
        ranks.run(size, mixed, size, 200)


def num_open_files(parallel):
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum("tokasaurus" in os.readlink(link) for link in links if os.path.lexists(link))


def test_ranks_keep_no_file_of_the_memory(ranks):
    assert ranks.run(4, num_open_files) == [0, 0, 0, 0]
