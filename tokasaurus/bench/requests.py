"""The requests that benchmarks send."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import GenerateRequest, Sampling

__all__ = ["MIXES", "NUM_HEADERS", "Requests"]

MIXES = ("easy", "full")
_NUM_TOP = 5
NUM_HEADERS = 16


class Requests:
    """Makes requests with random prompts.

    Args:
        mix: "easy" or "full". In the full mix, one of four requests has stop strings, one asks for
            the logprobs of its tokens, and one for those of the five most likely tokens as well.
        header_tokens: the length of the header of each prompt. There are NUM_HEADERS headers, which
            take turns.
        seed: the seed of the prompts.
    """

    def __init__(self, mix: str = "easy", header_tokens: int = 0, seed: int = 0) -> None:
        self._mix = mix
        self._random = np.random.default_rng(seed)
        self._headers = [self._ids(header_tokens) for _ in range(NUM_HEADERS)]

    def make(
        self, request_id: int, prompt_tokens: int, max_tokens: int, n: int = 1
    ) -> GenerateRequest:
        kind = request_id % 4 if self._mix == "full" else 0
        header = self._headers[request_id % NUM_HEADERS]
        return GenerateRequest(
            request_id=request_id,
            prompt_ids=np.concatenate((header, self._ids(prompt_tokens - len(header)))),
            n=n,
            max_tokens=max_tokens,
            sampling=Sampling(),
            seed=request_id,
            stop_token_ids=(STOP_ID,),
            num_logprobs=(-1, -1, 0, _NUM_TOP)[kind],
            hold_for_acks=kind == 1,
        )

    def series(
        self, first_id: int, count: int, prompt_tokens: int, max_tokens: int
    ) -> Iterator[GenerateRequest]:
        """Yields ``count`` requests with consecutive ids."""
        return (
            self.make(request_id, prompt_tokens, max_tokens)
            for request_id in range(first_id, first_id + count)
        )

    def _ids(self, count: int) -> Int32Array:
        return self._random.integers(1, VOCAB_SIZE, count, dtype=np.int32)
