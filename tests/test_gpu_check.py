"""The logic of ``make gpu-check``, with the CPU in the place of the GPU."""

from __future__ import annotations

import stat
from dataclasses import replace

import gpu_check
import gpu_kernels
import gpu_parity
import gpu_speed
import pytest
import torch
from checkpoints import make_checkpoint
from engine_process import eventually

from tokasaurus.bench.peers.checkpoint import SHAPES
from tokasaurus.bench.peers.loads import Rates, bound_s
from tokasaurus.bench.peers.workloads import Request
from tokasaurus.model.backend.cpu.compiled import CompiledAttention
from tokasaurus.model.backend.cpu.sampling import CompiledSampling

pytestmark = [pytest.mark.engine, pytest.mark.processes]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models that differ."""
    directory = tmp_path_factory.mktemp("models")
    return [make_checkpoint(directory / str(seed), "llama", seed=seed) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(gpu_parity, "_NUM_PROMPTS", 2)
    monkeypatch.setattr(gpu_parity, "_NUM_TOKENS", 12)


def test_a_device_that_computes_the_same_passes(checkpoints, capsys, monkeypatch):
    _, groups, *_ = gpu_parity._options("cpu", compiles=False)
    monkeypatch.setattr(gpu_parity, "_options", lambda *_: [groups])
    same, _ = checkpoints
    assert gpu_parity.check("cpu", same, same, compiles=False) == []
    lines = capsys.readouterr().out.splitlines()
    for what in (
        "attention=compiled, prefixes read once",
        "attention=reference, prefixes read once",
    ):
        assert f" {what}" in lines
    assert len([line for line in lines if "bfloat16: logprobs differ" in line]) == 2


def test_options_of_a_gpu_are_tried_on_a_gpu():
    groups = list(gpu_parity._groups("cuda", compiles=True))
    assert [option.name for _, options in groups for option in options] == [
        "as usual",
        "prefixes read once",
        "torch_compile=T",
        "use_cudagraphs=F",
        "quantization=fp8",
        "kv_cache_dtype=fp8",
    ]


@pytest.mark.long
def test_eight_bits_are_compared_with_eight_bits(checkpoints, capsys):
    same, other = checkpoints
    for flags in gpu_parity._EIGHT_BITS:
        option = gpu_parity.Option("fp8", {}, is_of_attention=True, in_float32=False)
        for checkpoint, is_same in ((same, True), (other, False)):
            with gpu_parity._expecting("cpu", checkpoint, same, flags) as check:
                failures = gpu_parity._check_options(check, [option])
            assert (failures == []) == is_same, (flags, failures)
    # A KV cache in e4m3 is for the reference alone, on a CPU.
    printed = capsys.readouterr().out
    assert printed.count("attention=compiled, fp8") == 2
    assert printed.count("attention=reference, fp8") == 4


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_SHAPES", gpu_kernels._SHAPES[:3])
    monkeypatch.setattr(gpu_kernels, "_VOCABULARIES", gpu_kernels._VOCABULARIES[:3])


def test_kernels_that_compute_the_same_pass(few_shapes, capsys):
    """And so tells each dtype of each backend but the reference."""
    assert gpu_kernels.check_kernels("cpu") == []
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
    found = "\n".join(gpu_kernels.check_kernels("cpu"))
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"compiled, attention in {dtype}: batch" in found
    assert "drawn tokens differ" in found
    for right in ("operators", "rankings", "sums"):
        assert right not in found


def test_a_device_that_computes_something_else_fails_in_both_dtypes(checkpoints, monkeypatch):
    monkeypatch.setattr(
        gpu_parity, "_options", lambda *_: [gpu_parity.Option("as usual", {}, is_of_attention=True)]
    )
    one, other = checkpoints
    failures = "\n".join(gpu_parity.check("cpu", one, other, compiles=False))
    for part in (
        "attention=compiled, as usual: in float32, greedy tokens differ",
        "attention=reference, as usual: in float32, greedy tokens differ",
        "in float32, logprobs differ",
        "in bfloat16, logprobs differ",
        "in bfloat16, on average, logprobs differ",
        "in bfloat16, a greedy token is",
    ):
        assert part in failures, failures


def test_without_cuda_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_loads_run_in_the_processes_of_an_engine(capsys):
    assert gpu_check.main(["device=cpu", "size=tiny", "parts=speed"]) == 0
    printed = capsys.readouterr().out
    for name in ("repeated, groups", "repeated, no groups", "chat"):
        assert f"{name}: tokens/s" in printed
        assert f"{name}: share of the roofline" in printed
        assert f"{name}: manager's time for a batch" in printed
    # Rates have gates on a GPU only. Nothing may be compiled late, anywhere.
    assert ">=" not in printed
    assert printed.count("passed") == 3


def dense_work(shape, width, requests, shares):
    """Operations and bytes, step by step: all sequences begin together."""
    heads = shape.num_heads * shape.head_dim
    kv_heads = shape.num_kv_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layer = hidden * (2 * heads + 2 * kv_heads + 3 * inner)
    head = hidden * shape.vocab_size
    flops = num_bytes = 0
    for request in requests:
        prompt, n = len(request.prompt), request.n
        for position in range(prompt):
            flops += shape.num_layers * (2 * layer + 4 * heads * (position + 1))
        flops += n * 2 * head  # all samples draw behind the prompt
        for step in range(1, request.max_tokens):
            context = prompt + step
            flops += n * (shape.num_layers * (2 * layer + 4 * heads * context) + 2 * head)
            read = n * step + (prompt if shares else n * prompt)
            num_bytes += read * shape.kv_bytes(width)
    steps = max(request.max_tokens for request in requests)
    return flops, num_bytes + steps * (shape.num_layers * layer + head) * width


def test_the_roofline_is_the_work_of_all_steps():
    shape = replace(SHAPES["tiny"], num_kv_heads=1)
    requests = [Request([5] * 30, 7, n=4), Request([6] * 11, 9, n=1)]
    for width in (2, 4):
        for shares in (True, False):
            flops, num_bytes = dense_work(shape, width, requests, shares)
            work = Rates(1.0, 1e30), Rates(1e30, 1.0)
            found = [bound_s(shape, width, requests, 100, rates, shares=shares) for rates in work]
            assert found == pytest.approx([flops, num_bytes], rel=1e-3)
    alone = bound_s(shape, 4, requests, 1, Rates(1e30, 1.0), shares=True)
    assert alone > 3 * num_bytes / 2, "fewer sequences at a time take more steps"


def test_repeated_sampling_on_an_h200_could_come_to_this():
    """The goal of 60% of the roofline is 137,000 tokens/s."""
    size, shape = gpu_speed.SIZES["full"], SHAPES["llama-1b"]
    requests = gpu_speed._repeated(size, shape)
    tokens = sum(each.n * each.max_tokens for each in requests)
    rates = Rates(790e12, 4.3e12)
    bound = bound_s(shape, 2, requests, size.max_seqs, rates, shares=True)
    assert tokens == 8192 * 256
    assert 0.6 * tokens / bound == pytest.approx(137_000, rel=0.03)


GOOD = gpu_speed.Speed("repeated, groups", 150_000, 0.65, 0.01, 500, 300, 0)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"tokens_per_s": 119_999}, "tokens/s"),
        ({"roofline": 0.59}, "share of the roofline"),
        ({"idle": 0.03}, "idle"),
        ({"num_recompiles": 1}, "recompiles"),
        ({"name": "chat", "tokens_per_s": 10, "idle": 0.5}, None),
    ],
)
def test_each_gate_can_fail(change, failed):
    speed = replace(GOOD, **change)
    lines = list(gpu_check._lines(speed, has_gates=True))
    verdicts = {each.what.split(": ")[1]: each.verdict for each in lines}
    assert [what for what, verdict in verdicts.items() if verdict == "FAILED"] == (
        [failed] if failed else []
    )
    without = list(gpu_check._lines(replace(speed, num_recompiles=0), has_gates=False))
    assert all(each.passed for each in without)


def test_a_gate_that_fails_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "check_kernels", lambda device: ["one differs"])
    assert gpu_check.main(["device=cpu", "parts=kernels"]) == 1
    printed = capsys.readouterr()
    assert "FAILED: one differs" in printed.err
    assert "1 differences" in printed.out


def test_nvidia_smi_says_how_long_kernels_ran(tmp_path, monkeypatch):
    program, told = tmp_path / "nvidia-smi", tmp_path / "told"
    program.write_text(
        "#!/bin/sh\nfor i in 0 90 98 97 99 96 95 98 97 2; do echo $i; done\n"
        f": > {told}\nexec sleep 30\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with gpu_speed._busy_shares("cuda") as shares:
        eventually(told.exists, "ten shares")
    assert shares == [0.9, 0.98, 0.97, 0.99, 0.96, 0.95, 0.98, 0.97]
    with gpu_speed._busy_shares("cpu") as shares:
        pass
    assert shares == []
