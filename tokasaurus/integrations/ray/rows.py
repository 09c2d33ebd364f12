"""What travels through Ray Data: blocks to engines, and back what became of them. As JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from tokasaurus import errors
from tokasaurus.batch.lines import BadLine, Line, Request
from tokasaurus.batch.records import Usage
from tokasaurus.errors import EngineError, TokasaurusError
from tokasaurus.integrations.ray.batch_files import Block

__all__ = ["BlockDone", "Row", "decode_row", "encode_row"]


@dataclass(frozen=True)
class BlockDone:
    """What the driver learns of a block that has its result file.

    Attributes:
        name: of its result file.
        num_lines: of the block.
        num_bytes: about what they take of the input file.
        num_failed: lines with an error; None if an earlier run has answered the block.
        usage: the tokens of the answers of this run.
    """

    name: str
    num_lines: int
    num_bytes: float
    num_failed: int | None = None
    usage: Usage = Usage()  # noqa: RUF009  # it is frozen


Row: TypeAlias = Block | BlockDone | TokasaurusError
"""A block to answer, one that is done, or the error that ends the run."""


def encode_row(row: Row) -> bytes:
    """A row as JSON, with integers of any size."""
    if isinstance(row, Block):
        lines = [[isinstance(line, Request), dataclasses.asdict(line)] for line in row.lines]
        content: Any = {"block": {"name": row.name, "lines": lines, "num_bytes": row.num_bytes}}
    elif isinstance(row, BlockDone):
        content = {"done": msgspec.to_builtins(row)}
    else:
        content = {"error": [type(row).__name__, str(row)]}
    return json.dumps(content).encode()


def decode_row(data: bytes) -> Row:
    """What ``encode_row`` was given. An error that has more than a message is an EngineError."""
    content = json.loads(data)
    if "block" in content:
        fields = content["block"]
        lines = tuple(_line(is_request, each) for is_request, each in fields["lines"])
        return Block(fields["name"], lines, fields["num_bytes"])
    if "done" in content:
        return msgspec.convert(content["done"], BlockDone)
    name, message = content["error"]
    kind = getattr(errors, name, EngineError)
    try:
        error: TokasaurusError = kind(message)
    except TypeError:  # it has more than a message
        error = EngineError(message)
    return error


def _line(is_request: bool, fields: dict[str, Any]) -> Line:
    return Request(**fields) if is_request else BadLine(**fields)
