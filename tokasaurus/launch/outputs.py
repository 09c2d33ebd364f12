"""The outputs of the embedded engine, with the names of vLLM's offline API."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput, TokenLogprobs, joined_runs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "GrowingOutput", "Logprob", "RequestOutput", "request_output"]


@dataclass(frozen=True)
class Logprob:
    """A token's log probability (natural logarithm) at one position."""

    logprob: float
    rank: int | None  # 1 is the most likely; None for a generated token outside the top
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt."""

    index: int  # among all n
    text: str
    token_ids: list[int]  # the end-of-sequence token included
    logprobs: list[dict[int, Logprob]] | None  # for each token: the chosen one and the top k
    cumulative_logprob: float | None
    # "stop", "length", or "abort" if a command ended it; None while it goes on.
    finish_reason: str | None
    # Of ``token_ids``: runs of a version of the weights and a number of tokens.
    weights_versions: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """One prompt and its samples."""

    request_id: str
    prompt: str | None  # None if the prompt came as ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # the first token has none
    outputs: list[CompletionOutput]  # with first_k: the samples that ended first, by index
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    finished: bool = True
    receipt: dict[str, Any] | None = None  # of a finished output, if the parameters asked for it


def request_output(
    generation: Generation, prompt: str | None, tokenizer: Tokenizer
) -> RequestOutput:
    """The output of a finished prompt. Decodes text, which may take a while.

    A receipt waits for the digest of the weights.
    """
    outputs = [_completion(sample, tokenizer) for sample in generation.take_all()]
    output = _request_output(generation, prompt, tokenizer, outputs)
    return replace(output, receipt=_receipt(generation))


class GrowingOutput:
    """The output of a prompt in a stream: everything so far.

    Args:
        generation: in a stream.
        prompt: its text; None if it came as ids.
        tokenizer: of the model.

    Attributes:
        finished: no more will come.
    """

    def __init__(self, generation: Generation, prompt: str | None, tokenizer: Tokenizer) -> None:
        self.finished = False
        self._generation = generation
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._samples: dict[int, CompletionOutput] = {}
        self._first: RequestOutput | None = None

    def grow(self) -> bool:
        """Takes the generation's news; returns whether there were any."""
        self.finished = self._generation.finished
        news = self._generation.take_news()
        for piece in news:
            before = self._samples.get(piece.index)
            more = _completion(piece, self._tokenizer)
            self._samples[piece.index] = more if before is None else _joined(before, more)
        return self.finished or bool(news)

    def so_far(self) -> RequestOutput:
        """The output as it is now."""
        left_out = {sample.index for sample in self._generation.left_out}
        outputs = [
            sample for index, sample in sorted(self._samples.items()) if index not in left_out
        ]
        if self._first is None:
            self._first = _request_output(self._generation, self._prompt, self._tokenizer, outputs)
        return replace(
            self._first,
            outputs=outputs,
            num_cached_tokens=self._generation.num_cached_tokens,
            finished=self.finished,
            receipt=_receipt(self._generation) if self.finished else None,
        )


def _receipt(generation: Generation) -> dict[str, Any] | None:
    receipts = generation.request.receipts
    return None if receipts is None else receipts.write([generation])


def _joined(before: CompletionOutput, more: CompletionOutput) -> CompletionOutput:
    logprobs = cumulative = None
    if before.logprobs is not None:
        logprobs = before.logprobs + (more.logprobs or [])
        cumulative = (before.cumulative_logprob or 0.0) + (more.cumulative_logprob or 0.0)
    return CompletionOutput(
        index=before.index,
        text=before.text + more.text,
        token_ids=before.token_ids + more.token_ids,
        logprobs=logprobs,
        cumulative_logprob=cumulative,
        finish_reason=more.finish_reason,
        weights_versions=joined_runs(before.weights_versions, more.weights_versions),
    )


def _request_output(
    generation: Generation,
    prompt: str | None,
    tokenizer: Tokenizer,
    outputs: list[CompletionOutput],
) -> RequestOutput:
    ids = generation.request.prompt_ids.tolist()
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if generation.prompt_logprobs is not None:
        values, ranks = generation.prompt_logprobs, generation.prompt_ranks
        prompt_logprobs = [None, *_logprobs(tokenizer, ids[1:], values, ranks)]
    return RequestOutput(
        request_id=str(generation.request_id),
        prompt=prompt,
        prompt_token_ids=ids,
        prompt_logprobs=prompt_logprobs,
        outputs=outputs,
        num_cached_tokens=generation.num_cached_tokens,
    )


def _completion(sample: SampleOutput, tokenizer: Tokenizer) -> CompletionOutput:
    ids, values = sample.token_ids, sample.logprobs
    return CompletionOutput(
        index=sample.index,
        text=sample.text,
        token_ids=ids,
        logprobs=None if values is None else _logprobs(tokenizer, ids, values),
        cumulative_logprob=None if values is None else float(values.logprobs.sum()),
        finish_reason=sample.finish_reason,
        weights_versions=list(sample.weights_versions),
    )


def _logprobs(
    tokenizer: Tokenizer,
    token_ids: list[int],
    values: TokenLogprobs,
    ranks: Int32Array | None = None,
) -> list[dict[int, Logprob]]:
    text = tokenizer.token_text
    result: list[dict[int, Logprob]] = []
    for token_id, chosen, known_rank, top_ids, top_logprobs in zip(
        token_ids,
        values.logprobs.tolist(),
        [None] * len(token_ids) if ranks is None else ranks.tolist(),
        values.top_ids.tolist(),
        values.top_logprobs.tolist(),
        strict=True,
    ):
        entry = {token_id: Logprob(chosen, known_rank, text(token_id))}
        for rank, (top_id, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
            if top_id != token_id or known_rank is None:
                entry[top_id] = Logprob(logprob, rank, text(top_id))
        result.append(entry)
    return result
