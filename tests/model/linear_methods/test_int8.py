"""Products with int8 weights are those of a few lines of torch, to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rows import named
from safetensors.torch import load_file
from worker_driver import generate, make_driver

from tokasaurus import LLM, SamplingParams
from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import ConfigError
from tokasaurus.model import instruction_sets
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.model.layers.linear import Embedding, Linear
from tokasaurus.model.linear_methods import int8, panels
from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.int8 import Int8Linear
from tokasaurus.model.linear_methods.opaque import OpaqueLinear
from tokasaurus.model.linear_methods.packed import PackedLinear
from tokasaurus.model.linear_methods.registry import choose_linear
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import fill_all
from tokasaurus.protocol.commands import ReleaseMemory, RestoreMemory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# Sizes that do not fill a chunk of the inputs, a panel of the outputs, or either.
SHAPES = ((1, 1), (7, 33), (64, 32), (65, 200), (130, 31), (576, 96))
NUM_ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 31, 32, 33, 70)


@pytest.fixture(params=["with extensions", "without extensions"])
def extensions(request, monkeypatch):
    """Sets as they are on this processor, and on one that has no more than the set asks for."""
    if request.param == "without extensions":
        features = {feature for each in usable_sets() for feature in each.features}
        monkeypatch.setattr(instruction_sets, "_processor_features", lambda: frozenset(features))
    int8._library.cache_clear()
    yield
    int8._library.cache_clear()


def placed(instructions, dtype=torch.float32):
    return Placement(dtype, CPU, instruction_set=instructions.name)


def quantized(rows):
    """The integers and the scales of each row."""
    rows = rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, torch.zeros(()))
    return (rows * inverse).round(), largest / 127


def expected_product(x, weight, bias):
    x_integers, x_scales = quantized(x)
    weight_integers, weight_scales = quantized(weight)
    sums = (x_integers.double() @ weight_integers.double().T).float()  # exact
    result = sums * x_scales * weight_scales.T
    return (result if bias is None else result + bias.float()).to(x.dtype)


def make_linear(place, weight, bias=None):
    out_size, in_size = weight.shape
    linear = Int8Linear(
        LinearSpec(in_size, {"": out_size}, bias is not None, Sharding.OUTPUTS), place
    )
    linear.fill("", "weight", weight)
    if bias is not None:
        linear.fill("", "bias", bias)
    linear.finish()
    return linear


def test_products_of_every_shape_are_exact_with_every_instruction_set(extensions):
    for instructions in usable_sets():
        for dtype in DTYPES:
            for has_bias in (False, True):
                with named(f"{instructions.name}, {dtype}, bias {has_bias}"):
                    check_products(placed(instructions, dtype), has_bias)


def check_products(place, has_bias):
    generator = torch.Generator().manual_seed(0)
    for in_size, out_size in SHAPES:
        weight = torch.randn(out_size, in_size, generator=generator)
        bias = torch.randn(out_size, generator=generator).to(place.dtype) if has_bias else None
        linear = make_linear(place, weight, bias)
        for num_rows in NUM_ROWS:
            # Rows of a wider tensor.
            x = torch.randn(num_rows, in_size + 3, generator=generator)
            x = x.to(place.dtype)[:, 1 : in_size + 1]
            with named(f"{in_size} to {out_size}, {num_rows} rows"):
                assert torch.equal(linear.apply(x), expected_product(x, weight, bias))


def test_sums_do_not_saturate(extensions):
    """All numbers have the largest magnitude, and pairs of products have one sign."""
    for instructions in usable_sets():
        for x_sign, weight_sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            x, weight = x_sign * torch.ones(17, 1536), weight_sign * torch.ones(33, 1536)
            linear = make_linear(placed(instructions), weight)
            with named(f"{instructions.name}, {x_sign} times {weight_sign}"):
                assert torch.equal(linear.apply(x), expected_product(x, weight, None))


def test_results_do_not_depend_on_other_rows_or_threads(extensions):
    threads = torch.get_num_threads()
    for instructions in usable_sets():
        for dtype in DTYPES:
            for in_size, out_size in ((576, 960), (33, 3000)):
                linear = make_linear(placed(instructions, dtype), torch.randn(out_size, in_size))
                x = torch.randn(100, in_size).to(dtype)
                whole = linear.apply(x)
                try:
                    for num_threads in (1, 2, 3):
                        torch.set_num_threads(num_threads)
                        for num_rows in (1, 2, 3, 6, 13, 16, 17, 33, 64):
                            for start in (0, 5, 100 - num_rows):
                                alone = linear.apply(x[start : start + num_rows])
                                same = torch.equal(alone, whole[start : start + num_rows])
                                assert same, (instructions.name, num_threads, num_rows, start)
                finally:
                    torch.set_num_threads(threads)


def test_more_rows_than_the_cache_holds_are_multiplied_part_by_part(extensions):
    """A megabyte of x is 29 to 116 of these rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 9000, generator=generator)
    x = torch.randn(200, 9000, generator=generator)
    for instructions in usable_sets():
        result = make_linear(placed(instructions), weight).apply(x)
        assert torch.equal(result, expected_product(x, weight, None)), instructions.name


def test_rows_that_have_no_scale(extensions):
    """Zeros give zeros; rows with NaN or inf give NaN; neighbours are not affected."""
    weight, bias = torch.randn(40, 70), torch.randn(40)
    for instructions in usable_sets():
        for dtype in DTYPES:
            linear = make_linear(placed(instructions, dtype), weight, bias)
            x = torch.randn(6, 70).to(dtype)
            expected = linear.apply(x)
            x[1], x[2, 3], x[3, 69], x[4] = 0, torch.nan, -torch.inf, 1e-40
            result = linear.apply(x)
            with named(f"{instructions.name}, {dtype}"):
                for row in (0, 5):
                    assert torch.equal(result[row], expected[row])
                for row in (1, 4):
                    assert torch.equal(result[row], bias.to(dtype))
                assert result[2:4].isnan().all()
            weight_with_nan = weight.clone()
            weight_with_nan[7, 0] = torch.nan
            result = make_linear(placed(instructions, dtype), weight_with_nan).apply(x[:1])
            assert result.isnan().nonzero().tolist() == [[0, 7]]


def test_tiny_results_are_not_flushed_to_zero(extensions):
    """Below 2^-126, which some instructions do not write."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 64, generator=generator) * 1e-18
    x = (torch.randn(40, 64, generator=generator) * 1e-20).to(torch.bfloat16)
    expected = expected_product(x, weight, None)
    assert ((expected != 0) & (expected.abs() < 2.0**-126)).any()
    for instructions in usable_sets():
        result = make_linear(placed(instructions, torch.bfloat16), weight).apply(x)
        assert torch.equal(result, expected), instructions.name


def test_parts_are_packed_block_by_block(extensions, monkeypatch):
    """Parts and blocks that begin within a panel, of tensors that are converted."""
    monkeypatch.setattr(panels, "_BLOCK_SIZE", 700)
    generator = torch.Generator().manual_seed(0)
    for instructions in usable_sets():
        for in_size in (1, 31, 64, 97):
            sizes = {"a": 19, "b": 1, "c": 75}
            linear = Int8Linear(
                LinearSpec(in_size, sizes, False, Sharding.OUTPUTS), placed(instructions)
            )
            tensors = {
                part: torch.randn(size, in_size, generator=generator).to(torch.bfloat16)
                for part, size in sizes.items()
            }
            for part, tensor in reversed(tensors.items()):
                linear.fill(part, "weight", tensor)
            whole = torch.cat(list(tensors.values()))
            x = torch.randn(4, in_size, generator=generator)
            with named(f"{instructions.name}, {in_size} columns"):
                assert torch.equal(linear.apply(x), expected_product(x, whole, None))
                integers, scales = quantized(whole)
                ids = torch.randperm(len(whole), generator=generator)
                assert torch.equal(linear.rows(ids), (integers * scales)[ids])


def test_a_weight_takes_the_planned_bytes():
    """A byte for each number, and 8 bytes for each row; see ``Memory``."""
    linear = make_linear(Placement(torch.bfloat16, CPU), torch.randn(96, 128))
    assert sum(tensor.nbytes for tensor in linear._tensors()) == 96 * 128 + 8 * 96


def test_only_the_products_of_layers_are_quantized():
    for linear in ("auto", "packed"):
        place = choose_linear(Placement(torch.float32, CPU, linear, quantization="int8"))
        product = Linear(place, 16, {"": 24}, Sharding.OUTPUTS)
        embedding = Embedding(place, 40, 16, multiplied=True)
        head = Linear(place, 16, {"": 40}, Sharding.VOCABULARY)
        assert isinstance(product.method, Int8Linear)
        assert isinstance(embedding.method, PackedLinear)
        assert isinstance(head.method, PackedLinear)


def test_a_traced_product_is_opaque():
    place = Placement(torch.float32, CPU, "auto", quantization="int8", is_traced=True)
    product = Linear(choose_linear(place), 16, {"": 24}, Sharding.OUTPUTS)
    assert isinstance(product.method, OpaqueLinear)
    weight, x = torch.randn(24, 16), torch.randn(3, 16)
    product.fill("", "weight", weight)
    product.finish()
    assert torch.equal(product(x), expected_product(x, weight, None))


def test_what_cannot_be_quantized_is_refused():
    for place, reason in (
        (Placement(torch.float32, torch.device("meta"), "auto"), "it is for device=cpu"),
        (Placement(torch.float16, CPU, "auto"), "it is for fp32 and bf16, not for torch.float16"),
        (Placement(torch.float32, CPU, "plain"), "linear=plain multiplies by weights in dtype"),
    ):
        with pytest.raises(ConfigError) as caught:
            choose_linear(replace(place, quantization="int8"))
        message = f"quantization=int8 cannot run here: {reason}; leave it out"
        assert str(caught.value) == message


# --- the whole model ------------------------------------------------------------------------------


def hidden_of(driver, prompt):
    """Hidden states of a prompt after the last norm."""
    seen = []
    runner = driver.worker._runner
    run = runner.run
    runner.run = lambda planned: seen.append(run(planned).clone()) or seen[-1]
    generate(driver, prompt, 1)
    return torch.cat(seen)[: len(prompt)]


def test_a_quantized_model_is_close_to_the_model(checkpoint):
    prompt = list(range(100, 140))
    paths = {"the bundled model": MODEL_DIR}
    for architecture in ("llama", "qwen2", "qwen3"):
        for tied in (True, False):
            paths[f"{architecture}, tied {tied}"] = checkpoint(architecture, tied=tied)
    for name, path in paths.items():
        drivers = [make_driver(path, quantization=each) for each in (None, "int8")]
        expected, found = (hidden_of(driver, prompt) for driver in drivers)
        similarity = torch.cosine_similarity(found, expected, dim=1)
        with named(name):
            assert not torch.equal(found, expected)
            assert similarity.mean() > 0.99
            assert similarity.min() > 0.98
            assert drivers[1].worker._runner._recorded is not None


def test_other_weights_give_what_a_fresh_worker_gives(checkpoint):
    paths = [checkpoint("qwen2", seed=seed) for seed in (1, 2)]
    expected = [generate(make_driver(path, quantization="int8"), [5, 6, 7], 8) for path in paths]
    assert expected[0] != expected[1]
    driver = make_driver(paths[0], quantization="int8")
    assert generate(driver, [5, 6, 7], 8, slot=0) == expected[0]
    for slot, number in ((1, 1), (2, 0)):
        tensors = load_file(paths[number] / "model.safetensors")
        fill_all(driver.worker.weights, reversed(tensors.items()), "the stream")
        driver.worker._runner.addresses_changed()
        assert generate(driver, [5, 6, 7], 8, slot=slot) == expected[number]


def test_random_weights_are_quantized(checkpoint):
    driver = make_driver(checkpoint("llama"), load_format="dummy", quantization="int8")
    assert len(generate(driver, [5, 6, 7], 8)[0]) == 8


def test_a_traced_model_is_close_to_the_recorded_one(checkpoint):
    """Its norms and activations differ in their last bits, so that some numbers round otherwise."""
    path, prompt = checkpoint("llama", tied=True), list(range(3, 43))
    tracing = {"torch_compile": True, "torch_compile_config": json.dumps({"backend": "eager"})}
    expected = hidden_of(make_driver(path, quantization="int8"), prompt)
    found = hidden_of(make_driver(path, quantization="int8", **tracing), prompt)
    assert torch.cosine_similarity(found, expected, dim=1).min() > 0.99


def test_the_engine_generates_with_quantized_weights():
    params = SamplingParams(temperature=0.0, max_tokens=6)
    with LLM(quantization="int8", kv_cache_num_tokens=1024) as llm:
        (output,) = llm.generate(["A B C D A B C D A B"], params, use_tqdm=False)
    assert output.outputs[0].text == " C D A B C D"


def test_memory_is_released_and_restored_with_the_same_weights(checkpoint):
    driver = make_driver(checkpoint("qwen2"), quantization="int8")
    expected = generate(driver, [5, 6, 7], 8)
    driver.control(ReleaseMemory(weights=True, kv_cache=True))
    driver.control(RestoreMemory(weights=True, kv_cache=True))
    assert generate(driver, [5, 6, 7], 8) == expected
