"""``make gpu-check``: whether a GPU computes what the CPU computes, and how fast it serves.

    make gpu-check                                 everything, on a GPU
    make gpu-check ARGS='parts=parity'             without loads
    make gpu-check ARGS='device=cpu size=tiny'     the check itself, on any machine

=======  ===========================================================================================
kernels  each backend against the reference on the device itself, on random batches; and whether a
         warm engine waits for the device, or compiles a kernel
parity   a small model with every backend and option against the CPU: greedy tokens and logprobs
speed    Llama-3.2-1B's shape with random weights: repeated sampling, and chat-like traffic
=======  ===========================================================================================

Each part runs in a process of its own, so that none ends another. What is known is printed at once,
and a table at the end has all of it, with its gates, also if time is up before. Rates have gates on
a GPU only, for one H200. The exit status is 0 if all gates hold, 1 if one does not or something did
not run, 2 if there is no such device.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_jobs import Job, Outcome, run_in_processes
from gpu_kernels import kernel_jobs
from gpu_parity import Finding, Parity, make_model
from gpu_settled import settled_jobs
from gpu_speed import SETUPS, SIZES, Speed, measure_rates, measure_speeds

from tokasaurus.bench.output import table
from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.schema import Schema, check_fields, flag

__all__ = ["main"]

_PARTS = ("kernels", "parity", "speed")

# Of repeated sampling on one H200, with prefixes read once.
_LEAST_TOKENS_PER_S = 120_000
_LEAST_ROOFLINE = 0.6
_MOST_IDLE = 0.03

# Characters of a result in the table.
_WIDEST = 100

# Of the time, for kernels and parity, if loads run too.
_SHARE_OF_CHECKS = 0.55


@dataclass(frozen=True, kw_only=True)
class GPUCheckConfig:
    """What to check."""

    device: str = flag("cuda", choices=("cuda", "cpu"), help="That is checked.")
    size: str = flag("full", choices=tuple(SIZES), help="Of the loads.")
    parts: tuple[str, ...] = flag(_PARTS, choices=_PARTS, help="What is checked.")
    limit_s: float = flag(480.0, minimum=1.0, help="For everything; what is late is not run.")
    at_once: int = flag(6, minimum=1, help="Processes of kernels and parity.")
    builds_all: bool = flag(
        False, help="Also FlashInfer's kernels in fp16 and for other heads, which it builds first."
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=GPUCheckConfig,
    program="make gpu-check",
    summary="Whether a GPU computes what the CPU computes, and how fast it serves.",
    examples=("make gpu-check", "make gpu-check ARGS='device=cpu size=tiny'"),
)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        what: was checked.
        result: of it.
        gate: that it must pass; "" for none.
        passed: it has; None if it did not run.
    """

    what: str
    result: str
    gate: str = ""
    passed: bool | None = True

    @property
    def verdict(self) -> str:
        if self.passed is None:
            return "NOT RUN"
        if not self.passed:
            return "FAILED"
        return "passed" if self.gate else ""


class _Check:
    """Runs the parts, and keeps the lines of what is known.

    Args:
        config: what to check.
        directory: for models.
    """

    def __init__(self, config: GPUCheckConfig, directory: Path) -> None:
        self._config, self._directory = config, directory
        self.started = time.monotonic()
        self.lines: list[Line] = []

    def run(self) -> None:
        parts = self._config.parts
        if "kernels" in parts or "parity" in parts:
            self._checks(_SHARE_OF_CHECKS if "speed" in parts else 1.0)
        if "speed" in parts:
            self._speed()

    def add(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.lines.append(line)
            print(f"== {line.what}: {line.result} {line.verdict}".rstrip(), flush=True)

    def _until(self, share: float) -> Callable[[], bool]:
        """Whether this share of the time is up."""
        deadline = self.started + share * self._config.limit_s
        return lambda: time.monotonic() >= deadline

    def _checks(self, share: float) -> None:
        """Kernels and parity, all of which run at the same time."""
        config = self._config
        kernels: list[Job] = []
        parity = None
        checkpoint = make_model(self._directory / "small")
        if "kernels" in config.parts:
            kernels = kernel_jobs(config.device, builds_all=config.builds_all)
            kernels += settled_jobs(config.device, checkpoint)
        if "parity" in config.parts:
            compiles = SIZES[config.size].compiles
            parity = Parity(config.device, checkpoint, checkpoint, compiles=compiles)
        jobs = [*kernels, *(parity.jobs() if parity else ())]
        names = {each.name for each in kernels}
        outcomes: dict[str, Outcome] = {}
        for job, outcome in run_in_processes(jobs, config.at_once, self._until(share)):
            outcomes[job.name] = outcome
            if job.name in names:
                self.add(_of_kernels(job.name, outcome))
        if parity is not None:
            # Most of the time of a judge is that of starting it, and there is no other to wait for.
            judges = parity.judging(outcomes)
            judged = run_in_processes(judges, len(judges) or 1, self._until(share + 0.1))
            found = parity.findings({job.name: outcome for job, outcome in judged})
            self.add(line for finding in found for line in _of_parity(finding))
        self.add([Line("kernels and parity: time", f"{time.monotonic() - self.started:.0f} s")])

    def _speed(self) -> None:
        """Each load has the device to itself."""
        config, size = self._config, SIZES[self._config.size]
        jobs = [Job("rates", measure_rates, (config.device, size))]
        ((_, outcome),) = run_in_processes(jobs, 1, self._until(1.0))
        rates = outcome.value
        if rates is None:
            self.add([Line("rates", str(outcome.error), "measured", None)])
            return
        self.add(
            [
                Line(f"products in {size.dtype}", f"{rates.flops / 1e12:,.2f} TFLOP/s"),
                Line("memory", f"{rates.bytes / 1e12:,.3f} TB/s"),
            ]
        )
        model = self._directory / "large"
        model.mkdir()
        setups = [each for each in SETUPS[config.device] if size.compiles or not each.compiles]
        jobs = [
            Job(f"{number}: {each.name}", measure_speeds, (config.device, size, rates, model, each))
            for number, each in enumerate(setups, 1)
        ]
        speeds: list[Speed] = []
        for job, outcome in run_in_processes(jobs, 1, self._until(1.0)):
            found, error = outcome.value or ([], outcome.error)
            speeds += found
            for speed in found:
                self.add(_of_speed(speed))
            if error is not None:
                self.add([Line(job.name, error, "runs", False if outcome.has_run else None)])
        if config.device == "cuda" and config.size == "full":
            self.add(_gates(speeds))


def main(arguments: Sequence[str]) -> int:
    config = parse_or_exit(SCHEMA, arguments)
    if config.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no CUDA device that PyTorch can use; nothing was checked."
            f" PyTorch is {torch.__version__}.",
            file=sys.stderr,
        )
        return 2
    # A machine that ends commands gives them a moment. The table is printed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"gpu-check: device={config.device}, {_name(config.device)}, PyTorch {torch.__version__}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        check = _Check(config, Path(directory))
        try:
            check.run()
        finally:
            check.lines.append(Line("in all: time", f"{time.monotonic() - check.started:.0f} s"))
            rows = [
                (each.what, _short(each.result), each.gate, each.verdict) for each in check.lines
            ]
            print("\n" + table(("what", "result", "gate", ""), rows), flush=True)
    return 0 if all(each.passed for each in check.lines) else 1


def _of_kernels(name: str, outcome: Outcome) -> Iterator[Line]:
    if outcome.error is not None:
        yield Line(name, outcome.error, "no difference", False if outcome.has_run else None)
        return
    result, failures = outcome.value
    yield from _with_failures(name, result, failures)


def _of_parity(finding: Finding) -> Iterator[Line]:
    if finding.not_run is not None:
        yield Line(finding.name, finding.not_run, "no difference", None)
        return
    yield from _with_failures(finding.name, finding.result, finding.failures)


def _with_failures(name: str, result: str, failures: Sequence[str]) -> Iterator[Line]:
    for failure in failures:
        print(f"FAILED: {name}: {failure}", flush=True)
    yield Line(name, result, "no difference", not failures)


def _of_speed(speed: Speed) -> Iterator[Line]:
    what = f"{speed.setup}: {speed.name}"
    yield Line(f"{what}: tokens/s", f"{speed.tokens_per_s:,.0f}")
    yield Line(f"{what}: share of the roofline", f"{speed.roofline:.1%}")
    yield Line(f"{what}: idle", f"{speed.idle:.1%}")
    yield Line(
        f"{what}: manager's time for a batch",
        f"{speed.manager_us:,.0f} us, {speed.num_batches} batches",
    )
    recompiles = speed.num_recompiles
    yield Line(f"{what}: recompiles", str(recompiles), "0", not recompiles)


def _gates(speeds: Sequence[Speed]) -> Iterator[Line]:
    """Of the setup that is the fastest in repeated sampling with prefixes read once."""
    some = [each for each in speeds if each.name == "repeated, groups"]
    best = max(some, key=lambda each: each.tokens_per_s, default=None)
    for what, gate, result, passed in (
        ("tokens/s", f">= {_LEAST_TOKENS_PER_S:,}", "{0.tokens_per_s:,.0f}", _is_fast),
        ("share of the roofline", f">= {_LEAST_ROOFLINE:.0%}", "{0.roofline:.1%}", _is_near),
        ("idle", f"< {_MOST_IDLE:.0%}", "{0.idle:.1%}", _is_busy),
    ):
        if best is None:
            yield Line(f"best of repeated, groups: {what}", "", gate, None)
        else:
            result = f"{result.format(best)} with {best.setup}"
            yield Line(f"best of repeated, groups: {what}", result, gate, passed(best))


def _is_fast(speed: Speed) -> bool:
    return speed.tokens_per_s >= _LEAST_TOKENS_PER_S


def _is_near(speed: Speed) -> bool:
    return speed.roofline >= _LEAST_ROOFLINE


def _is_busy(speed: Speed) -> bool:
    return speed.idle < _MOST_IDLE


def _short(result: str) -> str:
    """The first line, as far as a table has room; the rest was printed before."""
    first = result.partition("\n")[0]
    return first if len(first) <= _WIDEST else f"{first[: _WIDEST - 3]}..."


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the processor"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
