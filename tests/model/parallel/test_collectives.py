"""Sums and gathers of real processes."""

from __future__ import annotations

import time

import pytest
import torch
from rank_processes import RankProcesses
from rows import named

from tokasaurus.model.backend.cpu.shared_memory import SharedMemory, SharedMemoryRank
from tokasaurus.model.parallel import collectives
from tokasaurus.model.parallel.collectives import GroupRank, open_tensor_parallel
from tokasaurus.model.parallel.ranks import Ranks

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


def sums(meeting, shared, num_threads):
    parallel = meeting.tensor_parallel(shared=shared)
    torch.set_num_threads(num_threads)
    try:
        return [
            parallel.all_reduce(numbers(parallel.rank, shape, dtype))
            for dtype in DTYPES
            for shape in SHAPES
        ]
    finally:
        torch.set_num_threads(1)


@WAYS
def test_sums_are_in_the_order_of_the_ranks_and_rounded_once(ranks, shared):
    for size, num_threads in ((2, 1), (2, 3), (4, 1)):
        for rank, results in enumerate(ranks.run(size, sums, shared, num_threads)):
            cases = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
            for (dtype, shape), result in zip(cases, results, strict=True):
                with named(f"rank {rank} of {size}, {dtype}, {shape}"):
                    assert torch.equal(result, expected_sum(size, shape, dtype))


def gathers(meeting, all_columns, shared):
    parallel = meeting.tensor_parallel(shared=shared)
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


def mixed(meeting, seed, num_calls):
    """Sums and gathers of all sizes, while each rank now and then is late."""
    parallel = meeting.tensor_parallel()
    chance = torch.Generator().manual_seed(seed)
    late = torch.Generator().manual_seed(seed + 1 + parallel.rank)
    for number in range(num_calls):
        is_sum, num_rows, columns = (
            int(torch.randint(high, (), generator=chance)) for high in (2, 90, 2000)
        )
        shape = (num_rows + 1, columns + 1)
        if float(torch.rand((), generator=late)) < 0.05:
            time.sleep(float(torch.rand((), generator=late)) * 2e-3)
        if is_sum:
            result = parallel.all_reduce(numbers(parallel.rank, shape, torch.float32, number))
            expected = numbers(0, shape, torch.float32, number)
            for rank in range(1, parallel.size):
                expected = expected + numbers(rank, shape, torch.float32, number)
        else:
            own = numbers(parallel.rank, shape, torch.float32, number)
            result = parallel.gather(own, [shape[1]] * parallel.size)
            every = [numbers(rank, shape, torch.float32, number) for rank in range(parallel.size)]
            expected = torch.cat(every, 1)
            expected = expected if parallel.rank == 0 else expected[:0]
        assert torch.equal(result, expected), f"call {number}: {shape}"


def test_sums_and_gathers_follow_one_another(ranks):
    """No rank overwrites what another one still reads."""
    for size in (2, 4):
        ranks.run(size, mixed, size, 200)


@pytest.mark.long
def test_many_ranks_on_few_cores_wait_for_one_another(tmp_path):
    ranks = RankProcesses(8, tmp_path)
    try:
        for seed in range(3):
            ranks.run(8, mixed, seed, 100)
    finally:
        ranks.end()


def ways(meeting, failing, is_elsewhere):
    """The way that ranks take if one of them cannot share memory, and a sum."""

    def fail(*_):
        raise OSError("not permitted")

    with pytest.MonkeyPatch.context() as patch:
        if meeting.rank == failing and is_elsewhere:
            patch.setattr(collectives, "_place", lambda path: f"another machine {path}")
        elif meeting.rank == failing:
            patch.setattr(SharedMemory, "make" if failing == 0 else "open", fail)
        group = Ranks(meeting.rank, meeting.size, 1, meeting.rendezvous).tp_group
        parallel = open_tensor_parallel(group, torch.device("cpu"), "auto")
    return type(parallel), parallel.all_reduce(numbers(meeting.rank, (3, 5), torch.float32))


def test_all_ranks_take_gloo_if_one_cannot_share_memory(ranks):
    expected = expected_sum(4, (3, 5), torch.float32)
    for failing, is_elsewhere in ((0, False), (1, False), (3, False), (2, True), (None, False)):
        for way, result in ranks.run(4, ways, failing, is_elsewhere):
            assert way is (SharedMemoryRank if failing is None else GroupRank)
            assert torch.equal(result, expected)
