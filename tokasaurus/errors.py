"""Every exception that Tokasaurus raises on purpose.

    TokasaurusError
    ├── ConfigError             a flag, config file or combination of flags is wrong      (exit status 2)
    ├── ModelError              a checkpoint cannot be served: names the file, tensor or field
    ├── RequestError            one request is wrong: names the field                     (HTTP 400)
    │   ├── RequestTooLong      the request can never fit                                 (HTTP 400)
    │   ├── NotFound            there is no such file or batch                            (HTTP 404)
    │   └── Conflict            a file or batch is in a state that forbids it             (HTTP 409)
    └── EngineError             the engine cannot serve
        ├── EngineNotReady      it is still loading, or it is draining                    (HTTP 503)
        ├── EngineOverloaded    it has enough to do for now: says when to come again      (HTTP 429)
        ├── StorageFull         its disk has no room for a file or batch                  (HTTP 507)
        ├── EngineDead          one of its processes ended: carries the cause             (HTTP 503)
        └── ProtocolError       two rooms disagree; a defect in Tokasaurus, never in a request

A wrong argument to a Python function still raises ``TypeError`` or ``ValueError`` where that is what
a Python user expects: ``RequestError`` is a ``ValueError`` too.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "Conflict",
    "EngineDead",
    "EngineError",
    "EngineNotReady",
    "EngineOverloaded",
    "ModelError",
    "NotFound",
    "ProtocolError",
    "RequestError",
    "RequestTooLong",
    "StorageFull",
    "TokasaurusError",
]


class TokasaurusError(Exception):
    """Base of every error below; catch it to catch them all."""


class ConfigError(TokasaurusError):
    """A flag, a config file or a combination of flags is wrong.

    Args:
        message: one or several lines, each naming a flag and the remedy.
    """


class ModelError(TokasaurusError):
    """A model directory cannot be served; the message names the file, tensor or field."""


class RequestError(TokasaurusError, ValueError):
    """One request is wrong.

    Args:
        message: what is wrong and what would be right.
        field: the request field at fault, as the client spells it; None if it is no single field.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class RequestTooLong(RequestError):
    """The prompt and its completion can never fit the context or the KV cache."""


class NotFound(RequestError):
    """There is nothing of this name."""


class Conflict(RequestError):
    """What is asked for does not go with the state of what it is asked of."""


class EngineError(TokasaurusError):
    """The engine as a whole cannot serve."""


class EngineNotReady(EngineError):
    """The engine is loading or draining; try again later."""


class EngineOverloaded(EngineError):
    """The engine has enough to do.

    Args:
        message: how much, and by which limit.
        retry_after_s: when there will probably be room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFull(EngineError):
    """The disk has no room for a file or a batch; nothing of it is kept."""


class EngineDead(EngineError):
    """A process of the engine ended; the message says which and why."""


class ProtocolError(EngineError):
    """Two rooms disagree about the state of the engine: a defect in Tokasaurus."""
