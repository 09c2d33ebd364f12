"""Clients that hold conversations: each turn's prompt is all that was said, and something new.

::

    turn 1   system prompt, text 1
    turn 2   system prompt, text 1, answer 1, text 2
    turn 3   system prompt, text 1, answer 1, text 2, answer 2, text 3

What a conversation consists of depends on the seed and its number alone. So it is the same however
requests are dealt to replicas, and whenever they end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import GenerateRequest, Sampling

__all__ = ["Conversations", "conversation_of"]

_TURN_BITS = 8  # of a request's id; the number of the conversation is above
_NUM_SYSTEM_PROMPTS, _SYSTEM_TOKENS = 16, 512
_TEXT_TOKENS, _SIGMA = 64, 1.0  # of a text of the client, log-normal: median and spread
_MAX_TEXT_TOKENS = 1024


def conversation_of(request_id: int) -> int:
    """The number of the conversation that a request belongs to."""
    return request_id >> _TURN_BITS


class Conversations:
    """Clients that begin a new conversation when the former one is over.

    Args:
        num_turns: of a conversation, on average; they have a geometric distribution.
        pause_s: between an answer and the next text, on average; exponential.
        max_tokens: of an answer.
        max_request_tokens: of a turn, with its answer. A conversation that reaches it is over.
        seed: of all conversations.
    """

    def __init__(
        self,
        num_turns: float,
        pause_s: float,
        max_tokens: int,
        max_request_tokens: int,
        seed: int,
    ) -> None:
        self._num_turns, self._pause_s = num_turns, pause_s
        self._max_tokens, self._max_request_tokens = max_tokens, max_request_tokens
        self._seed = seed
        self._num_begun = 0
        self._open: dict[int, _Conversation] = {}  # by number
        chance = np.random.default_rng(seed)
        self._system_prompts = [_ids(chance, _SYSTEM_TOKENS) for _ in range(_NUM_SYSTEM_PROMPTS)]

    def first(self) -> GenerateRequest:
        number = self._num_begun
        self._num_begun += 1
        chance = np.random.default_rng((self._seed, number))
        system_prompt = self._system_prompts[chance.integers(_NUM_SYSTEM_PROMPTS)]
        num_turns = min(int(chance.geometric(1 / self._num_turns)), 1 << _TURN_BITS)
        text = _text(chance)
        each = _Conversation(chance, num_turns, np.concatenate((system_prompt, text)))
        self._open[number] = each
        return self._request(number, each)

    def following(self, request_id: int, answer_ids: Int32Array) -> tuple[float, GenerateRequest]:
        number = conversation_of(request_id)
        each = self._open[number]
        each.turn += 1
        text = _text(each.chance)
        pause_s = float(each.chance.exponential(self._pause_s))
        ids = np.concatenate((each.ids, answer_ids, text))
        if each.turn == each.num_turns or len(ids) + self._max_tokens > self._max_request_tokens:
            del self._open[number]
            return pause_s, self.first()
        each.ids = ids
        return pause_s, self._request(number, each)

    def _request(self, number: int, each: _Conversation) -> GenerateRequest:
        request_id = number << _TURN_BITS | each.turn
        return GenerateRequest(
            request_id=request_id,
            prompt_ids=each.ids,
            n=1,
            max_tokens=self._max_tokens,
            sampling=Sampling(),
            seed=request_id,
            stop_token_ids=(STOP_ID,),
        )


@dataclass
class _Conversation:
    """One that is not over.

    Attributes:
        chance: draws the rest of it.
        num_turns: that it has.
        ids: of the present turn's prompt.
        turn: its number, from 0.
    """

    chance: np.random.Generator
    num_turns: int
    ids: Int32Array
    turn: int = 0


def _text(chance: np.random.Generator) -> Int32Array:
    length = round(chance.lognormal(np.log(_TEXT_TOKENS), _SIGMA))
    return _ids(chance, min(max(1, length), _MAX_TEXT_TOKENS))


def _ids(chance: np.random.Generator, count: int) -> Int32Array:
    return chance.integers(1, VOCAB_SIZE, count, dtype=np.int32)
