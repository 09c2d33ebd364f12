"""What a replica learns about lengths from the sequences that it runs.

Collects what ended since the last refresh and feeds the predictor of lengths with it. Knows nothing
of pages or steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.forecast.lengths import NO_GROUP, IntArray, LengthPredictor
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Request, Sequence
from tokasaurus.protocol.arrays import Int64Array

__all__ = ["LengthLearning"]


class LengthLearning:
    """The predictor of lengths, with the sequences of one replica to learn from.

    Args:
        config: the manager's slice.
        running: the sequences in slots.
    """

    def __init__(self, config: ManagerConfig, running: RunningSequences) -> None:
        self._config = config.admission
        self._running = running
        self._max_tokens = config.max_request_tokens
        learns, prior_mean = self._config.learn_lengths, self._config.prior_mean
        self._predictor = LengthPredictor(
            config.max_request_tokens,
            num_buckets=self._config.num_length_buckets,
            memory=self._config.length_memory,
            initial_wait=self._config.num_lengths_awaited if learns else 1,
            prior_mean=prior_mean if learns or prior_mean is not None else 1.0,
            prior_std=self._config.prior_std,
            std_scale=self._config.std_scale,
        )
        # Since the last refresh: (group, generated tokens, max_tokens) of each sequence that ended
        # by itself, and the generated tokens of each that was aborted.
        self._ended: list[tuple[int, int, int]] = []
        self._aborted: list[int] = []

    @property
    def num_unlearned(self) -> int:
        """Sequences that ended since the last refresh."""
        return len(self._ended) + len(self._aborted)

    def mean_tokens(self, max_tokens: int) -> float:
        """How many tokens sequences with this limit generate, as far as that is known."""
        if not self._config.predict_lengths:
            return min(max_tokens, self._max_tokens)
        return self._predictor.mean(max_tokens)

    def open(self, request: Request) -> None:
        """The request will have sequences that run."""
        self._predictor.expect(request.message.max_tokens, len(request.sequences))
        if len(request.sequences) > 1 and self._config.learn_lengths:
            request.length_group = self._predictor.open_group()

    def close(self, request: Request) -> None:
        """All of the request's sequences have ended."""
        if request.length_group != NO_GROUP:
            self._predictor.close_group(request.length_group)

    def end(self, sequences: Rows[Sequence], by_itself: Rows[bool]) -> None:
        """Sequences have ended; those that had slots still have them.

        Args:
            sequences: that ended.
            by_itself: whether each ended by itself; it was aborted otherwise.
        """
        if not self._config.learn_lengths:
            return
        known = self._running.slots.known[[sequence.slot for sequence in sequences]].tolist()
        for sequence, is_observed, count in zip(sequences, by_itself, known, strict=True):
            num_generated = count if sequence.slot >= 0 else sequence.num_stored
            if num_generated == 0:
                continue
            request = sequence.request
            if is_observed:
                limit = request.message.max_tokens
                self._ended.append((request.length_group, num_generated, limit))
            else:
                self._aborted.append(num_generated)

    def refresh(self) -> None:
        """Tells the predictor of all that ended since the last time, and how far the others are."""
        if not self._config.learn_lengths:
            return
        if self._ended:
            self._predictor.observe(*np.array(self._ended, np.int64).T)
        if self._aborted:
            self._predictor.abort(np.array(self._aborted, np.int64))
        self._ended.clear()
        self._aborted.clear()
        slots, resting = self._running.slots, self._running.resting
        rows = (slots.absorbing & (slots.known > 0)).nonzero()[0]
        groups = np.array([sequence.request.length_group for sequence in resting], np.int64)
        lengths = np.array([sequence.num_stored for sequence in resting], np.int64)
        self._predictor.refresh(
            np.append(slots.length_group[rows], groups), np.append(slots.known[rows], lengths)
        )

    def predict(
        self,
        groups: IntArray,
        num_generated: Int64Array,
        max_tokens: IntArray,
        numbers: IntArray,
    ) -> Int64Array:
        """How many tokens sequences will have generated at their end.

        See ``LengthPredictor.predict``. It is ``max_tokens`` where lengths are not predicted.
        """
        limits = max_tokens.astype(np.int64)
        if not self._config.predict_lengths:
            return limits
        num_running = max(1, self._running.num_running)
        return self._predictor.predict(groups, num_generated, limits, numbers, num_running)
