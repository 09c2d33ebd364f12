"""Products with e4m3 weights are those of a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows import named

from tokasaurus import LLM, SamplingParams
from tokasaurus.errors import ConfigError
from tokasaurus.model.float8 import E4M3, LARGEST, to_e4m3
from tokasaurus.model.layers.linear import Linear
from tokasaurus.model.linear_methods import fp8
from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.fp8 import Fp8Linear
from tokasaurus.model.linear_methods.registry import choose_linear
from tokasaurus.model.placement import Placement

CPU = torch.device("cpu")


def numbers_of_e4m3():
    """All that are not negative, by their definition."""
    fractions = [2.0**-6 * mantissa / 8 for mantissa in range(8)]
    powers = [2.0**exponent * (1 + m / 8) for exponent in range(-6, 9) for m in range(8)]
    return np.array([*fractions, *powers][:-1])  # the last one is NaN


def nearest(x):
    """The nearest number in e4m3; of two, the one whose last bit is 0."""
    numbers, magnitudes = numbers_of_e4m3(), np.abs(x).clip(max=LARGEST)
    above = np.searchsorted(numbers, magnitudes).clip(max=len(numbers) - 1)
    below = (above - 1).clip(min=0)
    up, down = numbers[above] - magnitudes, magnitudes - numbers[below]
    takes_below = (down < up) | ((down == up) & (below % 2 == 0))
    return np.copysign(np.where(takes_below, numbers[below], numbers[above]), x)


def expected_product(x, weight, bias):
    x, weight = x.double().numpy(), weight.double().numpy()
    x_scales, weight_scales = (
        np.maximum(np.abs(each).max(axis=1, keepdims=True), 1e-12).astype(np.float32)
        / np.float32(448)
        for each in (x, weight)
    )
    # The quotients are rounded to fp32 before they are rounded to e4m3.
    x_numbers = nearest((x.astype(np.float32) / x_scales).astype(np.float64))
    weight_numbers = nearest((weight.astype(np.float32) / weight_scales).astype(np.float64))
    result = x_numbers @ weight_numbers.T * x_scales * weight_scales.T
    return torch.from_numpy(result if bias is None else result + bias.double().numpy())


def make_linear(weight, bias=None, dtype=torch.float32, parts=1):
    out_size, in_size = weight.shape
    sizes = {str(number): out_size // parts for number in range(parts)}
    spec = LinearSpec(in_size, sizes, bias is not None, Sharding.OUTPUTS)
    linear = Fp8Linear(spec, Placement(dtype, CPU))
    fill(linear, spec, weight, bias)
    return linear, spec


def fill(linear, spec, weight, bias=None):
    for part in spec.parts:
        linear.fill(part, "weight", weight[spec.rows(part)])
        if bias is not None:
            linear.fill(part, "bias", bias[spec.rows(part)])
    linear.finish()


def test_rounding_is_to_the_nearest_number_and_never_beyond_the_largest():
    x = torch.cat((torch.randn(5000) * 300, torch.randn(5000) * 0.01, torch.zeros(1)))
    assert to_e4m3(x).double().tolist() == nearest(x.double().numpy()).tolist()
    ends = to_e4m3(torch.tensor([1e9, -1e9, torch.inf, 449.0, torch.nan])).float()
    assert ends[:4].tolist() == [448, -448, 448, 448]
    assert ends[4].isnan()


def test_products_are_those_of_the_definition(monkeypatch):
    torch.manual_seed(0)
    for block_size in (fp8._BLOCK_SIZE, 100):
        monkeypatch.setattr(fp8, "_BLOCK_SIZE", block_size)
        for out_size, in_size in ((1, 1), (6, 33), (64, 32), (66, 200)):
            for parts in (1, 2):
                if out_size % parts:
                    continue
                weight, bias = torch.randn(out_size, in_size), torch.randn(out_size)
                weight *= torch.rand(out_size, 1) * 10
                for count in (0, 1, 5, 70):
                    x = torch.randn(count, in_size) * torch.rand(count, 1) * 30
                    for each in (None, bias):
                        linear, _ = make_linear(weight, each, parts=parts)
                        expected = expected_product(x, weight, each) if count else x.new_empty(0)
                        found = linear.apply(x)
                        assert found.shape == (count, out_size)
                        scale = expected.abs().max() if count else 1
                        with named(f"{out_size}x{in_size}, {count} rows, {parts} parts"):
                            torch.testing.assert_close(
                                found.double().view(expected.shape) / scale,
                                expected.double() / scale,
                                rtol=0,
                                atol=2e-6,
                            )


def test_zeros_give_the_bias_and_a_row_with_nan_gives_nan_alone():
    linear, _ = make_linear(torch.randn(16, 32), torch.arange(16.0))
    x = torch.zeros(3, 32)
    x[1, 5] = torch.nan
    y = linear.apply(x)
    assert torch.equal(y[[0, 2]], torch.arange(16.0).expand(2, -1))
    assert y[1].isnan().all()


def test_results_have_the_dtype_of_the_model():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(8, 16)
        linear, _ = make_linear(weight, dtype=dtype)
        x = torch.randn(4, 16).to(dtype)
        y = linear.apply(x)
        assert y.dtype == dtype
        assert torch.allclose(y.float(), x.float() @ weight.T, atol=0.6)
        rows = linear.rows(torch.tensor([3, 0, 3]))
        assert rows.dtype == dtype
        assert torch.allclose(rows.float(), weight[[3, 0, 3]], rtol=0.07, atol=0.01)


def test_weights_can_be_released_and_filled_anew():
    torch.manual_seed(1)
    first, second = torch.randn(2, 8, 16)
    linear, spec = make_linear(first)
    x = torch.randn(3, 16)
    before = linear.apply(x)
    assert linear._weight.dtype == E4M3
    linear.release()
    linear.restore()
    fill(linear, spec, second)
    assert not torch.equal(linear.apply(x), before)
    fill(linear, spec, first)
    assert torch.equal(linear.apply(x), before)


def test_a_device_without_such_products_is_refused(monkeypatch):
    cuda = torch.device("cuda")
    place = Placement(torch.bfloat16, cuda, quantization="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"quantization=fp8 cannot run here: .* need 8\.9"):
        choose_linear(place)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_linear(place).linear == "plain"
    with pytest.raises(ConfigError, match="set dtype=bfloat16"):
        choose_linear(Placement(torch.float16, cuda, quantization="fp8"))


@pytest.mark.engine
def test_the_bundled_model_answers_nearly_the_same():
    """Its embedding and head keep the dtype, and its layers do not."""
    prompt = "Once upon a time"
    params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=1)
    logprobs = {}
    for quantization in (None, "fp8"):
        with LLM(device="cpu", dtype="float32", quantization=quantization) as llm:
            if quantization is not None:
                model = llm._engine._worker._model
                methods = [each.method for each in model.modules() if isinstance(each, Linear)]
                assert sum(isinstance(each, Fp8Linear) for each in methods) >= 4
                assert not isinstance(model.head.method, Fp8Linear)
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        logprobs[quantization] = output.outputs[0].cumulative_logprob
    assert logprobs["fp8"] != logprobs[None]
    assert abs(logprobs["fp8"] - logprobs[None]) < 3
