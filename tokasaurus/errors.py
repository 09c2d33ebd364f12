"""Every exception that Tokasaurus raises on purpose.

    TokasaurusError
    ├── ConfigError            a flag, config file or combination of flags is wrong (exit status 2)
    ├── ModelError             a checkpoint cannot be served; names the file, tensor or field
    ├── LaunchError            processes cannot be started on other machines (exit status 2)
    ├── RequestError           a request is wrong; names the field                       (HTTP 400)
    │   ├── RequestTooLong     the request can never fit                                 (HTTP 400)
    │   ├── AccessDenied       the engine wants another key                         (HTTP 401, 403)
    │   ├── NotFound           there is no such file or batch                            (HTTP 404)
    │   └── Conflict           the state of a file, batch or engine forbids the request  (HTTP 409)
    ├── GenerationTruncatedError   an answer reached the limit of tokens before its end
    └── EngineError            the engine cannot serve
        ├── EngineNotReady     it is loading or draining                                 (HTTP 503)
        ├── Unreachable        nothing answers at its address, or the connection broke
        ├── TimedOut           it has not answered in time                          (HTTP 408, 504)
        ├── EngineOverloaded   it has too much to do; says when to try again             (HTTP 429)
        ├── StorageFull        its disk has no room for a file, batch or cartridge       (HTTP 507)
        ├── SourceUnavailable  a source of cartridges cannot be reached, or fails        (HTTP 502)
        ├── EngineAborted      a command aborted the request before it had an answer     (HTTP 503)
        ├── EngineDead         one of its processes ended; says why                      (HTTP 503)
        ├── ReplicasLost       two replicas ended while they had the request             (HTTP 503)
        └── ProtocolError      two rooms disagree: a defect in Tokasaurus, not in a request

A wrong argument to a Python function still raises ``TypeError`` or ``ValueError`` where a Python
user expects it. ``RequestError`` is a ``ValueError`` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AccessDenied",
    "ConfigError",
    "Conflict",
    "EngineAborted",
    "EngineDead",
    "EngineError",
    "EngineNotReady",
    "EngineOverloaded",
    "FailedAnswer",
    "GenerationTruncatedError",
    "LaunchError",
    "ModelError",
    "NotFound",
    "ProtocolError",
    "ReplicasLost",
    "RequestError",
    "RequestTooLong",
    "SourceUnavailable",
    "StorageFull",
    "TimedOut",
    "TokasaurusError",
    "Unreachable",
]


@dataclass(frozen=True)
class FailedAnswer:
    """The answer over HTTP that told a client of an error.

    Attributes:
        status: of HTTP.
        code: of the error, such as "context_length_exceeded"; None if it has none.
        request_id: names the request in the engine's log.
        body: the JSON of the answer; empty if it has none.
    """

    status: int
    code: str | None
    request_id: str | None
    body: Mapping[str, Any]


class TokasaurusError(Exception):
    """The base of all errors of Tokasaurus.

    Attributes:
        answer: of the engine that a client asked over HTTP; None if the error arose here.
    """

    answer: FailedAnswer | None = None


class ConfigError(TokasaurusError):
    """A flag, a config file or a combination of flags is wrong.

    Args:
        message: one or several lines, each naming a flag and the remedy.
    """


class ModelError(TokasaurusError):
    """A model directory cannot be served; the message names the file, tensor or field."""


class LaunchError(TokasaurusError):
    """Processes of an engine cannot be started on other machines; the message says why."""


class RequestError(TokasaurusError, ValueError):
    """One request is wrong.

    Args:
        message: what is wrong and what would be right.
        field: the field at fault, as the client spells it; None if no single field is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class RequestTooLong(RequestError):
    """The prompt and its completion can never fit the context or the KV cache."""

    @classmethod
    def for_context(cls, have: str, limit: int, rest: str, field: str) -> RequestTooLong:
        """With the words of OpenAI, by which clients such as litellm know this error.

        Args:
            have: what is too long, and how long it is.
            limit: the tokens that a request may have.
            rest: what the limit is for, or what would be right.
            field: the field at fault.
        """
        return cls(
            f"{have}; this model's maximum context length is {limit} tokens"
            f" (max_num_tokens_per_request), {rest}",
            field,
        )


class AccessDenied(RequestError):
    """The engine wants another key, or does not serve this client."""


class NotFound(RequestError):
    """There is no file or batch with this name."""


class Conflict(RequestError):
    """The state of a file, a batch or the engine forbids the request."""


class GenerationTruncatedError(TokasaurusError):
    """The answer to a language model's call reached the limit of tokens before its end."""


class EngineError(TokasaurusError):
    """The engine as a whole cannot serve."""


class EngineNotReady(EngineError):
    """The engine is loading or draining; try again later."""


class Unreachable(EngineError):
    """Nothing answers at the engine's address, or the connection broke; the message says which."""


class TimedOut(EngineError):
    """The engine has not answered in time: in the client's time, or in its own."""


class EngineOverloaded(EngineError):
    """The engine has too much to do.

    Args:
        message: how much it has to do, and the limit.
        retry_after_s: seconds until there will probably be room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFull(EngineError):
    """The disk has no room for a file, batch or cartridge, of which nothing is kept."""


class SourceUnavailable(EngineError):
    """A source of cartridges cannot be reached, is too slow, or answers with an error of its own.

    The request may be right. The message names the cartridge and the source.
    """


class EngineAborted(EngineError):
    """A command ended the request before there was anything to answer with."""


class EngineDead(EngineError):
    """A process of the engine ended; the message says which and why."""


class ReplicasLost(EngineError):
    """Two replicas ended while they had the request, so no third one gets it.

    Args:
        first: why the first one ended.
        second: why the second one did.
    """

    def __init__(self, first: str, second: str) -> None:
        super().__init__(
            f"two replicas ended while they had this request ({first}; {second}); it may be the"
            " cause, so no other gets it"
        )


class ProtocolError(EngineError):
    """Two rooms disagree about the state of the engine: a defect in Tokasaurus."""
