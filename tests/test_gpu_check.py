"""The logic of ``make gpu-check``, with the CPU in the place of the GPU."""

from __future__ import annotations

import os
import re
import signal
import stat
import warnings
from dataclasses import replace

import gpu_check
import gpu_kernels
import gpu_parity
import gpu_settled
import gpu_speed
import pytest
import torch
from checkpoints import make_checkpoint
from engine_process import eventually
from gpu_job_samples import aborts, hangs, refuses, sums
from gpu_jobs import Job, run_here, run_in_processes

from tokasaurus import LLM
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
def own_handler():
    """The program sets one, which would be there for the tests after these."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(gpu_parity, "_NUM_PROMPTS", 2)
    monkeypatch.setattr(gpu_parity, "_NUM_TOKENS", 12)


def found(one, other, group="", options=None, monkeypatch=None):
    """The findings of a CPU that is compared with a CPU, by case."""
    if monkeypatch is not None:
        monkeypatch.setattr(gpu_parity, "_groups", lambda _: (group,))
        monkeypatch.setattr(gpu_parity, "_options", lambda *_: options)
    parity = gpu_parity.Parity("cpu", one, other, compiles=False)
    outcomes = {job.name: outcome for job, outcome in run_here(parity.jobs())}
    judged = {job.name: outcome for job, outcome in run_here(parity.judging(outcomes))}
    return {each.name: each for each in parity.findings(judged)}


def test_a_device_that_computes_the_same_passes(checkpoints, monkeypatch):
    _, groups = gpu_parity._options("cpu", "", compiles=False)
    same, _ = checkpoints
    findings = found(same, same, "", [groups], monkeypatch)
    assert list(findings) == [
        f"attention={name}, prefixes read once, {dtype}"
        for name in ("compiled", "reference")
        for dtype in ("float32", "bfloat16")
    ]
    for each in findings.values():
        assert (each.failures, each.not_run) == ([], None), each


def test_a_device_that_computes_something_else_fails_in_both_dtypes(checkpoints, monkeypatch):
    one, other = checkpoints
    findings = found(one, other, "", [gpu_parity.Option("as usual", {})], monkeypatch)
    for name in ("compiled", "reference"):
        exact, rounded = (
            "\n".join(findings[f"attention={name}, as usual, {dtype}"].failures)
            for dtype in ("float32", "bfloat16")
        )
        for part in ("greedy tokens differ", "logprobs differ"):
            assert part in exact, exact
        for part in ("logprobs differ", "logprobs, on average, differ", "a greedy token is"):
            assert part in rounded, rounded


def test_each_backend_of_a_gpu_is_tried_with_each_option():
    """FlashInfer has nothing in fp32, and its kernels are built while others run."""
    cases = [
        (each.flags["attention"], each.name, each.dtype)
        for each in gpu_parity.cases("cuda", compiles=True)
    ]
    options = ("as usual", "prefixes read once", "torch_compile=T", "use_cudagraphs=F")
    expected = []
    for group, names in (("", options), ("quantization=fp8", ()), ("kv_cache_dtype=fp8", ())):
        for attention in ("triton", "reference", "flashinfer"):
            for option in names or (group,):
                if attention == "reference" and option in (*options[2:], "quantization=fp8"):
                    continue
                for dtype in ("float32", "bfloat16"):
                    if dtype == "float32" and (group or attention == "flashinfer"):
                        continue
                    expected.append((attention, f"attention={attention}, {option}, {dtype}", dtype))
    assert cases == expected
    assert len(cases) == 21


@pytest.mark.long
def test_eight_bits_are_compared_with_eight_bits(checkpoints, monkeypatch):
    same, other = checkpoints
    for group in ("quantization=fp8", "kv_cache_dtype=fp8"):
        for checkpoint, is_same in ((same, True), (other, False)):
            option = gpu_parity.Option("fp8", {})
            findings = found(checkpoint, same, group, [option], monkeypatch)
            for name, each in findings.items():
                if "compiled" in name and group.startswith("kv"):
                    # A KV cache in e4m3 is for the reference alone, on a CPU.
                    assert "kv_cache_dtype" in each.not_run
                else:
                    assert (list(each.failures) == []) == is_same, each
            assert len(findings) == 2


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_SHAPES", gpu_kernels._SHAPES[:3])
    monkeypatch.setattr(gpu_kernels, "_VOCABULARIES", gpu_kernels._VOCABULARIES[:3])


def kernel_outcomes():
    jobs = gpu_kernels.kernel_jobs("cpu", builds_all=False)
    return {job.name: outcome.value for job, outcome in run_here(jobs)}


def test_kernels_that_compute_the_same_pass(few_shapes):
    outcomes = kernel_outcomes()
    for dtype in ("float32", "float16", "bfloat16"):
        result, failures = outcomes.pop(f"attention=compiled, kernels in {dtype}")
        assert re.fullmatch(r"attention [\d.e-]+, operators [\d.e-]+ of [\d.e-]+", result)
        assert failures == []
    assert outcomes.pop("attention=compiled, draws") == ("0 of 540 drawn tokens differ", [])
    ((what, (result, failures)),) = outcomes.items()
    assert what == "attention=compiled, large batches"
    assert re.fullmatch(r"[\d.e-]+, [\d.e-]+ of 0.03", result)
    assert failures == []


def test_kernels_that_compute_something_else_fail(few_shapes, monkeypatch):
    attend = CompiledAttention.attend
    monkeypatch.setattr(
        CompiledAttention, "attend", lambda *arguments: attend(*arguments) * torch.nan
    )
    monkeypatch.setattr(CompiledSampling, "draw", lambda _, logits, draws: logits.argmax(-1))
    outcomes = kernel_outcomes()
    for dtype in ("float32", "float16", "bfloat16"):
        _, (failure,) = outcomes.pop(f"attention=compiled, kernels in {dtype}")
        assert failure.startswith("attention of batch")
    _, (failure,) = outcomes.pop("attention=compiled, draws")
    assert "drawn tokens differ" in failure
    ((result, (failure,)),) = outcomes.values()
    assert result == "nan, nan of 0.03"
    assert "differs by nan" in failure


def test_a_warm_engine_is_watched_with_every_kind_of_sampling(checkpoints, monkeypatch):
    generated = []
    generate = LLM.generate

    def note(llm, texts, params, **options):
        outputs = generate(llm, texts, params, **options)
        generated.append(len(outputs))
        return outputs

    monkeypatch.setattr(LLM, "generate", note)
    result, failures = gpu_settled.check_settled("compiled", "cpu", checkpoints[0])
    assert (result, failures) == ("0 waits, 0 kernels compiled", [])
    assert generated == [7] + [1] * 7
    names = [job.name for job in gpu_settled.settled_jobs("cuda", checkpoints[0])]
    assert names == [f"attention={name}, once it is warm" for name in ("triton", "flashinfer")]
    assert gpu_settled.settled_jobs("cpu", checkpoints[0]) == []


def test_places_where_the_host_waits_are_told(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_settled._noted("cuda") as (waits, compiled):
        assert modes == ["warn"]
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert modes == ["warn", "default"]
    first, second = waits
    assert first == second
    assert first.startswith("test_gpu_check.py:")
    assert compiled == []


def test_flashinfer_builds_one_kind_of_kernels_unless_all_are_asked_for():
    """Its build comes first, since others wait for it."""

    def jobs(**options):
        jobs = gpu_kernels.kernel_jobs("cuda", **options)
        return [job.arguments[2:] for job in jobs if job.arguments[0] == "flashinfer"]

    large = (1500, 64, 1 << 31)
    assert jobs(builds_all=False) == [(torch.bfloat16, (64,)), (), large]
    assert jobs(builds_all=True) == [(torch.float16, None), (torch.bfloat16, None), (), large]
    first, *_ = gpu_kernels.kernel_jobs("cuda", builds_all=False)
    assert first.arguments[0] == "flashinfer"


def test_without_cuda_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_loads_run_in_the_processes_of_an_engine(capsys):
    assert gpu_check.main(["device=cpu", "size=tiny", "parts=speed"]) == 0
    printed = capsys.readouterr().out
    (_, lines) = printed.split("\n\n")
    for name in ("repeated, groups", "repeated, no groups", "chat"):
        for what in ("tokens/s", "share of the roofline", "manager's time for a batch"):
            assert f"attention=auto: {name}: {what}" in lines
            assert f"== attention=auto: {name}: {what}" in printed, "it is printed at once, too"
    # Rates have gates on a GPU only. Nothing may be compiled late, anywhere.
    assert ">=" not in lines
    assert lines.count("passed") == 3


def test_what_has_no_time_to_run_is_said(capsys):
    assert gpu_check.main(["device=cpu", "size=tiny", "limit_s=1", "parts=speed"]) == 1
    assert "NOT RUN" in capsys.readouterr().out


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


GOOD = gpu_speed.Speed("repeated, groups", 150_000, 0.65, 0.01, 500, 300, 0, "attention=triton")


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"tokens_per_s": 119_999}, "tokens/s"),
        ({"roofline": 0.59}, "share of the roofline"),
        ({"idle": 0.03}, "idle"),
    ],
)
def test_each_gate_can_fail(change, failed):
    slower = replace(GOOD, tokens_per_s=10, idle=0.5, setup="attention=flashinfer")
    chat = replace(slower, name="chat", tokens_per_s=200_000)
    lines = list(gpu_check._gates([slower, replace(GOOD, **change), chat]))
    assert all("with attention=triton" in each.result for each in lines)
    verdicts = {each.what.split(": ")[1]: each.verdict for each in lines}
    assert [what for what, verdict in verdicts.items() if verdict == "FAILED"] == (
        [failed] if failed else []
    )


def test_gates_of_what_did_not_run_do_not_hold():
    assert [each.verdict for each in gpu_check._gates([])] == ["NOT RUN"] * 3


def test_a_graph_that_is_compiled_late_fails():
    for count, verdict in ((0, "passed"), (1, "FAILED")):
        *_, line = gpu_check._of_speed(replace(GOOD, num_recompiles=count))
        assert line.verdict == verdict


def test_a_difference_is_the_exit_status(monkeypatch, capsys):
    jobs = [Job("one", sums, (2,)), Job("other", sums, (1,))]
    monkeypatch.setattr(gpu_check, "kernel_jobs", lambda *_, **__: jobs)
    monkeypatch.setattr(gpu_check, "run_in_processes", lambda jobs, *_: run_here(jobs))
    assert gpu_check.main(["device=cpu", "parts=kernels"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: one: 2 differs" in printed
    assert re.search(r"^one +2 +no difference +FAILED$", printed, re.MULTILINE)
    assert re.search(r"^other +1 +no difference +passed$", printed, re.MULTILINE)


def test_jobs_go_on_where_one_ends_its_process(capsys):
    jobs = [Job("aborts", aborts), Job("refuses", refuses), Job("sums", sums, (1,))]
    outcomes = dict(run_in_processes(jobs, 2, lambda: False))
    by_name = {job.name: outcome for job, outcome in outcomes.items()}
    assert by_name["sums"].value == ("1", [])
    assert by_name["aborts"].has_run
    assert "status -6" in by_name["aborts"].error
    assert "before the end" in by_name["aborts"].error
    assert not by_name["refuses"].has_run
    assert "Triton is not installed" in by_name["refuses"].error
    assert "   before the end" in capsys.readouterr().out


def test_a_job_that_hangs_is_ended_in_time(tmp_path):
    path = tmp_path / "pid"
    jobs = [Job("hangs", hangs, (path,)), Job("waits", sums, (1,))]
    outcomes = {
        job.name: (outcome.has_run, outcome.error)
        for job, outcome in run_in_processes(jobs, 1, lambda: path.exists() and path.read_text())
    }
    assert outcomes.pop("waits") == (False, "there was no time for it")
    ((has_run, error),) = outcomes.values()
    assert not has_run
    assert error.startswith("it was ended after")
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


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
