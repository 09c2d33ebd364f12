"""The logic of ``make gpu-check``, with the CPU in the place of the GPU."""

from __future__ import annotations

import gpu_check
import gpu_kernels
import pytest
import torch
from checkpoints import make_checkpoint

from tokasaurus.model.backend.cpu.compiled import CompiledAttention
from tokasaurus.model.backend.cpu.sampling import CompiledSampling

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models that differ."""
    directory = tmp_path_factory.mktemp("models")
    return [make_checkpoint(directory / str(seed), "llama", seed=seed) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(gpu_check, "_NUM_PROMPTS", 2)
    monkeypatch.setattr(gpu_check, "_NUM_TOKENS", 12)
    monkeypatch.setattr(gpu_check, "_BATCH", 4)
    monkeypatch.setattr(gpu_check, "_BATCH_TOKENS", 4)


def test_a_device_that_computes_the_same_passes(checkpoints, capsys):
    same, _ = checkpoints
    assert gpu_check.check("cpu", same, same) == []
    assert "tokens/s with 4 sequences" in capsys.readouterr().out


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_SHAPES", gpu_kernels._SHAPES[:3])
    monkeypatch.setattr(gpu_kernels, "_VOCABULARIES", gpu_kernels._VOCABULARIES[:3])


def test_kernels_that_compute_the_same_pass(few_shapes, capsys):
    """And so tells each dtype of each backend but the reference."""
    assert gpu_check.check_kernels("cpu") == []
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "compiled, attention in" in line]) == 3
    assert len([line for line in lines if "compiled, operators in" in line]) == 3
    assert "  compiled: 0 of 540 drawn tokens differ from the CPU's" in lines


def test_kernels_that_compute_something_else_fail(few_shapes, monkeypatch):
    attend = CompiledAttention.attend
    monkeypatch.setattr(
        CompiledAttention, "attend", lambda *arguments: attend(*arguments) * torch.nan
    )
    monkeypatch.setattr(CompiledSampling, "draw", lambda _, logits, draws: logits.argmax(-1))
    found = "\n".join(gpu_check.check_kernels("cpu"))
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"compiled, attention in {dtype}: batch" in found
    assert "drawn tokens differ" in found
    for right in ("operators", "rankings", "sums"):
        assert right not in found


def test_a_device_that_computes_something_else_fails_in_both_dtypes(checkpoints):
    one, other = checkpoints
    failures = "\n".join(gpu_check.check("cpu", one, other))
    for part in (
        "attention=compiled: in float32, greedy tokens differ",
        "attention=reference: in float32, greedy tokens differ",
        "in float32, logprobs differ",
        "in bfloat16, logprobs differ",
        "in bfloat16, on average, logprobs differ",
        "in bfloat16, a greedy token is",
    ):
        assert part in failures, failures


def test_without_cuda_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
