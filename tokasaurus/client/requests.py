"""What each method of a client sends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

import msgspec
import numpy as np

from tokasaurus.errors import RequestError

__all__ = [
    "Call",
    "CartridgeLike",
    "Form",
    "Messages",
    "Prompt",
    "batch_lines",
    "chat",
    "completion",
    "encoded",
    "generation",
    "named_cartridges",
    "path",
]

Prompt: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""A text, a list of texts, token ids (an array, too), or a list of lists of token ids."""
Messages: TypeAlias = Sequence[Mapping[str, Any]] | str
"""Messages, each ``{"role": ..., "content": ...}``; a text is one message of the user."""
CartridgeLike: TypeAlias = Mapping[str, Any] | str
"""``{"id": ..., "source": ..., "force_redownload": ...}``; a text is a local file or name."""


@dataclass(frozen=True)
class Form:
    """A body that uploads a file.

    Attributes:
        fields: beside the file.
        filename: as the engine is told.
        content: the file's bytes, or where they are.
    """

    fields: Mapping[str, str]
    filename: str
    content: bytes | Path


@dataclass(frozen=True)
class Call:
    """A request over HTTP.

    Attributes:
        path: with the query.
        body: JSON; None sends none.
        content: bytes that are no JSON, in the place of ``body``.
        timeout_s: for one attempt; None waits for ever.
        is_repeatable: it may be sent again if it fails.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    form: Form | None = None
    content: bytes | None = None
    timeout_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True


def completion(
    prompt: Prompt,
    model: str | None,
    cartridges: Iterable[CartridgeLike] | CartridgeLike | None,
    logprobs: int | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The body for ``/v1/completions``."""
    body = {"prompt": prompt, **_common(model, cartridges), **fields}
    if logprobs is not None:
        body = {"logprobs_in_fingerprint": True, **body, "logprobs": logprobs}
    return body


def chat(
    messages: Messages,
    model: str | None,
    cartridges: Iterable[CartridgeLike] | CartridgeLike | None,
    logprobs: int | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The body for ``/v1/chat/completions``; a text is the user's message."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"messages": messages, **_common(model, cartridges), **fields}
    if logprobs is not None:
        asked = {"logprobs": True, "top_logprobs": logprobs}
        body = {"logprobs_in_fingerprint": True, **body, **asked}
    if "ids" in body and not messages:
        del body["messages"]
    return body


def generation(
    prompt: str | Sequence[int],
    model: str | None,
    cartridges: Iterable[CartridgeLike] | CartridgeLike | None,
    logprobs: int | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The body for ``/generate``."""
    body = {"prompt": prompt, **_common(model, cartridges), **fields}
    if logprobs is not None:
        body["logprobs"] = logprobs
    return body


def batch_lines(bodies: Iterable[Mapping[str, Any]], endpoint: str) -> bytes:
    """The file of a batch: a line for each body, with the ids ``0``, ``1`` and so on.

    A body that has ``custom_id`` and ``body`` is a line already.
    """
    lines = []
    for number, body in enumerate(bodies):
        line = {"custom_id": str(number), "method": "POST", "url": endpoint, "body": body}
        if "custom_id" in body and "body" in body:
            line = {**line, **body}
        lines.append(encoded(line))
    return b"\n".join([*lines, b""])


def encoded(body: Any) -> bytes:
    """JSON, in which arrays are lists.

    Raises:
        RequestError: something in it cannot be written as JSON.
    """
    if isinstance(body, Mapping):
        for name, value in body.items():
            if isinstance(value, float) and not math.isfinite(value):  # would be written as null
                raise RequestError(f"{name}={value} cannot be written as JSON", name)
    try:
        return msgspec.json.encode(body, enc_hook=_plain)
    except (TypeError, ValueError) as error:
        raise RequestError(f"this request cannot be written as JSON: {error}") from None


def path(*parts: str, query: Mapping[str, Any] | None = None) -> str:
    """A path of escaped parts; an id may be a path or a URL itself."""
    joined = "/" + "/".join(quote(part, safe="") for part in parts)
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return f"{joined}?{urlencode(given)}" if given else joined


def _common(
    model: str | None, cartridges: Iterable[CartridgeLike] | CartridgeLike | None
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if model is not None:
        body["model"] = model
    if cartridges is not None:
        body["cartridges"] = named_cartridges(cartridges)
    return body


def named_cartridges(cartridges: Iterable[CartridgeLike] | CartridgeLike) -> list[dict[str, Any]]:
    """The field ``cartridges`` of a request."""
    if isinstance(cartridges, str | Mapping):
        cartridges = [cartridges]
    return [
        {"id": each, "source": "local"} if isinstance(each, str) else dict(each)
        for each in cartridges
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
