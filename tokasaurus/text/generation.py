"""One prompt in flight: what its samples have brought, and whether there will be more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tokasaurus.errors import TokasaurusError
from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.protocol.messages import FinishReason, PromptLogprobs
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.samples import Sample, SampleOutput, TokenLogprobs
from tokasaurus.text.text_stream import TextStream
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Generation"]

_FINISH_REASONS: Mapping[int, str | None] = {
    FinishReason.RUNNING: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Generation:
    """One prompt in flight and its samples.

    With ``first_k``, the samples that end first *here* are the answer. The manager may see another order:
    it can end a sample by length while a stop string found in another one is on its way to it. Either
    way it counts up to ``first_k`` and aborts the rest, so each sample's last row does come. The
    generation waits for these rows, since their tokens count in the usage.

    Args:
        request_id: its number among all prompts.
        request: as prepared.
        tokenizer: makes the text of its samples.
        stream: there will be news before the end.
        on_change: called when there is news for a stream, and when it has finished.
        client: whose it is.

    Attributes:
        eta_s: seconds until all samples will have ended, as the manager last predicted; None until it has.
        error: why there will be no more; None while all is well.
        pooled_state: [hidden] of the prompt, not normalised; None if not asked for, or not there yet.
        started_at, began_at: when it arrived and brought its first token; a watcher's.
    """

    def __init__(
        self,
        request_id: int,
        request: PreparedRequest,
        tokenizer: Tokenizer,
        *,
        stream: bool,
        on_change: Callable[[], None],
        client: str,
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.samples = samples = _samples(request, tokenizer, stream)
        self.on_change = on_change
        self.client = client
        self.error: TokasaurusError | None = None
        self.eta_s: float | None = None
        self.pooled_state: Float32Array | None = None
        self.started_at = 0.0
        self.began_at: float | None = None
        self._num_wanted = int(request.params.first_k or len(samples))  # ends that still count
        self._num_running = len(samples)  # samples that have not ended, as far as a client can see
        self._num_open = len(samples)  # samples that the manager has not reported the end of
        self._changed: dict[int, Sample] = {}
        self._prompt_logprobs = _PromptLogprobs.for_request(request)

    @property
    def finished(self) -> bool:
        """Whether everything is there, or nothing more will come."""
        return self.error is not None or (self._num_running == 0 and self._has_prompt_logprobs)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that need not be computed, because other prompts had begun with them."""
        return min(
            (
                sample.num_cached_tokens
                for sample in self.samples
                if sample.num_tokens or not sample.was_cancelled  # else it may never have run
            ),
            default=0,
        )

    @property
    def num_generated_tokens(self) -> int:
        """Of all samples, the cancelled ones too."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def prompt_logprobs(self) -> TokenLogprobs | None:
        """Of the prompt's tokens from the second on: the first has none. None if not asked for."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.values

    @property
    def prompt_ranks(self) -> Int32Array | None:
        """Of the same tokens: 1 is the likeliest, or as likely as that."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.ranks

    @property
    def _has_prompt_logprobs(self) -> bool:
        return self._prompt_logprobs is None or self._prompt_logprobs.complete

    def take_news(self) -> list[SampleOutput]:
        """For streams: what there is to show since the last call. Cancelled samples end with "abort"."""
        if not self._has_prompt_logprobs:
            return []
        changed, self._changed = self._changed, {}
        return [sample.take() for sample in changed.values() if sample.has_news]

    def take_all(self) -> list[SampleOutput]:
        """The output of every sample that was not cancelled, in order. Decodes, which may take a while."""
        return [sample.take() for sample in self.samples if not sample.was_cancelled]

    # --- what the manager says of it, by way of the table ------------------------------------------

    def extend(
        self, sample: Sample, token_ids: list[int], logprobs: TokenLogprobs | None, reason: int
    ) -> None:
        """One of the samples goes on, or ends unless the reason is ``FinishReason.RUNNING``."""
        sample.extend(token_ids, logprobs, _FINISH_REASONS[reason])
        self._changed[sample.index] = sample
        if sample.finish_reason is None:
            return
        self._num_running -= 1
        if self._num_wanted == 0:
            sample.cancel()
        elif not sample.was_cancelled:
            self._num_wanted -= 1

    def close_one(self) -> bool:
        """The manager is done with one more sample; returns whether it is with all of them."""
        self._num_open -= 1
        return self._num_open == 0

    def fill_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        """A piece of them has come."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.fill(piece)
            self.on_change()

    def fail(self, error: TokasaurusError) -> None:
        """There will be no more."""
        self.error = error
        self.on_change()


def _samples(request: PreparedRequest, tokenizer: Tokenizer, stream: bool) -> list[Sample]:
    params, stops = request.params, request.stops
    reads = stream or stops is not None  # the text, while it grows
    min_tokens, unseen = int(params.min_tokens), frozenset(params.stop_token_ids or ())
    return [
        Sample(
            index,
            tokenizer,
            TextStream(tokenizer, stops, min_tokens) if reads else None,
            unseen,
        )
        for index in range(params.n)
    ]


class _PromptLogprobs:
    """Logprobs of a prompt's tokens from the second on, put together from pieces that may come twice."""

    def __init__(self, num_tokens: int, num_top: int) -> None:
        self.values = TokenLogprobs(
            np.zeros(num_tokens, np.float32),
            np.zeros((num_tokens, num_top), np.int32),
            np.zeros((num_tokens, num_top), np.float32),
        )
        self.ranks: Int32Array = np.zeros(num_tokens, np.int32)
        self._missing = np.ones(num_tokens, np.bool_)

    @staticmethod
    def for_request(request: PreparedRequest) -> _PromptLogprobs | None:
        number = request.params.prompt_logprobs
        return None if number is None else _PromptLogprobs(len(request.prompt_ids) - 1, number)

    @property
    def complete(self) -> bool:
        return not self._missing.any()

    def fill(self, piece: PromptLogprobs) -> None:
        start = piece.first_position - 1
        here = slice(start, start + len(piece.logprobs))
        self.values.logprobs[here] = piece.logprobs
        self.ranks[here] = piece.ranks
        self.values.top_ids[here] = piece.top_ids
        self.values.top_logprobs[here] = piece.top_logprobs
        self._missing[here] = False
