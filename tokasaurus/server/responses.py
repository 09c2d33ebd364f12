"""``POST /v1/responses``: OpenAI's Responses API, without anything that a server would have to remember.

A conversation comes whole with each request: nothing is stored, so that there is no response to go on from, to
look up or to delete.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.server.fields import HARMLESS
from tokasaurus.server.generation import Generation, Generations, PreparedRequest
from tokasaurus.server.logprobs import chat_logprobs
from tokasaurus.server.params import renamed
from tokasaurus.server.render import takes_long
from tokasaurus.server.samples import SampleOutput
from tokasaurus.server.schemas import GenerationRequest
from tokasaurus.server.tasks import Operation, Task
from tokasaurus.server.tokenizer import Tokenizer
from tokasaurus.server.writer import StreamWriter

__all__ = ["RESPONSES", "ResponsesRequest"]

_CHAT_TEMPERATURE = 0.7
_LOGPROBS = "message.output_text.logprobs"  # what ``include`` may name


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputText(_Item):
    """A part of a message. What an answer's parts have besides is accepted where it comes back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None  # of the answer that this was


class InputMessage(_Item):
    """One message of a conversation; the chat template decides which roles there are."""

    role: str
    content: str | list[InputText]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def for_template(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(_Item):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: str | None = None
    """Of the schema, for people; so is the description."""
    description: str | None = None
    strict: bool | None = None
    """A schema holds whether or not it is strict."""


class TextOptions(_Item):
    format: TextFormat | None = None
    verbosity: None = None

    @property
    def form(self) -> Mapping[str, Any] | None:
        """What the text must be, in the words of ``SamplingParams``; None if it is free."""
        if self.format is None or self.format.type == "text":
            return None
        if self.format.type == "json_object":
            return {"json_object": True}
        return {"json": self.format.json_schema}


Input: TypeAlias = str | Annotated[list[InputMessage], Field(min_length=1)]

_NOT_HERE = {
    "n": "a response is one sample; ask /v1/chat/completions for more",
    "first_k": "a response is one sample",
    "max_tokens": "it is called max_output_tokens here",
    "logprobs_in_fingerprint": "a response has no fingerprint",
    "prompt_logprobs": "a response has no place for them",
    "response_format": "it is called text.format here",
    "stream_options": "a stream of responses always ends with the usage",
}


class ResponsesRequest(GenerationRequest):
    """``POST /v1/responses``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{name: HARMLESS[name] for name in ("lora_path", "cartridges", "safety_identifier")},
        **{name: each for name, each in HARMLESS.items() if name.startswith("prompt_cache")},
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # without tools there is nothing to call
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "truncation": ("disabled",),
    }

    input: Input
    """What the user says, or a conversation."""
    instructions: str | None = None
    """A system message before it."""
    max_output_tokens: int | None = None
    """Default: the rest of the context."""
    text: TextOptions | None = None
    """What the text must be: ``{"format": {"type": "json_schema", "name": ..., "schema": ...}}``, or json_object."""
    include: list[Literal["message.output_text.logprobs"]] | None = None
    """Say the logprobs of the answer's tokens."""
    top_logprobs: int | None = None
    """And those of so many likeliest tokens."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    def field_names(self) -> Mapping[str, str]:
        return {
            **super().field_names(),
            "logprobs": "top_logprobs",
            "max_tokens": "max_output_tokens",
            "messages": "input",
            "prompt": "input",
        }

    def check(self) -> None:
        super().check()
        for name, reason in _NOT_HERE.items():
            value = getattr(self, name)
            if value is not None and not (name == "n" and value == 1):
                raise RequestError(f"{name} is not supported: {reason}", name)
        form = None if self.text is None else self.text.form
        if form is not None and super()._form[0] is not None:
            raise RequestError(
                f"text cannot be combined with {super()._form[0]}: both say what it must be", "text"
            )
        format_ = None if self.text is None else self.text.format
        if format_ and format_.type != "json_schema" and format_.json_schema is not None:
            raise RequestError(f"text.format of type {format_.type} has no schema", "text")
        if form == {"json": None}:
            raise RequestError("text.format of type json_schema must have a schema", "text")
        if self.top_logprobs and not self.include:
            raise RequestError(f"top_logprobs needs include to name {_LOGPROBS!r}", "top_logprobs")

    @property
    def _form(self) -> tuple[str | None, Mapping[str, Any] | None]:
        form = None if self.text is None else self.text.form
        return super()._form if form is None else ("text", form)

    def messages(self) -> list[dict[str, str]]:
        """The conversation, for the chat template."""
        if isinstance(self.input, str):
            messages = [{"role": "user", "content": self.input}]
        else:
            messages = [message.for_template() for message in self.input]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return messages


class _ResponsesWriter(StreamWriter):
    """Writes a response, or the events of which its stream consists.

    Args:
        request: what was asked.
        prepared: its prompt, with everything decided that the client left open.
        model: the name to answer with where the request has none.
        tokenizer: spells tokens for logprobs.
    """

    def __init__(
        self, request: ResponsesRequest, prepared: PreparedRequest, model: str, tokenizer: Tokenizer
    ) -> None:
        self._with_logprobs = request.num_logprobs is not None
        self._tokenizer = tokenizer
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model if request.model is None else request.model,
            "background": False,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": prepared.sampling.temperature,
            "text": _text(request),
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": prepared.sampling.top_p,
            "truncation": "disabled",
            "user": request.user,
            **request.echoed(),
        }
        self._num_events = 0
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self._with_logprobs)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        (output,) = generations[0].take_all()
        self._take(output)
        return msgspec.json.encode(self._finished(generations[0]))

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        events = [] if self._num_events else self._beginning()
        logprobs = self._take(output)
        if output.text or logprobs:
            fields = {**self._place, "delta": output.text, "logprobs": logprobs}
            events.append(self._event("response.output_text.delta", **fields))
        return b"".join(events)

    def end(self, generations: Sequence[Generation]) -> bytes:
        response = self._finished(generations[0])
        (item,) = response["output"]
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return b"".join(
            [
                self._event("response.output_text.done", **self._place, **done),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{response['status']}", response=response),
            ]
        )

    def failure(self, error: TokasaurusError) -> bytes:
        told = {"code": "server_error", "message": str(error)}
        response = {**self._head, "status": "failed", "output": [], "error": told}
        return self._event("response.failed", response=response)

    @property
    def _place(self) -> dict[str, Any]:
        """Of the one part of the one item."""
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _beginning(self) -> list[bytes]:
        response = {**self._head, "status": "in_progress", "output": []}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event(
                "response.output_item.added", output_index=0, item=self._item("in_progress", [])
            ),
            self._event("response.content_part.added", **self._place, part=_part("", [])),
        ]

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"

    def _take(self, output: SampleOutput) -> list[dict[str, Any]]:
        """Keeps what came, for the end; returns its logprobs."""
        self._texts.append(output.text)
        self._finish_reason = output.finish_reason
        if output.logprobs is None or not self._with_logprobs:
            return []
        entries = chat_logprobs(self._tokenizer, output.token_ids, output.logprobs)["content"]
        self._logprobs += entries
        return list(entries)

    def _finished(self, generation: Generation) -> dict[str, Any]:
        is_whole = self._finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        part = _part("".join(self._texts), self._logprobs)
        num_tokens = generation.num_generated_tokens
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._item(status, [part])],
            "usage": {
                "input_tokens": generation.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.num_cached_tokens},
                "output_tokens": num_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": generation.num_prompt_tokens + num_tokens,
            },
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _text(request: ResponsesRequest) -> dict[str, Any]:
    if request.text is None or request.text.format is None:
        return {"format": {"type": "text"}}
    return {"format": request.text.format.model_dump(by_alias=True, exclude_none=True)}


def _prepare(body: ResponsesRequest, generations: Generations) -> Task:
    """Answers the last message of a conversation."""
    tokenizer, config = generations.tokenizer, generations.config
    try:
        prepared = generations.prepare(
            tokenizer.render_chat(body.messages()),
            body.params(),
            default_temperature=_CHAT_TEMPERATURE,
            client_key=body.user,
        )
    except RequestError as error:
        raise renamed(error, body.field_names()) from None
    return Task(body, [prepared], _ResponsesWriter(body, prepared, config.model_name, tokenizer))


def _num_characters(body: ResponsesRequest) -> int:
    return sum(len(message["content"]) for message in body.messages())


RESPONSES = Operation("/v1/responses", ResponsesRequest, _num_characters, _prepare)
