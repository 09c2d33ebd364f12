"""Whether a warm engine waits for the device, or compiles a kernel: part of ``make gpu-check``.

torch says where the host waits, and Triton what it compiles, for the process that they are in. So
the engine is in this one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_jobs import Job
from gpu_parity import backend_names, engine, prompts

from tokasaurus import SamplingParams

__all__ = ["settled_jobs"]

# One prompt for each, together and alone.
_KINDS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={5: 2.0}),
    SamplingParams(logprobs=5, prompt_logprobs=3),
    SamplingParams(logprobs=0, logprobs_mode="raw", temperature=0.5),
    SamplingParams(structured_outputs={"regex": "[a-z]{1,40}"}),
)

# What torch calls it.
_WAIT = "called a synchronizing"


def settled_jobs(device: str, checkpoint: Path) -> list[Job]:
    """Jobs, each of which returns a result in short, and what is wrong.

    Args:
        device: to check; on a CPU there is nothing to wait for.
        checkpoint: of a small model.
    """
    names = [name for name in backend_names(device) if name != "reference"]
    return [
        Job(f"attention={name}, once it is warm", check_settled, (name, device, checkpoint))
        for name in names
        if device == "cuda"
    ]


def check_settled(name: str, device: str, checkpoint: Path) -> tuple[str, list[str]]:
    """Generates with every kind of sampling behind the warm-up.

    Args:
        name: of the backend.
        device: of the engine.
        checkpoint: that it runs.

    Raises:
        ConfigError: the backend does not run here.
    """
    texts = (prompts(length=64) * len(_KINDS))[: len(_KINDS)]
    with engine(device, "bfloat16", checkpoint, attention=name) as llm, _noted(device) as noted:
        llm.generate(texts, _KINDS, use_tqdm=False)
        for text, kind in zip(texts, _KINDS, strict=True):
            llm.generate([text], kind, use_tqdm=False)
    waits, compiled = noted
    failures = [f"the host waits at {place}" for place in dict.fromkeys(waits)]
    failures += [f"{kernel} is compiled late" for kernel in compiled]
    return f"{len(waits)} waits, {len(compiled)} kernels compiled", failures


@contextlib.contextmanager
def _noted(device: str) -> Iterator[tuple[list[str], list[str]]]:
    """Lists that get the places where the host waits, and the kernels that Triton compiles."""
    waits: list[str] = []
    compiled: list[str] = []
    with warnings.catch_warnings(record=True) as caught, _compilations(compiled):
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits, compiled
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits += [
                f"{Path(each.filename).name}:{each.lineno}"
                for each in caught
                if _WAIT in str(each.message)
            ]


@contextlib.contextmanager
def _compilations(compiled: list[str]) -> Iterator[None]:
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    former = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = former
