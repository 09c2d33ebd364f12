"""Reads a batch's whole file once, before any of it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from tokasaurus.batch.lines import BadLine, error_line, parse_line, read_lines
from tokasaurus.batch.records import BatchError, BatchErrors, RequestCounts
from tokasaurus.batch.store import NewAnswer

__all__ = ["Verdict", "validate"]

_MAX_ERRORS = 100  # that are told


@dataclass(frozen=True)
class Verdict:
    """What is to become of a batch.

    Attributes:
        errors: why none of it can run; None if some of it can.
        counts: how many lines there are.
        bad: the answers of those that cannot run.
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
    """Reads the file. May take seconds, and returns early once it is cancelled.

    Args:
        path: of the file.
        endpoint: of the batch; None if lines may differ.
        urls: that there are.
        max_lines: that a batch may have.
        is_cancelled: the verdict is of no interest any more.
    """
    total = 0
    bad: list[BadLine] = []
    seen: set[bytes] = set()  # digests of ids: the ids may be long
    for number, raw in read_lines(path):
        if number > max_lines:
            return _refused(BatchError("too_many_lines", f"a batch may have {max_lines} lines"))
        if is_cancelled():
            break
        total += 1
        line = parse_line(number, raw, endpoint, urls)
        if line.custom_id is not None:
            digest = blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
            if digest in seen:
                message = "custom_id is that of an earlier line; each must have its own"
                line = BadLine(number, line.custom_id, "duplicate_custom_id", message)
            seen.add(digest)
        if isinstance(line, BadLine):
            bad.append(line)
    if total == 0:
        return _refused(BatchError("empty_file", "the input file has no lines"))
    if len(bad) == total:  # it is no batch at all, or for another endpoint
        errors = (BatchError(each.code, each.message, each.line) for each in bad[:_MAX_ERRORS])
        return _refused(*errors)
    answers = [
        NewAnswer(each.line, error_line(each.custom_id, each.code, each.message), True)
        for each in bad
    ]
    return Verdict(None, RequestCounts(total), answers)


def _refused(*errors: BatchError) -> Verdict:
    return Verdict(BatchErrors(errors), RequestCounts(), [])
