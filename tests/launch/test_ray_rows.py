"""Rows of Ray Data are what they were when they arrive."""

from __future__ import annotations

from tokasaurus.batch.lines import BadLine, Request
from tokasaurus.batch.records import Usage
from tokasaurus.errors import ConfigError, EngineDead, EngineError, EngineOverloaded
from tokasaurus.integrations.ray.batch_files import Block
from tokasaurus.integrations.ray.rows import BlockDone, decode_row, encode_row


def test_blocks_and_counts_arrive_as_they_were():
    body = {"prompt": "\ud800 é", "seed": 10**30, "temperature": 0.1, "logit_bias": {"7": None}}
    block = Block(
        "a-000000001-ff.jsonl",
        (Request(1, "x", "/v1/completions", body, 90), BadLine(2, None, "code", "text")),
        1.5,
    )
    done = BlockDone("a", 2, 1.5, 1, Usage.of(5, 1, 7, 2))
    for row in (block, done, BlockDone("b", 1, 0.5)):
        assert decode_row(encode_row(row)) == row


def test_errors_keep_their_class_where_a_message_is_all_they_have():
    for error in (ConfigError("model=x"), EngineDead("gone"), EngineOverloaded("busy", 3)):
        found = decode_row(encode_row(error))
        expected = EngineError if isinstance(error, EngineOverloaded) else type(error)
        assert (type(found), str(found)) == (expected, str(error))
