"""The requests and answers of the two protocols.

    openai   POST /v1/chat/completions            messages      any server with OpenAI's routes
             POST /custom/cartridge/chat/completions            where there are cartridges
    toka     POST /generate                       system, prompt

Owns the shapes of JSON. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.client.lm.config import TokasaurusConfig
from tokasaurus.client.reading import read_answer, read_usage
from tokasaurus.client.requests import CartridgeLike, named_cartridges
from tokasaurus.client.results import Logprobs, Usage
from tokasaurus.errors import EngineError, RequestError

__all__ = ["Message", "Post", "Prompt", "Reply", "post_of", "read_reply"]

Message: TypeAlias = Mapping[str, Any]

_CHAT = "/v1/chat/completions"
_CHAT_BEHIND_CARTRIDGES = "/custom/cartridge/chat/completions"
_GENERATE = "/generate"


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
    cartridges: Sequence[CartridgeLike] = ()
    wants_logprobs: bool = False


@dataclass(frozen=True, eq=False)
class Reply:
    """What a server answered.

    Attributes:
        text: without the stop sequence.
        finish_reason: ``stop``, ``length`` or another; None if the server says nothing.
        usage: zeros where the server says nothing.
        token_ids: the generated ones, int32 [tokens]; None if the server does not say.
        logprobs: of the generated tokens; None if they were not asked for.
    """

    text: str
    finish_reason: str | None
    usage: Usage
    token_ids: NDArray[np.int32] | None = None
    logprobs: Logprobs | None = None

    def is_truncated(self, max_output_tokens: int) -> bool:
        """Whether the answer reached the limit of tokens before its end."""
        if self.finish_reason is None:
            return self.usage.completion_tokens >= max_output_tokens
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
        body["cartridges"] = named_cartridges(prompt.cartridges)
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


def read_reply(body: Any, protocol: str) -> Reply:
    """Reads the JSON of an answer.

    Raises:
        EngineError: it is none of the protocol.
    """
    try:
        if protocol == "toka" and "output_ids" not in body:
            return _read_short(body)
        answer = read_answer(body)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, EngineError) as error:
        shown = str(body)[:500]
        raise EngineError(
            f"this is no answer of protocol {protocol} ({error!r}): {shown}"
        ) from error
    choice = answer.choices[0]
    if not isinstance(choice.text, str):
        raise EngineError(f"the text of this answer is none: {str(body)[:500]}")
    return Reply(choice.text, choice.finish_reason, answer.usage, choice.token_ids, choice.logprobs)


def _read_short(body: Mapping[str, Any]) -> Reply:
    """An answer of ``/generate`` by servers that tell the text only."""
    text = body.get("text")
    if text is None:
        text = body["output"]
    if not isinstance(text, str):
        raise TypeError("the text is none")
    reason = body.get("finish_reason", body.get("reason"))
    return Reply(text, reason, read_usage(body.get("usage")))
