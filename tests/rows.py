"""Tables inside one test: every row is checked, and a failure names each row that failed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["check_each", "each_row", "named"]

_NAME_LENGTH = 200  # of a row, in characters
_NUM_REASONS = 10  # of failures whose reasons are told


def check_each(rows: Iterable[Any], check: Callable[[Any], None]) -> None:
    """Check every row, then fail if any has failed.

    Raises:
        AssertionError: names each row that failed; the first ones with line and reason. Its cause
            is the first failure.
    """
    __tracebackhide__ = True
    failures: list[tuple[str, BaseException]] = []
    num_rows = 0
    for num_rows, row in enumerate(rows, 1):
        try:
            check(row)
        except (Exception, pytest.fail.Exception) as error:
            failures.append((f"row {num_rows - 1}: {_shortened(row)}", error))
    assert num_rows, "a table without rows checks nothing"
    if failures:
        lines = [f"{len(failures)} of {num_rows} rows failed:"]
        for number, (name, error) in enumerate(failures):
            lines += [name] if number >= _NUM_REASONS else [name, f"    {_reason(error)}"]
        message = "\n".join(lines)
        raise AssertionError(message) from failures[0][1]


def each_row(names: str, rows: Iterable[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a test on each row of a table, as a single test.

    Used like ``pytest.mark.parametrize``. All rows share the test's fixtures, so a test whose rows
    leave something behind clears it first.

    Args:
        names: of the test's arguments, separated by commas.
        rows: values of these; tuples where there are several names.
    """
    arguments = [name.strip() for name in names.split(",")]
    table = [row if len(arguments) > 1 else (row,) for row in rows]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            named = (dict(zip(arguments, row, strict=True)) for row in table)
            check_each(named, lambda row: test(**fixtures, **row))

        signature = inspect.signature(test)
        others = [each for name, each in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate


@contextlib.contextmanager
def named(row: Any) -> Iterator[None]:
    """Name the row of a table, or the seed, of a check that fails inside a loop."""
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"{row}: {error}") from error


def _shortened(row: Any) -> str:
    text = ", ".join(f"{k}={v!r}" for k, v in row.items()) if isinstance(row, dict) else repr(row)
    return text if len(text) <= _NAME_LENGTH else f"{text[:_NAME_LENGTH]}..."


def _reason(error: BaseException) -> str:
    """The lines of the test that it passed, its type, and the first lines of its message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(Path(frame.filename).name, frame.lineno) for frame in frames]
    where = "".join(f"{name}:{line}: " for name, line in places if name.startswith("test_"))
    lines = str(error).splitlines()[:12]
    return f"{where}{type(error).__name__}: " + "\n        ".join(lines)
