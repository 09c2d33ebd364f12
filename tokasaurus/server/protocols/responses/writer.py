"""Writes responses, whole or as typed events, which open and close one item after the other."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.operations.heavy_work import takes_long
from tokasaurus.server.operations.logprobs import chat_logprobs
from tokasaurus.server.operations.receipts import receipt_field
from tokasaurus.server.operations.usage import cartridge_tokens
from tokasaurus.server.operations.writer import StreamWriter
from tokasaurus.server.protocols.tools.call_reader import CallBegins
from tokasaurus.server.protocols.tools.parsing import AnswerParser, Text
from tokasaurus.server.protocols.tools.reasoning import Reasoning
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["ResponsesWriter"]

_Event: TypeAlias = tuple[str, dict[str, Any]]  # type and fields


class _Item(ABC):
    """One item of the output while it grows.

    Args:
        index: among the items.

    Attributes:
        prefix: of its id.
        event: the beginning of the types of its text's events.
    """

    prefix: str
    event: str

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.pieces: list[str] = []
        self._index = index

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def begin(self) -> list[_Event]:
        item = self.written("in_progress")
        return [("response.output_item.added", {"output_index": self._index, "item": item})]

    def add(self, piece: str, **more: Any) -> _Event:
        self.pieces.append(piece)
        return f"{self.event}.delta", {**self._place(), "delta": piece, **more}

    def end(self, status: str) -> list[_Event]:
        item = self.written(status)
        return [("response.output_item.done", {"output_index": self._index, "item": item})]

    @abstractmethod
    def written(self, status: str) -> dict[str, Any]:
        """The item as JSON."""

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}


class _PartItem(_Item):
    """An item whose text is in a single part."""

    def begin(self) -> list[_Event]:
        part = self._part("")
        added = ("response.content_part.added", {**self._place(), "part": part})
        return [*super().begin(), added]

    def end(self, status: str) -> list[_Event]:
        part = self._part(self.text)
        done: dict[str, Any] = {name: part[name] for name in ("text", "logprobs") if name in part}
        return [
            (f"{self.event}.done", {**self._place(), **done}),
            ("response.content_part.done", {**self._place(), "part": part}),
            *super().end(status),
        ]

    def _place(self) -> dict[str, Any]:
        return {**super()._place(), "content_index": 0}

    def _content(self, status: str) -> list[dict[str, Any]]:
        return [] if status == "in_progress" else [self._part(self.text)]

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]:
        """The part with this text."""


class _Message(_PartItem):
    prefix, event = "msg", "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[dict[str, Any]] = []

    def add(self, piece: str, **more: Any) -> _Event:
        self._logprobs += more["logprobs"]
        return super().add(piece, **more)

    def written(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": self._content(status),
        }

    def _part(self, text: str) -> dict[str, Any]:
        logprobs = list(self._logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class _Thoughts(_PartItem):
    prefix, event = "rs", "response.reasoning_text"

    def written(self, status: str) -> dict[str, Any]:
        content = self._content(status)
        return {
            "id": self.id,
            "type": "reasoning",
            "summary": [],
            "status": status,
            "content": content,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


class _Call(_Item):
    prefix, event = "fc", "response.function_call_arguments"

    def __init__(self, index: int, name: str) -> None:
        super().__init__(index)
        self._name = name
        self._call_id = f"call_{uuid.uuid4().hex[:24]}"

    def end(self, status: str) -> list[_Event]:
        done = {**self._place(), "name": self._name, "arguments": self.text}
        return [(f"{self.event}.done", done), *super().end(status)]

    def written(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }


class ResponsesWriter(StreamWriter):
    """Writes a response, whole or as the events of a stream.

    Args:
        head: the fields that repeat the request.
        tokenizer: spells tokens for logprobs.
        parser: finds calls and reasoning in the answer; None if the answer is plain text.
        with_logprobs: add the logprobs of the text; only without a parser.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        tokenizer: Tokenizer,
        parser: AnswerParser | None,
        *,
        with_logprobs: bool,
    ) -> None:
        self._head = head
        self.answer_id = str(head["id"])
        self._tokenizer = tokenizer
        self._parser = parser
        self._with_logprobs = with_logprobs
        self._num_events = 0
        self._item: _Item | None = None  # the one that grows
        self._items: list[dict[str, Any]] = []  # those that are complete
        self._finish_reason: str | None = None

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self._with_logprobs)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        (output,) = generations[0].take_all()
        self._take(output)
        self._close(self._item_status)
        return msgspec.json.encode(self._finished(generations))

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        events: list[_Event] = []
        if not self._num_events:
            response = {**self._head, "status": "in_progress", "output": []}
            events = [
                ("response.created", {"response": response}),
                ("response.in_progress", {"response": response}),
            ]
        return self._encoded(events + self._take(output))

    def end(self, generations: Sequence[Generation]) -> bytes:
        events = self._close(self._item_status)
        response = self._finished(generations)
        # OpenAI has no event for a response that was cancelled.
        events.append((f"response.{self._item_status}", {"response": response}))
        return self._encoded(events)

    def failure(self, error: TokasaurusError) -> bytes:
        told = {"code": "server_error", "message": str(error)}
        response = {**self._head, "status": "failed", "output": [], "error": told}
        return self._encoded([("response.failed", {"response": response})])

    def _encoded(self, events: Sequence[_Event]) -> bytes:
        lines = []
        for kind, fields in events:
            body = {"type": kind, "sequence_number": self._num_events, **fields}
            self._num_events += 1
            lines.append(
                b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"
            )
        return b"".join(lines)

    def _take(self, output: SampleOutput) -> list[_Event]:
        """Adds a piece of the answer to the items; the last item stays open."""
        self._finish_reason = output.finish_reason
        is_final = output.finish_reason is not None
        events: list[_Event] = []
        if self._parser is None:
            logprobs = self._logprobs(output)
            if output.text or logprobs:
                events += self._open(_Message)
                events.append(self._add(output.text, logprobs=logprobs))
        else:
            for part in self._parser.feed(output.text, output.token_ids, final=is_final):
                if isinstance(part, Text):
                    events += self._open(_Message)
                    events.append(self._add(part.text, logprobs=[]))
                elif isinstance(part, Reasoning):
                    events += self._open(_Thoughts)
                    events.append(self._add(part.text))
                elif isinstance(part, CallBegins):
                    events += self._close("completed")
                    self._item = _Call(len(self._items), part.name)
                    events += self._item.begin()
                else:
                    events.append(self._add(part.json))
        if is_final and self._item is None and not self._items:
            events += self._open(_Message)  # a response must have output
        return events

    def _open(self, kind: type[_Message] | type[_Thoughts]) -> list[_Event]:
        """Makes an item of this kind the open one, if it is not open yet."""
        if isinstance(self._item, kind):
            return []
        events = self._close("completed")
        self._item = kind(len(self._items))
        return events + self._item.begin()

    def _add(self, piece: str, **more: Any) -> _Event:
        assert self._item is not None
        return self._item.add(piece, **more)

    def _close(self, status: str) -> list[_Event]:
        if self._item is None:
            return []
        item, self._item = self._item, None
        self._items.append(item.written(status))
        return item.end(status)

    def _logprobs(self, output: SampleOutput) -> list[dict[str, Any]]:
        if output.logprobs is None or not self._with_logprobs:
            return []
        return list(chat_logprobs(self._tokenizer, output.token_ids, output.logprobs)["content"])

    @property
    def _status(self) -> str:
        return "cancelled" if self._finish_reason == "abort" else self._item_status

    @property
    def _item_status(self) -> str:
        """Of the last item."""
        return "completed" if self._finish_reason == "stop" else "incomplete"

    def _finished(self, generations: Sequence[Generation]) -> dict[str, Any]:
        (generation,) = generations
        status, is_whole = self._status, self._finish_reason == "stop"
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        num_tokens = generation.num_generated_tokens
        num_thought = 0 if self._parser is None else self._parser.num_reasoning_tokens
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": details,
            "output": self._items,
            **receipt_field(generations),
            "usage": {
                "input_tokens": generation.num_prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": generation.num_cached_tokens,
                    **cartridge_tokens([generation]),
                },
                "output_tokens": num_tokens,
                "output_tokens_details": {"reasoning_tokens": num_thought},
                "total_tokens": generation.num_prompt_tokens + num_tokens,
            },
        }
