"""Recorded calls of the CPU's kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokasaurus.model.backend.cpu.calls import NotRecordable, Recording, result
from tokasaurus.model.backend.cpu.operators import CompiledOperators
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS

MAX_ROWS, SIZE = 40, 24


def layers(operators, x, weight):
    """A chain of kernels, whose first result is read again by the last."""
    kept = operators.rms_norm(x, weight, 1e-5)
    some = operators.silu_multiply(operators.rms_norm(kept, weight, 1e-5))
    for _ in range(5):
        some = operators.rms_norm(some, weight[: SIZE // 2], 1e-5)
    added = operators.silu_multiply(kept)
    return operators.add_rms_norm(some, added, weight[: SIZE // 2], 1e-5)


def test_a_recording_runs_for_any_number_of_rows():
    torch.manual_seed(0)
    operators, weight = CompiledOperators("auto"), torch.rand(SIZE) + 0.5
    recording = Recording(MAX_ROWS)
    x = recording.buffer(MAX_ROWS, SIZE, torch.float32)
    x.fill_(7)
    with recording:
        output = layers(operators, x, weight)
    assert (x == 7).all()  # nothing has run
    for num_rows in (1, 3, MAX_ROWS, 2):
        rows = torch.randn(num_rows, SIZE)
        x[:num_rows] = rows
        before = output.clone()
        recording.run(num_rows)
        expected = layers(REFERENCE_OPERATORS, rows, weight)
        torch.testing.assert_close(output[:num_rows], expected)
        assert torch.equal(output[num_rows:], before[num_rows:])


def test_a_buffer_is_used_again_when_no_tensor_needs_it():
    recording = Recording(MAX_ROWS)

    def address():
        return recording.buffer(MAX_ROWS, SIZE, torch.float32).data_ptr()

    first = address()
    assert address() == first
    held = recording.buffer(MAX_ROWS, SIZE, torch.float32)
    view = held[1:].view(-1)
    assert held.data_ptr() == first
    del held
    second = address()
    assert second != first
    del view
    assert {address(), address()} <= {first, second}
    large = recording.buffer(MAX_ROWS, 1 << 14, torch.float32)
    assert large.data_ptr() not in (first, second)


@pytest.mark.parametrize("is_inference", [False, True])
def test_what_would_not_be_repeated_cannot_be_recorded(is_inference):
    """The worker runs in inference mode, in which torch shows other operators."""
    with torch.inference_mode(is_inference):
        check_what_cannot_be_recorded()


def check_what_cannot_be_recorded():
    operators, x = CompiledOperators("auto"), torch.ones(MAX_ROWS, SIZE)
    for layer in (
        lambda: x + 1,
        lambda: x.t().contiguous(),
        lambda: x.t().reshape(-1),
        lambda: x.to(torch.bfloat16),
        lambda: x.zero_(),
        lambda: operators.rms_norm(x[:-1], x[0], 1e-5),
    ):
        with pytest.raises(NotRecordable), Recording(MAX_ROWS):
            layer()
        assert result(2, 3, torch.float32).shape == (2, 3)
        assert torch.equal(operators.rms_norm(x, x[0], 0.0), x)
    with Recording(MAX_ROWS):
        assert x.view(SIZE, MAX_ROWS)[1:].shape == (SIZE - 1, MAX_ROWS)
        assert x.reshape(SIZE, -1).to(torch.float32).contiguous().shape == (SIZE, MAX_ROWS)
        assert [part.shape for part in x.chunk(2, dim=1)] == [(MAX_ROWS, SIZE // 2)] * 2


def test_a_recording_does_not_load_the_compiler_of_torch():
    """That takes longer than the rest of an engine's warm-up."""
    program = (
        "import sys, torch\n"
        "from tokasaurus.model.backend.cpu.calls import Recording\n"
        "with Recording(2) as recording:\n"
        "    recording.buffer(2, 3, torch.float32).view(-1)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed == "False\n"
