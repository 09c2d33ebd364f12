"""The parts of ranks, put together, are the whole product. No rank reads another one's part."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from rows import named

from tokasaurus.model.layers.linear import Embedding, Linear
from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.sharded import share_of
from tokasaurus.model.parallel.tensor_parallel import dealt, ranges
from tokasaurus.model.placement import Placement

CPU = torch.device("cpu")
SIZES = (2, 4)


class Listening:
    """A rank without others: it keeps what it would tell them."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.told = []

    def all_reduce(self, x):
        self.told.append(x)
        return x

    def gather(self, x, sizes):
        assert x.shape[1] == sizes[self.rank]
        self.told.append(x)
        return x


def place_of(rank, size, linear, **fields):
    return Placement(torch.float32, CPU, linear, parallel=Listening(rank, size), **fields)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_units_are_dealt_in_order_and_shared_if_there_are_fewer_than_ranks():
    for count in range(1, 13):
        for size in range(1, 13):
            if count % size and size % count:
                with pytest.raises(ValueError, match="cannot be dealt"):
                    dealt(count, 0, size)
                continue
            shares = [list(dealt(count, rank, size)) for rank in range(size)]
            owners = [sum(unit in share for share in shares) for unit in range(count)]
            assert set(owners) == {max(size // count, 1)}
            in_order = [unit for share in shares for unit in share]
            assert in_order == sorted(in_order)
            # A rank has the key and value heads that its query heads read.
            for group in (1, 3) if count * 3 % size == 0 else ():
                for rank, share in enumerate(shares):
                    if count * group % size == 0:
                        queries = dealt(count * group, rank, size)
                        assert {query // group for query in queries} == set(share)


def test_ids_are_divided_into_ranges_of_about_one_length():
    for count, size in ((8, 4), (9, 4), (11, 4), (3, 3), (49152, 7)):
        found = ranges(count, size)
        assert [each for part in found for each in part] == list(range(count))
        assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_outputs_of_ranks_are_the_columns_of_each_part(linear):
    parts = {"query": 32, "key": 8, "value": 8}  # heads of 4
    weights = {part: numbers(size, 24, seed=size) for part, size in parts.items()}
    biases = {part: numbers(size, seed=size) for part, size in parts.items()}
    x = numbers(5, 24)
    for size in SIZES:
        found = {part: {} for part in parts}
        for rank in range(size):
            layer = Linear(
                place_of(rank, size, linear), 24, parts, Sharding.OUTPUTS, bias=True, unit=4
            )
            for part in reversed(parts):
                layer.fill(part, "weight", weights[part])
                layer.fill(part, "bias", biases[part])
            layer.finish()
            with torch.inference_mode():
                columns = layer(x)
            for part, count in parts.items():
                heads = dealt(count // 4, rank, size)
                own, columns = columns[:, : 4 * len(heads)], columns[:, 4 * len(heads) :]
                for number, head in enumerate(heads):
                    found[part][head] = own[:, 4 * number : 4 * number + 4]
            assert not columns.shape[1]
        for part, count in parts.items():
            whole = torch.cat([found[part][head] for head in range(count // 4)], 1)
            with named(f"{size} ranks, {part}"):
                expected = torch.nn.functional.linear(x, weights[part], biases[part])
                torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_results_of_ranks_that_have_columns_add_up(linear):
    weight, bias, x = numbers(7, 16), numbers(7), numbers(3, 16)
    for size in SIZES:
        total = torch.zeros(3, 7)
        for rank in range(size):
            place = place_of(rank, size, linear)
            layer = Linear(place, 16, {"": 7}, Sharding.INPUTS, bias=True, unit=4)
            layer.fill("", "weight", weight)
            layer.fill("", "bias", bias)
            layer.finish()
            columns = dealt(4, rank, size)
            with torch.inference_mode():
                layer(x[:, 4 * columns.start : 4 * columns.stop])
            total += place.parallel.told.pop()
        torch.testing.assert_close(total, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_ranges_of_a_vocabulary_give_all_logits_and_all_rows(linear):
    weight, x = numbers(11, 16), numbers(3, 16)
    ids = torch.tensor([0, 10, 5, 5, 2, 8])
    for size in SIZES:
        logits, rows = [], torch.zeros(6, 16)
        for rank in range(size):
            place = place_of(rank, size, linear)
            embedding = Embedding(place, 11, 16, multiplied=True)
            head = Linear(place, 16, {"": 11}, Sharding.VOCABULARY, tied=embedding)
            embedding.fill("", "weight", weight)
            embedding.finish()
            with torch.inference_mode():
                head(x)
                logits.append(place.parallel.told.pop())
                embedding(ids)
                rows += place.parallel.told.pop()
        torch.testing.assert_close(torch.cat(logits, 1), x @ weight.T)
        assert torch.equal(rows, weight[ids])


def test_a_share_is_the_right_fraction():
    for sharding in Sharding:
        parts = {"": 64} if sharding is Sharding.VOCABULARY else {"a": 64, "b": 32}
        spec = LinearSpec(48, parts, True, sharding, 4)
        for size in SIZES:
            total = sum(
                share.spec.in_size * share.spec.out_size
                for share in (share_of(spec, rank, size) for rank in range(size))
            )
            assert total == spec.in_size * spec.out_size


def pages_of(block, first, num_bytes):
    """Which pages of a mapping this process has touched."""
    base = torch.frombuffer(block, dtype=torch.uint8).data_ptr() + first
    first_page, last = base // mmap.PAGESIZE, (base + num_bytes) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first_page)
        entries = torch.frombuffer(bytearray(file.read(8 * (last - first_page))), dtype=torch.int64)
    return entries < 0  # the highest bit says that the page is there


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="needs Linux")
def test_a_rank_reads_its_part_of_a_file_alone(tmp_path):
    rows, columns = 4096, 2048
    num_bytes = 4 * rows * columns
    path = tmp_path / "weight"
    with path.open("wb") as file:
        file.truncate(num_bytes)
    for sharding in (Sharding.OUTPUTS, Sharding.VOCABULARY):
        for rank in range(4):
            with path.open("r+b") as file:
                block = mmap.mmap(file.fileno(), 0)
            block.madvise(mmap.MADV_RANDOM)  # the system maps no pages ahead
            weight = torch.frombuffer(block, dtype=torch.float32).view(rows, columns)
            layer = Linear(place_of(rank, 4, "plain"), columns, {"": rows}, sharding)
            layer.fill("", "weight", weight)
            touched = pages_of(block, 0, num_bytes).float().view(4, -1).mean(1)
            # Of the parts beside its own it may touch a huge page, a quarter of each.
            expected = torch.zeros(4)
            expected[rank] = 1
            with named(f"{sharding}, rank {rank}: {touched.tolist()}"):
                assert touched[rank] == 1
                assert (touched - expected).max() <= 0.25
