"""What the router is told of replicas, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.errors import ReplicasLost
from tokasaurus.protocol.messages import Statistics, ToServer

__all__ = ["Loss", "Losses", "Report", "Seats"]


@dataclass(frozen=True)
class Seats:
    """What a replica has room for.

    Attributes:
        num_sequences: that can run at once.
        num_cached_tokens: that its KV cache holds.
    """

    num_sequences: int
    num_cached_tokens: int


@dataclass(frozen=True)
class Loss:
    """What the end of a replica does to requests.

    Attributes:
        messages: for the text core: what the replica would have said.
        failed: the error of each request that fails, by request id.
        num_moved: samples that go on elsewhere.
        num_begun_again: those of them of which the server has no tokens.
    """

    messages: list[ToServer]
    failed: dict[int, ReplicasLost]
    num_moved: int
    num_begun_again: int


@dataclass
class Losses:
    """What the ends of replicas have cost so far.

    Attributes:
        num_replicas: that have ended.
        num_moved: samples that went on elsewhere.
        num_begun_again: those of them of which the server had no tokens.
        num_lost_tokens: generated, and not delivered; as far as the replicas had said.
    """

    num_replicas: int = 0
    num_moved: int = 0
    num_begun_again: int = 0
    num_lost_tokens: int = 0


@dataclass(frozen=True)
class Report:
    """How one replica is.

    Attributes:
        state: "ok", "stalled", "catching up" (with commands), "waiting for weights", "starting"
            (again) or "ended".
        num_open: samples that it has.
        work: expected tokens of these samples.
        statistics: its latest; None before the first.
    """

    state: str
    num_open: int = 0
    work: int = 0
    statistics: Statistics | None = None
