"""Requests and their sequences, as far as they need objects: identity, prompt, stored tokens.

The numbers of a running sequence that change with every batch are in the slot table instead. Knows
nothing of pages.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.protocol.arrays import EMPTY_FLOAT32, EMPTY_INT32, Float32Array, Int32Array
from tokasaurus.protocol.messages import GenerateRequest

__all__ = ["GeneratedTokens", "Request", "Sequence", "SequenceState"]


class SequenceState(enum.Enum):
    """The stages of a sequence. A sequence may become ENDED at every other stage::

    FOLLOWING ──────┐ as a fork of its leader
        ▼           ▼
    WAITING ────▶ RUNNING ────▶ PREEMPTED
      ▲  ▼                      │   │
      │ PARKED ◀────────────────┘   │
      └─────────────────────────────┘
    """

    FOLLOWING = enum.auto()  # waits until the leader of its request has fed the prompt
    # Waits for pages that another request computes, for its cartridge, for acknowledgements, or
    # till a drain is over.
    PARKED = enum.auto()
    WAITING = enum.auto()  # in the queue
    RUNNING = enum.auto()  # owns a slot and pages
    PREEMPTED = enum.auto()  # owns a slot and no pages: results in flight are still its own
    ENDED = enum.auto()


class GeneratedTokens(NamedTuple):
    """Consecutive generated tokens, with logprobs if the sequence asked for them."""

    ids: Int32Array  # [tokens]
    logprobs: Float32Array  # [tokens], or [0]
    top_ids: Int32Array  # [tokens * k], or [0]
    top_logprobs: Float32Array  # like top_ids
    # Of the weights that drew all of them; -1 where they come from several slots.
    weights_version: int = -1

    @staticmethod
    def without_logprobs(ids: Int32Array, weights_version: int = -1) -> GeneratedTokens:
        """Tokens whose logprobs were not asked for, or were sent before."""
        return GeneratedTokens(ids, EMPTY_FLOAT32, EMPTY_INT32, EMPTY_FLOAT32, weights_version)

    @staticmethod
    def joined(pieces: list[GeneratedTokens]) -> GeneratedTokens:
        """Pieces, one after the other."""
        if not pieces:
            return GeneratedTokens.without_logprobs(EMPTY_INT32)
        if len(pieces) == 1:
            return pieces[0]
        return GeneratedTokens(
            ids=np.concatenate([piece.ids for piece in pieces]),
            logprobs=np.concatenate([piece.logprobs for piece in pieces]),
            top_ids=np.concatenate([piece.top_ids for piece in pieces]),
            top_logprobs=np.concatenate([piece.top_logprobs for piece in pieces]),
        )


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its samples that have not ended."""

    message: GenerateRequest
    arrived_at: float
    # The pseudo ids of its cartridge, then the prompt of the message.
    prompt_ids: Int32Array
    cartridge: Cartridge | None = None
    num_pseudo: int = field(init=False)  # pseudo ids, which never leave the manager
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by sample index
    # Until all samples run: the one that feeds the prompt next, and those that will fork from it.
    leader: Sequence | None = None
    followers: dict[int, Sequence] = field(default_factory=dict)  # by sample index, the next last
    num_finished: int = 0  # samples that ended by themselves
    is_announced: bool = False  # its admission, to a server that asked for the stages
    length_group: int = -1  # its handle at the predictor of lengths
    client: int = 0  # a number that other clients of its priority do not have
    device_s_before: float = 0.0  # what the device had worked when it came
    # Positions of KV when all tokens of a sample are generated; the last one needs none.
    final_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_pseudo = 0 if self.cartridge is None else self.cartridge.num_tokens
        self.final_length = len(self.prompt_ids) + self.message.max_tokens - 1

    @property
    def num_pinned_pages(self) -> int:
        """Pages of its positions that a sequence need not take: ``Cartridge.num_pinned_pages``."""
        return 0 if self.cartridge is None else self.cartridge.num_pinned_pages

    @property
    def incremental(self) -> bool:
        """Whether tokens are sent as they come.

        Holding for acknowledgements implies it: the server can acknowledge only tokens that it has.
        """
        return self.message.stream or self.message.hold_for_acks


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request, from its arrival to its end, through all its preemptions."""

    request: Request
    sample_index: int
    arrival: int  # a number; those of the samples of a request follow one another
    # To be fed: the request's prompt, and the tokens that were generated before this run.
    prompt_ids: Int32Array
    state: SequenceState
    # Whether an output for every prompt token is asked for and was not delivered yet.
    whole_prompt_due: bool
    order: int = -1  # of importance, over all sequences
    num_predicted: int = 0  # tokens that it costs: its own, and the prompt where it is the first
    was_admitted: bool = False
    resumes: bool = False  # preempted with tokens to come; else its last ones are in flight
    has_entry: bool = False  # in the queue; the entry may be stale
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_acked: int = 0  # generated tokens that the server searched; the table's while in a slot
    slot: int = -1  # -1 where it owns none
    stored: list[GeneratedTokens] = field(default_factory=list)  # moved out of the token window
    num_stored: int = 0  # tokens in ``stored``; without a slot, these are all that are known
    came_with_tokens: bool = False  # the first piece of ``stored`` was generated elsewhere

    @property
    def name(self) -> str:
        """A name for error messages."""
        return f"sample {self.sample_index} of request {self.request.message.request_id}"

    @property
    def generated_ids(self) -> Int32Array:
        """Its tokens from before this run: ``prompt_ids`` without the prompt of the request."""
        return self.prompt_ids[len(self.request.prompt_ids) :]

    @property
    def has_begun(self) -> bool:
        """Whether it has been in a slot, here or elsewhere."""
        return self.was_admitted or self.came_with_tokens

    @property
    def undelivered(self) -> list[GeneratedTokens]:
        """Stored tokens that go out with its last update. A stream has been sent everything."""
        return [] if self.request.incremental else self.stored[int(self.came_with_tokens) :]

    @property
    def final_length(self) -> int:
        """Positions of KV when all its tokens are generated."""
        return self.request.final_length

    @property
    def num_own_tokens(self) -> int:
        """Tokens of ``prompt_ids`` that are not pseudo ids."""
        return len(self.prompt_ids) - self.request.num_pseudo

    def may_sample(self, stop_lag: int) -> bool:
        """Whether a token beyond the stored ones may be planned before more are acknowledged."""
        return not self.request.message.hold_for_acks or self.num_stored < self.num_acked + stop_lag
