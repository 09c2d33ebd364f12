"""Every linear method multiplies by the weights that it was filled with."""

from __future__ import annotations

import pytest
import torch
from rows import named

from tokasaurus.errors import ConfigError
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.model.layers.linear import Embedding, Linear
from tokasaurus.model.linear_methods import panels
from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.registry import choose_linear
from tokasaurus.model.placement import Placement

CPU = torch.device("cpu")
PARTS = {"query": 24, "key": 8, "value": 8}
METHODS = ("plain", "packed")


def make_tensors(seed, *, bias=True):
    generator = torch.Generator().manual_seed(seed)
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        (part, kind): torch.randn((size, 16) if kind == "weight" else (size,), generator=generator)
        for part, size in PARTS.items()
        for kind in kinds
    }


def fill(linear, tensors):
    # In another order than that of the outputs.
    for (part, kind), tensor in reversed(tensors.items()):
        linear.fill(part, kind, tensor)
    linear.finish()


def expected_product(x, tensors):
    weight = torch.cat([tensors[part, "weight"] for part in PARTS])
    bias = torch.cat([tensors[part, "bias"] for part in PARTS]) if len(tensors) > 3 else None
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_joined_in_the_order_of_the_declaration(method):
    for bias in (True, False):
        linear = Linear(
            Placement(torch.float32, CPU, method), 16, PARTS, Sharding.OUTPUTS, bias=bias
        )
        tensors = make_tensors(1, bias=bias)
        assert linear.tensors() == {key: tuple(t.shape) for key, t in tensors.items()}
        fill(linear, tensors)
        for num_rows in (0, 1, 2, 33):
            x = torch.randn(num_rows, 16)
            with named(f"bias {bias}, {num_rows} rows"), torch.inference_mode():
                torch.testing.assert_close(linear(x), expected_product(x, tensors))


@pytest.mark.parametrize("method", METHODS)
def test_weights_can_be_replaced(method):
    linear = Linear(Placement(torch.float32, CPU, method), 16, PARTS, Sharding.OUTPUTS, bias=True)
    x = torch.randn(5, 16)
    for seed in (1, 2):
        tensors = make_tensors(seed)
        fill(linear, tensors)
        with torch.inference_mode():
            torch.testing.assert_close(linear(x), expected_product(x, tensors))


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_product_uses_the_weight_of_the_embedding(method):
    place = Placement(torch.float32, CPU, method)
    embedding = Embedding(place, 40, 16, multiplied=True)
    head = Linear(place, 16, {"": 40}, Sharding.VOCABULARY, tied=embedding)
    assert head.tensors() == {}
    for seed in (1, 2):
        weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
        embedding.fill("", "weight", weight)
        head.finish()
        x = torch.randn(3, 16)
        with torch.inference_mode():
            torch.testing.assert_close(head(x), torch.nn.functional.linear(x, weight))
            ids = torch.tensor([0, 39, 7, 7])
            assert torch.equal(embedding(ids), weight[ids])


def test_rows_are_those_that_were_filled_block_by_block(monkeypatch):
    """Parts and blocks that begin within a panel, of tensors that are converted."""
    monkeypatch.setattr(panels, "_BLOCK_SIZE", 700)
    generator = torch.Generator().manual_seed(0)
    for instructions in usable_sets():
        for dtype in (torch.float32, torch.bfloat16):
            for in_size in (1, 31, 64, 97):
                place = Placement(dtype, CPU, "packed", instruction_set=instructions.name)
                sizes = {"a": 19, "b": 1, "c": 75}
                linear = Linear(place, in_size, sizes, Sharding.OUTPUTS)
                tensors = {
                    part: torch.randn(size, in_size, dtype=torch.float64, generator=generator)
                    for part, size in sizes.items()
                }
                for part, tensor in reversed(tensors.items()):
                    linear.fill(part, "weight", tensor)
                whole = torch.cat(list(tensors.values())).to(dtype)
                ids = torch.randperm(len(whole), generator=generator)
                with named(f"{instructions.name}, {dtype}, {in_size} columns"):
                    assert torch.equal(linear.method.rows(ids), whole[ids])
                    assert torch.equal(linear.method.rows(ids[:3]), whole[ids[:3]])


def test_tensors_are_converted_to_the_placement():
    for method in METHODS:
        for dtype in (torch.bfloat16, torch.float16):
            place = Placement(dtype, CPU, method)
            try:
                choose_linear(place)
            except ConfigError:  # this processor cannot pack it, and an engine would refuse it
                continue
            linear = Linear(place, 16, PARTS, Sharding.OUTPUTS, bias=True)
            tensors = make_tensors(3)
            fill(linear, tensors)
            narrow = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            x = torch.randn(4, 16).to(dtype)
            with named(f"{method}, {dtype}"), torch.inference_mode():
                assert linear(x).dtype == dtype
                torch.testing.assert_close(linear(x), expected_product(x, narrow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_products_of_every_shape_match_float64(dtype):
    """Sizes that do not fill a panel, a chunk, a block of rows or a tile."""
    for instructions in usable_sets():
        with named(instructions.name):
            check_products(Placement(dtype, CPU, "packed", instruction_set=instructions.name))


def check_products(place):
    dtype, generator = place.dtype, torch.Generator().manual_seed(0)
    for in_size, out_size in ((1, 1), (7, 33), (32, 32), (40, 31), (65, 200), (576, 96)):
        linear = Linear(place, in_size, {"": out_size}, Sharding.OUTPUTS, bias=True)
        weight = torch.randn(out_size, in_size, generator=generator).to(dtype)
        bias = torch.randn(out_size, generator=generator).to(dtype)
        linear.fill("", "weight", weight)
        linear.fill("", "bias", bias)
        linear.finish()
        for num_rows in (0, 1, 2, 3, 5, 6, 7, 12, 13, 16, 17, 31, 32, 33, 70):
            x = torch.randn(num_rows, in_size + 3, generator=generator).to(dtype)[:, :in_size]
            expected = x.double() @ weight.double().T + bias.double()
            with named(f"{in_size} to {out_size}, {num_rows} rows"), torch.inference_mode():
                tolerance = 1e-5 if dtype is torch.float32 else 1e-2
                torch.testing.assert_close(
                    linear(x).double(), expected, atol=tolerance * in_size**0.5, rtol=tolerance
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_products_of_a_row_do_not_depend_on_the_other_rows(dtype):
    for instructions in usable_sets():
        with named(instructions.name):
            check_independence(Placement(dtype, CPU, "packed", instruction_set=instructions.name))


def check_independence(place):
    dtype = place.dtype
    # Of the last size, 100 rows are more than the loops over panels take at a time.
    for in_size, out_size in ((576, 96), (33, 70), (9000, 33)):
        linear = Linear(place, in_size, {"": out_size}, Sharding.OUTPUTS)
        linear.fill("", "weight", torch.randn(out_size, in_size))
        linear.finish()
        x = torch.randn(100, in_size).to(dtype)
        with torch.inference_mode():
            whole = linear(x)
            for num_rows in (1, 2, 3, 4, 6, 8, 13, 16, 17, 33, 64):
                for start in (0, 5, 100 - num_rows):
                    alone = linear(x[start : start + num_rows])
                    assert torch.equal(alone, whole[start : start + num_rows]), (num_rows, start)


def test_packing_is_refused_on_another_device():
    with pytest.raises(ConfigError, match="linear=packed cannot run here: it is for device=cpu"):
        choose_linear(Placement(torch.float32, torch.device("meta"), "packed"))


def test_auto_packs_what_the_kernel_can_multiply(caplog):
    def chosen(dtype, device="cpu"):
        return choose_linear(Placement(dtype, torch.device(device), "auto")).linear

    assert chosen(torch.float32) == chosen(torch.bfloat16) == "packed"
    assert chosen(torch.float32, "meta") == "plain"
    assert caplog.text == ""
    assert chosen(torch.float16) == "plain"
    assert "linear=packed cannot run" in caplog.text


def test_the_rows_of_parts_cover_the_outputs():
    spec = LinearSpec(16, PARTS, False, Sharding.OUTPUTS)
    assert spec.out_size == 40
    assert [spec.rows(part) for part in PARTS] == [slice(0, 24), slice(24, 32), slice(32, 40)]
