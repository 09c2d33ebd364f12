"""Checks the whole input file of a batch before any of it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from tokasaurus.batch.lines import BadLine, Line, error_line, parse_line, read_lines
from tokasaurus.batch.records import BatchError, BatchErrors, RequestCounts
from tokasaurus.batch.store import NewAnswer

__all__ = ["Verdict", "checked_lines", "validate"]

_MAX_ERRORS = 100  # listed


@dataclass(frozen=True)
class Verdict:
    """Whether a batch can run.

    Attributes:
        errors: why no line can run; None if some can.
        counts: how many lines there are.
        bad: the answers of the lines that cannot run.
    """

    errors: BatchErrors | None
    counts: RequestCounts
    bad: list[NewAnswer]


def validate(
    path: Path,
    endpoint: str | None,
    urls: Collection[str],
    max_lines: int,
    is_cancelled: Callable[[], bool],
) -> Verdict:
    """Reads the file. May take seconds, and returns early once the batch is cancelled.

    Args:
        path: the input file.
        endpoint: the url of every line; None if urls may differ.
        urls: the urls that requests may have.
        max_lines: how many lines a batch may have.
        is_cancelled: whether the verdict is not needed any more.
    """
    total = 0
    bad: list[BadLine] = []
    for line in checked_lines(read_lines(path), endpoint, urls):
        if line.line > max_lines:
            message = f"a batch may have at most {max_lines} lines"
            return _refused(BatchError("too_many_lines", message))
        if is_cancelled():
            break
        total += 1
        if isinstance(line, BadLine):
            bad.append(line)
    if total == 0:
        return _refused(BatchError("empty_file", "the input file has no lines"))
    if len(bad) == total:  # the file is not a batch, or is for another endpoint
        errors = (BatchError(each.code, each.message, each.line) for each in bad[:_MAX_ERRORS])
        return _refused(*errors)
    answers = [
        NewAnswer(each.line, error_line(each.name, each.code, each.message), True) for each in bad
    ]
    return Verdict(None, RequestCounts(total), answers)


def checked_lines(
    lines: Iterable[tuple[int, bytes | None]], endpoint: str | None, urls: Collection[str]
) -> Iterator[Line]:
    """Parses the lines of a file; those with the id of an earlier line are bad.

    Args:
        lines: the number and the content of each line; None if it is too long.
        endpoint: the url of every line; None if urls may differ.
        urls: the urls that requests may have.
    """
    seen: set[bytes] = set()  # digests of ids, since ids may be long
    for number, raw in lines:
        line = parse_line(number, raw, endpoint, urls)
        if line.custom_id is not None:
            digest = blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
            if digest in seen:
                message = "custom_id is that of an earlier line; each line must have its own"
                line = BadLine(number, line.custom_id, "duplicate_custom_id", message)
            seen.add(digest)
        yield line


def _refused(*errors: BatchError) -> Verdict:
    return Verdict(BatchErrors(errors), RequestCounts(), [])
