"""Whether a device generates what the CPU generates: part of ``make gpu-check``.

The same small model with random weights runs on both, with each backend that the device has and
with each option, in fp32 and in bf16:

1. In fp32 both generate the same greedy tokens, and give every id the same logprob to three digits.
2. In bf16 the logprobs of the device differ from the CPU's fp32 by at most twice as much as the
   CPU's bf16 does, on average (root mean square) by at most a quarter more, and every greedy token
   of the device is the CPU's best one within twice that distance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.backend import usable_backends
from tokasaurus.model.backend.base import Backend, ModelHeads
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.float8 import E4M3

__all__ = ["check", "make_model"]

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


def check(
    device: str, checkpoint: Path, reference_checkpoint: Path, *, compiles: bool = True
) -> list[str]:
    """What is wrong. Prints a line for each thing that is compared.

    Args:
        device: to check.
        checkpoint: that it runs.
        reference_checkpoint: that the CPU runs: the same one, unless this check is tested.
        compiles: try torch.compile, too.
    """
    failures = []
    for flags, options in _groups(device, compiles):
        with _expecting(device, checkpoint, reference_checkpoint, flags) as check:
            failures += _check_options(check, options)
    return failures


@dataclass(frozen=True)
class Option:
    """What a user may ask for.

    Attributes:
        name: of it.
        flags: that ask for it.
        is_of_attention: backends differ in it. Otherwise it is checked with the best one alone.
        in_float32: it exists there, too.
    """

    name: str
    flags: Mapping[str, object]
    is_of_attention: bool = False
    in_float32: bool = True


def _groups(device: str, compiles: bool) -> Iterator[tuple[Mapping[str, object], Sequence[Option]]]:
    """Flags that change what a model computes, on the CPU too; and options to check with these."""
    yield {}, list(_options(device, compiles))
    if device == "cuda":
        for flags in _EIGHT_BITS:
            (name,) = flags
            yield flags, [Option(f"{name}=fp8", {}, name == "kv_cache_dtype", in_float32=False)]


_EIGHT_BITS: tuple[Mapping[str, object], ...] = (
    {"quantization": "fp8"},
    {"kv_cache_dtype": "fp8"},
)


def _options(device: str, compiles: bool) -> Iterator[Option]:
    yield Option("as usual", {}, is_of_attention=True)
    groups = {"hydragen_min_group_size": 2, "hydragen_min_prefix_len": 16}
    yield Option("prefixes read once", {"use_hydragen": True, **groups}, is_of_attention=True)
    if compiles:
        yield Option("torch_compile=T", {"torch_compile": True})
    if device == "cuda":
        yield Option("use_cudagraphs=F", {"use_cudagraphs": False})


def _check_options(check: _Check, options: Sequence[Option]) -> list[str]:
    """What is wrong, with each backend that has an option."""
    failures = []
    kept_dtype = E4M3 if "kv_cache_dtype" in check.flags else None
    heads = check.heads(torch.bfloat16, kept_dtype)
    backends = usable_backends(torch.device(check.device), heads=heads)
    for backend in backends:
        for option in options:
            if backend is not backends[0] and not option.is_of_attention:
                continue
            what = f"attention={backend.name}, {option.name}"
            print(f" {what}")
            failures += [f"{what}: {each}" for each in check.failures(backend, option)]
    return failures


@contextmanager
def _expecting(
    device: str, checkpoint: Path, reference_checkpoint: Path, flags: Mapping[str, object]
) -> Iterator[_Check]:
    """A comparison with what the CPU computes with these flags."""
    texts = _prompts(length=64)
    with _engine("cpu", "float32", reference_checkpoint, **flags) as judge:
        expected = _run(judge, texts)
        with _engine("cpu", "bfloat16", reference_checkpoint, **flags) as llm:
            rounded = _run(llm, texts)
        yield _Check(device, checkpoint, flags, judge, expected, rounded)


@dataclass
class _Check:
    """Compares a device with the CPU.

    Attributes:
        device: to check.
        checkpoint: that it runs.
        flags: of both.
        judge: the CPU's engine in fp32.
        expected: what that computes.
        rounded: what the CPU computes in bf16.
    """

    device: str
    checkpoint: Path
    flags: Mapping[str, object]
    judge: LLM
    expected: Run
    rounded: Run

    def failures(self, backend: type[Backend], option: Option) -> list[str]:
        """What is wrong with an option."""
        failures = []
        flags = {**self.flags, "attention": backend.name, **option.flags}
        if option.in_float32 and self._runs(backend, torch.float32):
            found = self._found("float32", flags)
            if found.tokens != self.expected.tokens:
                failures.append("in float32, greedy tokens differ from the CPU's")
            failures += _far("float32", _distance(found, self.expected), _FP32_TOLERANCE)
        return failures + self._failures_in_bfloat16(flags)

    def _failures_in_bfloat16(self, flags: Mapping[str, object]) -> list[str]:
        expected = self.expected
        tolerance = 2 * _distance(self.rounded, expected)
        mean_tolerance = 1.25 * _mean_distance(self.rounded, expected)
        found = self._found("bfloat16", flags)
        failures = _far("bfloat16", _distance(found, expected), tolerance)
        failures += _far("bfloat16, on average", _mean_distance(found, expected), mean_tolerance)
        loss = _greedy_loss(self.judge, _prompts(length=64), found.tokens)
        print(f"  bfloat16: greedy tokens are the CPU's best within {loss:.2g}, of {tolerance:.2g}")
        if not loss <= tolerance:
            failures.append(f"in bfloat16, a greedy token is {loss:.2g} less likely than the CPU's")
        return failures

    def _found(self, dtype: str, flags: Mapping[str, object]) -> Run:
        with _engine(self.device, dtype, self.checkpoint, **flags) as llm:
            return _run(llm, _prompts(length=64))

    def heads(self, dtype: torch.dtype, kept_dtype: torch.dtype | None = None) -> ModelHeads:
        """Those of the model."""
        config = read_model_config(self.checkpoint)
        shape = config.num_heads, config.num_kv_heads, config.head_dim
        return ModelHeads(*shape, dtype, kept_dtype)

    def _runs(self, backend: type[Backend], dtype: torch.dtype) -> bool:
        reason = backend.why_not_model(self.heads(dtype))
        if reason is not None:
            print(f"  {str(dtype).removeprefix('torch.')}: not compared, since {reason}")
        return reason is None


def _engine(device: str, dtype: str, checkpoint: Path, **flags: object) -> LLM:
    return LLM(
        checkpoint,
        device=device,
        dtype=dtype,
        kv_cache_num_tokens=16384,
        max_topk_logprobs=VOCAB_SIZE,
        log_level="WARNING",
        **flags,
    )


def _prompts(length: int) -> list[list[int]]:
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


def _far(dtype: str, distance: float, tolerance: float) -> list[str]:
    print(f"  {dtype}: logprobs differ from the CPU's by {distance:.2g}, of {tolerance:.2g}")
    # Not a number is not near either.
    if distance <= tolerance:
        return []
    return [f"in {dtype}, logprobs differ from the CPU's by {distance:.2g}, over {tolerance:.2g}"]


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
