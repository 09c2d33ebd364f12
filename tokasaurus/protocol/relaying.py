"""The messages between the server and the HTTP processes, of which ``server_processes`` are made.

The server looks to each of them like one manager: it takes the same requests, and sends the same
updates. Beside these it says what an HTTP process must know of the engine as a whole.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from tokasaurus.protocol.identity import WeightFile, WorkerIdentity
from tokasaurus.protocol.message import Message
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    GenerateRequest,
    PooledState,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    SequenceUpdates,
    StopSequence,
)

__all__ = [
    "AcquirePrefix",
    "AnswerCounts",
    "EngineNews",
    "FromHTTP",
    "PrefixAcquired",
    "PrefixRefused",
    "ReleasePrefix",
    "RequestFailed",
    "Submit",
    "ToHTTP",
    "WeightsUpdate",
]


# --- from an HTTP process to the server -----------------------------------------------------------


class Submit(Message, frozen=True):
    """A prompt to run."""

    request: GenerateRequest
    # By which a client may end it.
    names: tuple[str, ...] = ()
    # Refuse it if the queue is full. The further prompts of a request follow its first one.
    needs_room: bool = True


class AnswerCounts(Message, frozen=True):
    """The HTTP requests that were answered since the last such message.

    The first one says that the HTTP process can serve.
    """

    number: int  # of the process
    counts: tuple[tuple[str, str, int], ...] = ()  # path, status, answers


class AcquirePrefix(Message, frozen=True):
    """Find the cartridges that a request names, and keep them until ReleasePrefix.

    Answered by PrefixAcquired or PrefixRefused.
    """

    ticket: int  # unique; from it follows the process, as from the id of a request
    specs: tuple[tuple[str, str, bool], ...]  # id, source, force_redownload


class ReleasePrefix(Message, frozen=True):
    """The requests have ended that needed the cartridges, or do not wait for them any more."""

    ticket: int


# --- from the server to an HTTP process -----------------------------------------------------------


class RequestFailed(Message, frozen=True):
    """The engine could not answer a request; no update of it follows."""

    request_id: int
    reason: str
    retry_after_s: int | None = None  # if it was refused because the queue is full


class PrefixAcquired(Message, frozen=True):
    """The cartridges of a request can be used."""

    ticket: int
    name: str  # by which the managers know them
    num_tokens: int  # positions that they take
    digests: tuple[str, ...]


class PrefixRefused(Message, frozen=True):
    """The cartridges of a request cannot be had."""

    ticket: int
    kind: str  # the name of an error of tokasaurus.errors
    reason: str
    field: str | None = None


class WeightsUpdate(msgspec.Struct, frozen=True):
    """Files of new weights, as they were when the update began."""

    version: int
    files: tuple[WeightFile, ...]


class EngineNews(Message, frozen=True):
    """The state of the engine, as far as answers depend on it. Sent when it changes.

    The first one comes when the engine can serve.
    """

    weights_version: int
    labels: dict[int, str]  # of versions of the weights, those that clients gave
    # None if they are what they were.
    workers: tuple[WorkerIdentity, ...] | None = None
    # The latest update of the weights, or of a process that is new, the latest ones.
    updates: tuple[WeightsUpdate, ...] = ()
    # Prompts in flight, and their clients; only kept up while there are many prompts.
    num_prompts: int = 0
    num_clients: int = 0
    retry_after_s: int = 1


FromHTTP: TypeAlias = (
    Submit
    | AbortRequest
    | StopSequence
    | Acknowledge
    | AnswerCounts
    | AcquirePrefix
    | ReleasePrefix
)
ToHTTP: TypeAlias = (
    SequenceUpdates
    | PromptLogprobs
    | PooledState
    | RequestRejected
    | RequestStage
    | RequestFailed
    | EngineNews
    | PrefixAcquired
    | PrefixRefused
)
