"""``make gpu-check``: whether a GPU computes what the CPU computes, and how fast.

    python tests/gpu_check.py [DEVICE]     cuda by default

Every backend that the device has is compared with the reference on the device itself: attention and
element-wise kernels, on random batches, in fp32, fp16 and bf16.

Then the same small model with random weights runs on both with each backend, the reference too, in
fp32 and in bf16:

1. In fp32 both generate the same greedy tokens, and give every id the same logprob to three digits.
2. In bf16 the logprobs of the GPU differ from the CPU's fp32 by at most twice as much as the CPU's
   bf16 does, on average (root mean square) by at most a quarter more, and every greedy token of the
   GPU is the CPU's best one within twice that distance.
3. It prints the tokens/s of a batch in bf16.

The exit status is 0 if all of this holds, 1 if something does not, 2 if there is no such device.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from gpu_kernels import check_kernels

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.backend import usable_backends

_NUM_PROMPTS = 8
_NUM_TOKENS = 48
_FP32_TOLERANCE = 1e-3
_BATCH = 64
_BATCH_TOKENS = 128


def main(device: str = "cuda") -> int:
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no CUDA device that PyTorch can use; nothing was checked."
            f" PyTorch is {torch.__version__}.",
            file=sys.stderr,
        )
        return 2
    print(f"gpu-check: device={device}, {_name(device)}, PyTorch {torch.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_model(Path(directory))
        failures = check_kernels(device) + check(device, checkpoint, checkpoint)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not failures:
        print(f"passed: {device} computes what the CPU computes")
    return 1 if failures else 0


def make_model(directory: Path, seed: int = 0) -> Path:
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


def check(device: str, checkpoint: Path, reference_checkpoint: Path) -> list[str]:
    """What is wrong.

    Args:
        device: to check.
        checkpoint: that it runs.
        reference_checkpoint: that the CPU runs: the same one, unless this check is tested.
    """
    texts = _prompts(length=64)
    with _engine("cpu", "float32", reference_checkpoint) as llm:
        expected = _run(llm, texts)
    with _engine("cpu", "bfloat16", reference_checkpoint) as llm:
        rounded = _run(llm, texts)
    failures = []
    for backend in usable_backends(torch.device(device)):
        print(f" attention={backend.name}")
        failures += [
            f"attention={backend.name}: {failure}"
            for failure in _check_backend(
                device, backend.name, checkpoint, reference_checkpoint, expected, rounded
            )
        ]
    return failures


def _check_backend(
    device: str,
    attention: str,
    checkpoint: Path,
    reference_checkpoint: Path,
    expected: Run,
    rounded: Run,
) -> list[str]:
    """What is wrong with a backend; the CPU's results are given in fp32 and in bf16."""
    texts = _prompts(length=64)
    tolerance = 2 * _distance(rounded, expected)
    mean_tolerance = 1.25 * _mean_distance(rounded, expected)
    failures = []
    with _engine(device, "float32", checkpoint, attention) as llm:
        found = _run(llm, texts)
    if found.tokens != expected.tokens:
        failures.append("in float32, greedy tokens differ from the CPU's")
    failures += _far("float32", _distance(found, expected), _FP32_TOLERANCE)
    with _engine(device, "bfloat16", checkpoint, attention) as llm:
        found = _run(llm, texts)
        _print_speed(device, llm)
    failures += _far("bfloat16", _distance(found, expected), tolerance)
    failures += _far("bfloat16, on average", _mean_distance(found, expected), mean_tolerance)
    with _engine("cpu", "float32", reference_checkpoint) as llm:
        loss = _greedy_loss(llm, texts, found.tokens)
    print(f"  bfloat16: greedy tokens are the CPU's best within {loss:.2g}, of {tolerance:.2g}")
    if loss > tolerance:
        failures.append(f"in bfloat16, a greedy token is {loss:.2g} less likely than the CPU's")
    return failures


def _engine(device: str, dtype: str, checkpoint: Path, attention: str = "auto") -> LLM:
    return LLM(
        checkpoint,
        device=device,
        attention=attention,
        dtype=dtype,
        kv_cache_num_tokens=16384,
        max_topk_logprobs=VOCAB_SIZE,
        log_level="WARNING",
    )


def _prompts(length: int) -> list[list[int]]:
    ids = random.Random(0)
    return [[ids.randrange(256) for _ in range(length - number)] for number in range(_NUM_PROMPTS)]


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


def _print_speed(device: str, llm: LLM) -> None:
    params = SamplingParams(max_tokens=_BATCH_TOKENS, temperature=1.0, ignore_eos=True, seed=0)
    prompts = _prompts(length=64) * (_BATCH // _NUM_PROMPTS)
    llm.generate(prompts, params, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    rate = len(prompts) * _BATCH_TOKENS / (time.perf_counter() - started)
    print(
        f"  {device}, bfloat16: {rate:,.0f} tokens/s with {len(prompts)} sequences of a small model"
    )


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the processor"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
