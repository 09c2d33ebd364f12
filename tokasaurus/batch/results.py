"""The files that a batch ends with: its answers and its errors, both in the order of its lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tokasaurus.batch.lines import error_line, parse_line, read_lines
from tokasaurus.batch.records import RequestCounts
from tokasaurus.batch.store import AnsweredLine, open_private

__all__ = ["write_results"]


def write_results(
    input_path: Path,
    answers_path: Path,
    answered: Mapping[int, AnsweredLine],
    output_path: Path,
    error_path: Path,
    unanswered: tuple[str, str],
    max_lines: int,
) -> RequestCounts:
    """Writes both files, over what may be there. May take a while.

    Args:
        input_path: the file of requests.
        answers_path: the file of result lines, in the order in which they were answered.
        answered: by line number, where its result is in that file.
        output_path, error_path: where to write; the same path puts errors among the answers.
        unanswered: code and message for each line that has no answer.
        max_lines: lines beyond this number are left out.

    Returns:
        How many lines went to which file.
    """
    completed = failed = 0
    with contextlib.ExitStack() as stack:
        output = errors = stack.enter_context(open_private(output_path, is_new=True))
        if error_path != output_path:
            errors = stack.enter_context(open_private(error_path, is_new=True))
        answers: BinaryIO | None = None
        if answered:
            answers = stack.enter_context(answers_path.open("rb"))
        for number, line in read_lines(input_path):
            if number > max_lines:
                break
            place = answered.get(number)
            if place is None or answers is None:
                name = parse_line(number, line, None, ()).name
                errors.write(error_line(name, *unanswered))
                failed += 1
                continue
            answers.seek(place.start)
            (errors if place.is_error else output).write(answers.read(place.size))
            failed, completed = failed + place.is_error, completed + (not place.is_error)
        for file in {output, errors}:
            file.flush()
            os.fsync(file.fileno())
    return RequestCounts(completed + failed, completed, failed)
