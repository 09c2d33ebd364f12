"""Runs one engine for ``toka tune``: a program that ends when its standard input does.

It reads one line of JSON, a ``Task``, loads the engine, runs the requests and writes lines of JSON:

=============================================  ===================================================
``{"ready": seconds}``                         the engine is loaded
``{"run": seconds}``                           a run of all requests has ended
``{"seconds": [...], "tokens": ...,            the runs that count, what each generated, and the
"other_work": ...}``                           share of the cores that others took meanwhile
``{"error": "..."}``                           why there is nothing more
=============================================  ===================================================

Whatever else the engine prints goes to standard error.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np

from tokasaurus.calibration.other_work import OtherWork, undisturbed
from tokasaurus.errors import TokasaurusError
from tokasaurus.planner.trace import TraceRequest, generate_request

__all__ = ["Task", "main"]


class Task(msgspec.Struct, frozen=True):
    """What to run.

    Attributes:
        model: as the user wrote it; None for the bundled one.
        flags: of the engine.
        trace: the requests, which are all given at once. Prompts are random.
        vocab_size: of the model.
        repetitions: of the run. Each has prompts of its own, so that none is cached. A run that
            other work disturbed is repeated, up to three times as many in all.
    """

    model: str | None
    flags: dict[str, Any]
    trace: list[TraceRequest]
    vocab_size: int
    repetitions: int


def main() -> None:
    """Runs the task of standard input."""
    answers = _take_standard_output()
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        _run(task, answers)
    except TokasaurusError as error:
        _answer(answers, {"error": str(error)})
        sys.exit(1)


def _run(task: Task, answers: TextIO) -> None:
    from tokasaurus import LLM  # loads torch

    started = time.perf_counter()
    with LLM(task.model, **task.flags) as llm:
        _answer(answers, {"ready": time.perf_counter() - started})
        number = itertools.count()
        tokens = 0

        def measure() -> float:
            nonlocal tokens
            prompts, params = _requests(task, next(number))
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
            _answer(answers, {"run": seconds})
            return seconds

        work = OtherWork(_session_cpu_s)
        seconds, other_work = undisturbed(measure, task.repetitions, work, lambda _: None)
        fields = {"seconds": seconds, "tokens": tokens, "other_work": other_work}
        _answer(answers, fields)


def _session_cpu_s() -> float:
    """CPU seconds of this process and those of its engine, which are in its session."""
    ticks = 0
    session = os.getsid(0)
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def _requests(task: Task, repetition: int) -> tuple[list[list[int]], list[Any]]:
    """Prompts and parameters. Samples of different lengths become requests of one sample each."""
    from tokasaurus import SamplingParams

    prompts: list[list[int]] = []
    params = []
    # A number that no other repetition adds to the ids keeps shared prefixes shared.
    shift = np.int64(7919 * repetition)
    for number, request in enumerate(task.trace):
        ids = (generate_request(request, number).prompt_ids + shift) % task.vocab_size
        lengths = request.output_tokens
        is_one = len(set(lengths)) == 1
        for length, n in (
            [(lengths[0], len(lengths))] if is_one else [(each, 1) for each in lengths]
        ):
            prompts.append(ids.tolist())
            params.append(SamplingParams(max_tokens=length, n=n, ignore_eos=True, temperature=1.0))
    return prompts, params


def _end_with_input() -> None:
    """Ends the program as soon as its owner has gone. Processes of the engine notice that."""
    sys.stdin.buffer.read()
    os._exit(1)


def _take_standard_output() -> TextIO:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    print(msgspec.json.encode(fields).decode(), file=answers, flush=True)


if __name__ == "__main__":
    main()
