"""The requests and answers of the two protocols.

    openai   POST /v1/chat/completions            messages      any server with OpenAI's routes
             POST /custom/cartridge/chat/completions            where there are cartridges
    toka     POST /generate                       system, prompt

Owns the shapes of JSON. Sends nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tokasaurus.client.lm.config import CartridgeReference, TokasaurusConfig
from tokasaurus.errors import RequestError

__all__ = ["Answer", "Message", "Prompt", "UnreadableAnswer", "post_of", "read_answer"]

Message: TypeAlias = Mapping[str, Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int32]

_CHAT = "/v1/chat/completions"
_CHAT_BEHIND_CARTRIDGES = "/custom/cartridge/chat/completions"
_GENERATE = "/generate"


class UnreadableAnswer(ValueError):
    """An answer whose status is success is none of the protocol."""


@dataclass(frozen=True)
class Prompt:
    """What a call asks.

    Attributes:
        messages: with ``role`` and ``content``.
        temperature: of this call.
        cartridges: that come before the messages.
        wants_logprobs: whether the caller can take logprobs.
    """

    messages: Sequence[Message]
    temperature: float
    cartridges: Sequence[CartridgeReference] = ()
    wants_logprobs: bool = False


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        text: without the stop sequence.
        finish_reason: ``stop``, ``length`` or another; None if the server says nothing.
        output_ids: the generated token ids, [tokens]; None if the server does not say.
        logprobs: of the generated tokens, [tokens]; None if they were not asked for.
        topk_ids, topk_logprobs: of the likeliest tokens in each place, [tokens, k].
    """

    text: str
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    total_tokens: int
    thinking_tokens: int | None = None
    output_ids: list[int] | None = None
    logprobs: Floats | None = None
    topk_ids: Ints | None = None
    topk_logprobs: Floats | None = None

    def is_truncated(self, max_output_tokens: int) -> bool:
        """Whether the answer reached the limit of tokens before its end."""
        if self.finish_reason is None:
            return self.output_tokens >= max_output_tokens
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Post:
    """A request.

    Attributes:
        path: below the server's address.
        body: its JSON.
    """

    path: str
    body: dict[str, Any] = field(repr=False)


def post_of(prompt: Prompt, config: TokasaurusConfig) -> Post:
    """The request that asks a prompt.

    Raises:
        RequestError: the protocol has no place for the messages.
    """
    body: dict[str, Any] = {"model": config.server_model}
    if config.protocol == "openai":
        path = _CHAT_BEHIND_CARTRIDGES if prompt.cartridges else _CHAT
        body["messages"] = [dict(message) for message in prompt.messages]
    else:
        path = _GENERATE
        body |= _system_and_prompt(prompt.messages)
    body |= {"temperature": prompt.temperature, "max_tokens": config.max_output_tokens}
    if config.stop_sequences:
        body["stop"] = config.stop_sequences
    if config.seed is not None:
        body["seed"] = config.seed
    if config.top_p is not None:
        body["top_p"] = config.top_p
    if prompt.cartridges:
        body["cartridges"] = [
            {"id": each, "source": "local"} if isinstance(each, str) else dict(each)
            for each in prompt.cartridges
        ]
    if prompt.wants_logprobs and config.top_logprobs is not None:
        body |= _logprobs(config.protocol, config.top_logprobs)
    return Post(path, body | config.extra_body)


def _logprobs(protocol: str, k: int) -> dict[str, Any]:
    if protocol == "toka":
        return {"logprobs": k, "logprobs_ignore_temperature": True}
    return {
        "logprobs": True,
        "top_logprobs": k,
        "logprobs_ignore_temperature": True,
        "logprobs_in_fingerprint": True,
    }


def _system_and_prompt(messages: Sequence[Message]) -> dict[str, Any]:
    roles = [message.get("role") for message in messages]
    texts = [message.get("content") for message in messages]
    if roles not in (["user"], ["system", "user"]) or not all(isinstance(t, str) for t in texts):
        raise RequestError(
            "protocol toka takes a system message and a user's message, both texts; set protocol:"
            f" openai for conversations (roles here: {', '.join(map(str, roles)) or 'none'})",
            "messages",
        )
    *system, prompt = texts
    return {**({"system": system[0]} if system else {}), "prompt": prompt}


def read_answer(body: Any, protocol: str) -> Answer:
    """Reads the JSON of an answer.

    Raises:
        UnreadableAnswer: it is none of the protocol.
    """
    try:
        return _read_openai(body) if protocol == "openai" else _read_toka(body)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        shown = json.dumps(body, default=str)[:500]
        raise UnreadableAnswer(
            f"the answer is none of protocol {protocol} ({type(error).__name__}: {error}): {shown}"
        ) from error


def _read_openai(body: Any) -> Answer:
    choice = body["choices"][0]
    message = choice.get("message") or {}
    text = message.get("content")
    if text is None:
        text = choice.get("text")
    if text is None and not message:
        raise KeyError("message")
    packed = _fingerprint(body.get("system_fingerprint"))
    logprobs = _packed(packed, "packed_chosen_logprobs", "<f4")
    num_tokens = 0 if logprobs is None else len(logprobs)
    ids = packed.get("completion_ids")
    return Answer(
        text=_text(text or ""),
        finish_reason=choice.get("finish_reason"),
        **_usage(body),
        output_ids=list(ids[0]) if ids else None,
        logprobs=logprobs,
        topk_ids=_rows(_packed(packed, "packed_topk_indices", "<i4"), num_tokens),
        topk_logprobs=_rows(_packed(packed, "packed_topk_logprobs", "<f4"), num_tokens),
    )


def _read_toka(body: Any) -> Answer:
    text = body.get("text")
    if text is None:
        text = body["output"]
    columns = body.get("logprobs") or {}
    chosen = columns.get("token_logprobs")
    ids, top = columns.get("top_ids"), columns.get("top_logprobs")
    num_tokens = len(chosen or ())
    return Answer(
        text=_text(text),
        finish_reason=body.get("finish_reason", body.get("reason")),
        **_usage(body),
        output_ids=body.get("output_ids"),
        logprobs=None if chosen is None else np.asarray(chosen, np.float32),
        topk_ids=_rows(np.asarray(ids, np.int32), num_tokens) if ids else None,
        topk_logprobs=_rows(np.asarray(top, np.float32), num_tokens) if top else None,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the text is {type(value).__name__}")
    return value


def _usage(body: Mapping[str, Any]) -> dict[str, Any]:
    usage = body.get("usage") or {}
    details = usage.get("completion_tokens_details") or {}
    num_input = int(usage.get("prompt_tokens") or 0)
    num_output = int(usage.get("completion_tokens") or 0)
    return {
        "input_tokens": num_input,
        "output_tokens": num_output,
        "total_tokens": int(usage.get("total_tokens") or num_input + num_output),
        "thinking_tokens": details.get("reasoning_tokens"),
    }


def _fingerprint(text: Any) -> dict[str, Any]:
    """What an engine packs into ``system_fingerprint``; nothing from other servers."""
    try:
        fields = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _packed(fields: Mapping[str, Any], name: str, dtype: str) -> npt.NDArray[Any] | None:
    values = fields.get(name)
    if not values:
        return None
    # A copy: an array over bytes cannot be written to.
    return np.frombuffer(base64.b64decode(values[0]), dtype).astype(
        np.dtype(dtype).newbyteorder("=")
    )


def _rows(values: npt.NDArray[Any] | None, num_tokens: int) -> npt.NDArray[Any] | None:
    """[tokens * k] -> [tokens, k]"""
    if values is None or num_tokens == 0:
        return None
    return values.reshape(num_tokens, -1)
