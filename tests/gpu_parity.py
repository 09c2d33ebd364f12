"""Whether a device generates what the CPU generates: part of ``make gpu-check``.

The same small model with random weights runs on both, with each backend that the device has and
with each option, in fp32 and in bf16:

1. In fp32 both generate the same greedy tokens, and give every id the same logprob to three digits.
2. In bf16 the logprobs of the device differ from the CPU's fp32 by at most twice as much as the
   CPU's bf16 does, on average (root mean square) by at most a quarter more, and every greedy token
   of the device is the CPU's best one within twice that distance.

Each engine is a job of its own, those of the CPU among them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import VOCAB_SIZE, make_checkpoint
from gpu_jobs import Job, Outcome

from tokasaurus import LLM, SamplingParams

__all__ = ["Finding", "Parity", "backend_names", "engine", "make_model", "prompts"]

_NUM_PROMPTS = 8
_NUM_TOKENS = 48
_FP32_TOLERANCE = 1e-3


def make_model(directory: Path, seed: int = 0) -> Path:
    """Writes the checkpoint of a small model with random weights."""
    return make_checkpoint(
        directory,
        "llama",
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_layers=4,
        intermediate_size=1024,
        initializer_range=0.06,
        seed=seed,
    )


@dataclass
class Run:
    """What one device computes in one dtype.

    Attributes:
        tokens: [prompts, tokens], generated greedily.
        logprobs: [positions, ids], of texts that are the same for all runs.
    """

    tokens: list[list[int]]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Case:
    """An engine that is compared with the CPU.

    Attributes:
        name: of it.
        device: of it.
        dtype: of it.
        group: of ``_GROUPS``, flags that the CPU has, too.
        flags: that the CPU has not.
    """

    name: str
    device: str
    dtype: str
    group: str
    flags: Mapping[str, object]


@dataclass(frozen=True)
class Finding:
    """What came of one case.

    Attributes:
        name: of the case.
        result: in short.
        failures: what is wrong.
        not_run: why it did not run; None if it did.
    """

    name: str
    result: str = ""
    failures: Sequence[str] = ()
    not_run: str | None = None


@dataclass(frozen=True)
class Option:
    """What a user may ask for.

    Attributes:
        name: of it.
        flags: that ask for it.
        with_reference: it is tried with attention=reference, too.
    """

    name: str
    flags: Mapping[str, object]
    with_reference: bool = True


# Flags that change what a model computes, on the CPU too.
_GROUPS: Mapping[str, Mapping[str, object]] = {
    "": {},
    "quantization=fp8": {"quantization": "fp8"},
    "kv_cache_dtype=fp8": {"kv_cache_dtype": "fp8"},
}

_DTYPES = ("float32", "bfloat16")

# FlashInfer has no kernels for fp32.
_IN_FLOAT32 = ("compiled", "triton", "reference")


def cases(device: str, *, compiles: bool) -> Iterator[Case]:
    """All that is compared.

    Args:
        device: to check.
        compiles: try torch.compile, too.
    """
    for group in _groups(device):
        for attention in backend_names(device):
            for option in _options(device, group, compiles):
                if attention == "reference" and not option.with_reference:
                    continue
                for dtype in _DTYPES:
                    if dtype == "float32" and (group or attention not in _IN_FLOAT32):
                        continue
                    flags = {"attention": attention, **option.flags}
                    name = ", ".join((f"attention={attention}", option.name, dtype))
                    yield Case(name, device, dtype, group, flags)


def backend_names(device: str) -> tuple[str, ...]:
    """Those of a device, whether they run here or not."""
    names = {
        "cpu": ("compiled", "reference"),
        # FlashInfer comes last: another process builds its kernels meanwhile.
        "cuda": ("triton", "reference", "flashinfer"),
    }
    return names[device]


def _groups(device: str) -> Sequence[str]:
    return tuple(_GROUPS) if device == "cuda" else ("",)


def _options(device: str, group: str, compiles: bool) -> Iterator[Option]:
    if group:
        yield Option(group, {}, with_reference=group.startswith("kv"))
        return
    yield Option("as usual", {})
    groups = {"hydragen_min_group_size": 2, "hydragen_min_prefix_len": 16}
    yield Option("prefixes read once", {"use_hydragen": True, **groups})
    if compiles:
        yield Option("torch_compile=T", {"torch_compile": True}, with_reference=False)
    if device == "cuda":
        yield Option("use_cudagraphs=F", {"use_cudagraphs": False}, with_reference=False)


class Parity:
    """The comparison, as jobs: those of ``jobs``, then those of ``judging``.

    Args:
        device: to check.
        checkpoint: that it runs.
        reference_checkpoint: that the CPU runs: the same one, unless this check is tested.
        compiles: try torch.compile, too.
    """

    def __init__(
        self,
        device: str,
        checkpoint: Path,
        reference_checkpoint: Path,
        *,
        compiles: bool = True,
    ) -> None:
        self._checkpoint, self._reference = checkpoint, reference_checkpoint
        self._cases = list(cases(device, compiles=compiles))
        self._outcomes: dict[str, Outcome] = {}

    def jobs(self) -> list[Job]:
        """A job for each engine, the CPU's among them."""
        groups = dict.fromkeys(each.group for each in self._cases)
        # These build kernels of FlashInfer that no other case has.
        cases = sorted(self._cases, key=lambda each: "flashinfer, kv_cache" not in each.name)
        return [
            *(
                Job(_on_cpu(group, dtype), run_engine, ("cpu", dtype, self._reference, flags))
                for group in groups
                for flags in (_GROUPS[group],)
                for dtype in _DTYPES
            ),
            *(
                Job(each.name, run_engine, (each.device, each.dtype, self._checkpoint, flags))
                for each in cases
                for flags in ({**_GROUPS[each.group], **each.flags},)
            ),
        ]

    def judging(self, outcomes: Mapping[str, Outcome]) -> list[Job]:
        """Jobs of the CPU, which looks at tokens that the device has generated in bf16.

        Args:
            outcomes: of all jobs, by their names.
        """
        self._outcomes.update(outcomes)
        generated: dict[str, dict[str, list[list[int]]]] = {}
        for case in self._cases:
            run = self._outcomes[case.name].value
            if case.dtype == "bfloat16" and run is not None:
                generated.setdefault(case.group, {})[case.name] = run.tokens
        return [
            Job(f"judge {group}".strip(), greedy_losses, (self._reference, _GROUPS[group], tokens))
            for group, tokens in generated.items()
        ]

    def findings(self, outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
        """What is wrong with each case.

        Args:
            outcomes: of the judging jobs, by their names.
        """
        losses: dict[str, float] = {}
        for outcome in outcomes.values():
            losses.update(outcome.value or {})
        for case in self._cases:
            outcome = self._outcomes[case.name]
            if outcome.error is not None:
                if outcome.has_run:
                    yield Finding(case.name, "failed", [outcome.error])
                else:
                    yield Finding(case.name, not_run=outcome.error)
                continue
            expected, rounded = (
                self._outcomes[_on_cpu(case.group, dtype)].value for dtype in _DTYPES
            )
            if expected is None or rounded is None:
                yield Finding(case.name, not_run="there is nothing of the CPU to compare it with")
            elif case.dtype == "float32":
                yield _in_float32(case.name, outcome.value, expected)
            else:
                loss = losses.get(case.name, math.nan)
                yield _in_bfloat16(case.name, outcome.value, expected, rounded, loss)


def _on_cpu(group: str, dtype: str) -> str:
    return " ".join(filter(None, ("the CPU", group, dtype)))


def _in_float32(name: str, found: Run, expected: Run) -> Finding:
    failures = []
    if found.tokens != expected.tokens:
        failures.append("greedy tokens differ from the CPU's")
    distance = _distance(found, expected)
    failures += _far("logprobs", distance, _FP32_TOLERANCE)
    return Finding(name, f"{distance:.2g} of {_FP32_TOLERANCE:.2g}", failures)


def _in_bfloat16(name: str, found: Run, expected: Run, rounded: Run, loss: float) -> Finding:
    tolerance = 2 * _distance(rounded, expected)
    mean_tolerance = 1.25 * _mean_distance(rounded, expected)
    distance, mean = _distance(found, expected), _mean_distance(found, expected)
    failures = _far("logprobs", distance, tolerance)
    failures += _far("logprobs, on average,", mean, mean_tolerance)
    if not loss <= tolerance:
        failures.append(f"a greedy token is {loss:.2g} less likely than the CPU's best one")
    numbers = (distance, tolerance), (mean, mean_tolerance), (loss, tolerance)
    return Finding(name, ", ".join(f"{one:.2g} of {most:.2g}" for one, most in numbers), failures)


def run_engine(device: str, dtype: str, checkpoint: Path, flags: Mapping[str, object]) -> Run:
    """What an engine computes.

    Args:
        device: of it.
        dtype: of it.
        checkpoint: that it runs.
        flags: others of it.

    Raises:
        ConfigError: it cannot run here.
    """
    with engine(device, dtype, checkpoint, **flags) as llm:
        return _run(llm, prompts(length=64))


def greedy_losses(
    checkpoint: Path, flags: Mapping[str, object], tokens: Mapping[str, list[list[int]]]
) -> dict[str, float]:
    """How much less likely than the CPU's best token one of these is, at most, by name.

    Args:
        checkpoint: that the CPU runs in fp32.
        flags: of it.
        tokens: by name, that were generated behind each prompt.
    """
    with engine("cpu", "float32", checkpoint, **flags) as judge:
        texts = prompts(length=64)
        return {name: _greedy_loss(judge, texts, each) for name, each in tokens.items()}


def engine(device: str, dtype: str, checkpoint: Path, **flags: object) -> LLM:
    """An engine of the small model, in this process."""
    return LLM(
        checkpoint,
        device=device,
        dtype=dtype,
        kv_cache_num_tokens=16384,
        max_topk_logprobs=VOCAB_SIZE,
        log_level="INFO",
        **flags,
    )


def prompts(length: int) -> list[list[int]]:
    """Prompts of several lengths, which begin alike."""
    ids = random.Random(0)
    shared = [ids.randrange(256) for _ in range(length // 2)]
    lengths = (length - len(shared) - number for number in range(_NUM_PROMPTS))
    return [shared + [ids.randrange(256) for _ in range(count)] for count in lengths]


def _run(llm: LLM, texts: list[list[int]]) -> Run:
    params = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
    tokens = [
        list(output.outputs[0].token_ids) for output in llm.generate(texts, params, use_tqdm=False)
    ]
    return Run(tokens, _logprobs(llm, texts))


def _logprobs(llm: LLM, texts: list[list[int]]) -> np.ndarray:
    """[positions, ids]: of every id behind every position of the texts."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=VOCAB_SIZE)
    rows = []
    for output in llm.generate(texts, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for position in output.prompt_logprobs[1:]:
            assert position is not None
            rows.append([position[each].logprob for each in range(VOCAB_SIZE)])
    return np.array(rows)


def _distance(one: Run, other: Run) -> float:
    return float(np.abs(one.logprobs - other.logprobs).max())


def _mean_distance(one: Run, other: Run) -> float:
    return float(np.sqrt(np.square(one.logprobs - other.logprobs).mean()))


def _far(what: str, distance: float, tolerance: float) -> list[str]:
    # Not a number is not near either.
    if distance <= tolerance:
        return []
    return [f"{what} differ from the CPU's by {distance:.2g}, over {tolerance:.2g}"]


def _greedy_loss(llm: LLM, texts: list[list[int]], tokens: list[list[int]]) -> float:
    """How much less likely a generated token is than the best one, at most, in logprobs."""
    whole = [text + generated for text, generated in zip(texts, tokens, strict=True)]
    logprobs = _logprobs(llm, whole)
    loss, row = 0.0, 0
    for text, generated in zip(texts, tokens, strict=True):
        # Row i of a text has the logprobs behind its position i.
        behind = logprobs[row + len(text) - 1 : row + len(text) - 1 + len(generated)]
        chosen = behind[np.arange(len(generated)), generated]
        loss = max(loss, float((behind.max(axis=1) - chosen).max()))
        row += len(text) + len(generated) - 1
    return loss
