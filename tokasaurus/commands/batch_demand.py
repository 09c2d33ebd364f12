"""The demand of a file of requests for ``toka-batch``: its prompts are tokenized, nothing runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tokasaurus import untrusted_json
from tokasaurus.batch.lines import BadLine, parse_line
from tokasaurus.batch.tables import requests_in
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import ModelFacts, ServerConfig
from tokasaurus.errors import ConfigError, RequestError
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.text.preparation import PreparedRequest, Preparer
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["batch_demand", "is_batch_file"]

_OF_TRACES = {"arrival_s", "prompt_tokens", "output_tokens"}  # fields that no request has
_SAME_START = 16  # ids by which prompts are grouped that may share a prefix


def is_batch_file(path: Path) -> bool:
    """Whether a file is meant to have requests, by its first line, and not lines of a trace.

    A file that cannot be read has none.
    """
    try:
        with path.open("rb") as file:
            first = next(requests_in(file, path), (0, None))[1]
    except OSError:
        return False
    try:
        fields = untrusted_json.decode(first or b"")
    except ValueError:
        return False
    return isinstance(fields, dict) and _OF_TRACES.isdisjoint(fields)


def batch_demand(path: Path, facts: ModelFacts, output_tokens: int | None) -> Demand:
    """Measures the prompts of a file.

    Args:
        path: the file, JSONL or Parquet, whose lines are requests.
        facts: of the model, whose directory has the tokenizer.
        output_tokens: that a sample generates; None if each takes all that it may.

    Raises:
        ConfigError: a line is not a request that the engine would run; names the line.
        ModelError: the model has no tokenizer.
    """
    server = _server(facts)
    preparer = Preparer(server, Tokenizer.load(server))
    try:
        with path.open("rb") as file:
            prompts = _prompts(file, path, preparer)
    except OSError as error:
        raise ConfigError(f"workload={path}: {error.strerror}") from None
    shared = _shared(prompts)
    trace = [
        _line(prompt, shared.get(index, (None, 0)), output_tokens)
        for index, prompt in enumerate(prompts)
    ]
    return Demand(trace, str(path))


def _server(facts: ModelFacts) -> ServerConfig:
    """The slice of an engine that takes whatever the model has positions for."""
    flags = {"device": "cpu", "kv_cache_num_tokens": facts.max_position_embeddings}
    config = EngineConfig.from_flags(model=facts.path, **flags)
    return resolve(config, facts, num_cuda_devices=0, memory_bytes=None).server


def _prompts(file: BinaryIO, path: Path, preparer: Preparer) -> list[PreparedRequest]:
    found: list[PreparedRequest] = []
    for number, line in requests_in(file, path):
        where = f"workload={path}: line {number}"
        request = parse_line(number, line, None, OPERATIONS)
        if isinstance(request, BadLine):
            raise ConfigError(f"{where}: {request.message}")
        operation = OPERATIONS[request.url]
        try:
            found += operation.prepare(operation.read(request.body), preparer).prompts
        except RequestError as error:
            raise ConfigError(f"{where}: {error}") from None
    return found


def _shared(prompts: list[PreparedRequest]) -> dict[int, tuple[int, int]]:
    """For each prompt that begins like others: a number for those, and the tokens they share."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt.prompt_ids[:_SAME_START].tobytes()].append(index)
    shared = {}
    for number, members in enumerate(groups.values()):
        if len(members) < 2:
            continue
        first = prompts[members[0]].prompt_ids
        length = len(first)
        for member in members[1:]:
            other = prompts[member].prompt_ids[:length]
            length = len(other)
            differs = np.flatnonzero(first[:length] != other)
            length = int(differs[0]) if len(differs) else length
        shared.update(dict.fromkeys(members, (number, length)))
    return shared


def _line(
    prompt: PreparedRequest, prefix: tuple[int | None, int], output_tokens: int | None
) -> TraceRequest:
    message = prompt.message(0, stream=False, client="")
    length = min(output_tokens or message.max_tokens, message.max_tokens)
    return TraceRequest(
        arrival_s=0.0,
        prompt_tokens=len(message.prompt_ids),
        output_tokens=(length,) * message.n,
        max_tokens=message.max_tokens,
        prefix_id=prefix[0],
        prefix_tokens=prefix[1],
        first_k=message.first_k,
        stop_strings=message.hold_for_acks,
        num_logprobs=message.num_logprobs,
    )
