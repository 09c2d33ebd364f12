"""One prompt in flight: what its samples have brought so far, and whether more will come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tokasaurus.errors import EngineAborted, TokasaurusError
from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.protocol.messages import FinishReason, Pooling, PromptLogprobs, Stage
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.receipts import Record
from tokasaurus.text.samples import Sample, SampleOutput, TokenLogprobs
from tokasaurus.text.text_stream import TextStream
from tokasaurus.text.tokenizer import Tokenizer
from tokasaurus.text.weights_versions import WeightsVersions

__all__ = ["Generation"]

_FINISH_REASONS: Mapping[int, str | None] = {
    FinishReason.RUNNING: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Generation:
    """One prompt in flight and its samples.

    With ``first_k``, the samples that end first *here* are the answer. The manager may see another
    order: it can end a sample by length while it has not heard yet of a stop string in another
    sample. In both orders it counts up to ``first_k`` and aborts the rest, so the last row of every
    sample comes. The generation waits for these rows, since their tokens count in the usage.

    A generation may also be aborted as a whole, by a command. Then all its samples are the answer,
    with the tokens that they have.

    Args:
        request_id: its number among all prompts.
        request: as prepared.
        tokenizer: makes the text of its samples.
        stream: news comes before the end.
        on_change: called when there is news for a stream, and when the generation has finished.
        client: whose share of the engine it takes.
        names: by which the client may end it.
        log_name: what it is called in logs; "" for nothing.
        on_stage: called when the engine has reached a stage with it; None if nobody wants to know.
        weights: the engine's versions of the weights.
        samples: one for each; None makes them.

    Attributes:
        eta_s: seconds until all samples have ended, by the manager's last prediction; None before.
        error: why nothing more will come; None while all is well.
        pooled_state: [hidden] of the prompt, not normalised; None if not asked for, and before.
        started_at, began_at: when the prompt arrived and brought its first token; set by a watcher.
        predicted: when its end was predicted first, and the seconds until then; set by a watcher.
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
        names: Sequence[str] = (),
        log_name: str = "",
        on_stage: Callable[[Stage], None] | None = None,
        weights: WeightsVersions | None = None,
        samples: list[Sample] | None = None,
    ) -> None:
        self.request_id = request_id
        self.request = request
        if samples is None:
            samples = _samples(request, tokenizer, stream)
        self.samples = samples
        self.on_change = on_change
        self.client = client
        self.names = names
        self.log_name = log_name
        self.on_stage = on_stage
        self.weights = WeightsVersions() if weights is None else weights
        self.error: TokasaurusError | None = None
        self.eta_s: float | None = None
        self.pooled_state: Float32Array | None = None
        self.started_at = 0.0
        self.began_at: float | None = None
        self.predicted: tuple[float, float] | None = None
        self._num_wanted = int(request.params.first_k or len(samples))  # ends that still count
        self._num_running = len(samples)  # samples that have not ended for the client
        self._num_open = len(samples)  # samples that have not ended for the manager
        self._changed: dict[int, Sample] = {}
        self._prompt_logprobs = _PromptLogprobs.for_request(request)
        self._record = None if request.receipts is None else Record()

    @property
    def finished(self) -> bool:
        """Whether everything has come, or nothing more will."""
        return self.error is not None or (self._num_running == 0 and self.has_prompt_logprobs)

    @property
    def was_aborted(self) -> bool:
        """Whether a command ended it before enough samples had ended by themselves."""
        return self._num_wanted > 0 and self._num_running == 0

    @property
    def left_out(self) -> list[Sample]:
        """The samples that ``first_k`` others have kept out of the answer."""
        if self.was_aborted:
            return []
        return [sample for sample in self.samples if sample.was_cancelled]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed, because another prompt had begun with them."""
        return min(
            (
                sample.num_cached_tokens
                for sample in self.samples
                if sample.num_tokens or not sample.was_cancelled  # others may never have run
            ),
            default=0,
        )

    @property
    def num_generated_tokens(self) -> int:
        """The tokens of all samples, including cancelled ones."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def prompt_logprobs(self) -> TokenLogprobs | None:
        """Logprobs of the prompt's tokens from the second on; None if not asked for."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.values

    @property
    def prompt_ranks(self) -> Int32Array | None:
        """Ranks of the same tokens: 1 is the likeliest token, or one as likely."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.ranks

    @property
    def _has_prompt_results(self) -> bool:
        has_state = self.request.pooling is Pooling.NONE or self.pooled_state is not None
        return has_state and self.has_prompt_logprobs

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether all logprobs of the prompt have come that were asked for."""
        return self._prompt_logprobs is None or self._prompt_logprobs.complete

    def take_news(self) -> list[SampleOutput]:
        """The output since the last call, for streams. Cancelled samples end with "abort"."""
        if not self.has_prompt_logprobs:
            return []
        changed, self._changed = self._changed, {}
        return self._recorded([each.take() for each in changed.values() if each.has_news])

    def take_all(self) -> list[SampleOutput]:
        """The output of every sample that is part of the answer, in order. Decoding takes time."""
        takes_all = self.was_aborted
        taken = [each.take() for each in self.samples if takes_all or not each.was_cancelled]
        return self._recorded(taken)

    def recorded(self) -> list[SampleOutput]:
        """All output that was taken of each sample, for a receipt."""
        return [] if self._record is None else self._record.outputs()

    def _recorded(self, outputs: list[SampleOutput]) -> list[SampleOutput]:
        if self._record is not None:
            self._record.add(outputs)
        return outputs

    # --- what the table passes on from the manager ------------------------------------------------

    def extend(
        self,
        sample: Sample,
        token_ids: list[int],
        logprobs: TokenLogprobs | None,
        reason: int,
        weights_version: int,
    ) -> None:
        """Adds tokens to a sample, which ends unless the reason is ``FinishReason.RUNNING``."""
        sample.extend(token_ids, logprobs, _FINISH_REASONS[reason], weights_version)
        self._changed[sample.index] = sample
        if sample.finish_reason is None:
            return
        self._num_running -= 1
        if self._num_wanted == 0:
            sample.cancel()
        elif not sample.was_cancelled:
            self._num_wanted -= 1

    def close_one(self) -> bool:
        """The manager has finished one more sample; returns whether it was the last one."""
        self._num_open -= 1
        if self._num_open > 0:
            return False
        if self.was_aborted and not self._has_prompt_results:
            self.error = EngineAborted("the request was aborted before its prompt was computed")
        return True

    def fill_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        """Adds a piece of the prompt's logprobs."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.fill(piece)
            self.on_change()

    def note_unsent(self) -> None:
        """It has ended before the manager heard of it, so no row said so."""
        self.on_change()

    def fail(self, error: TokasaurusError) -> None:
        """Ends the generation with an error."""
        self.error = error
        self.on_change()


def _samples(request: PreparedRequest, tokenizer: Tokenizer, stream: bool) -> list[Sample]:
    params, stops = request.params, request.stops
    reads = stream or stops is not None  # makes the text while it grows
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
    """Logprobs of a prompt's tokens from the second on, from pieces that may come twice."""

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
