"""The outputs of the embedded engine, with the names of vLLM's offline API."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput, TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "request_output"]


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
    finish_reason: str | None  # "stop", "length", or "abort" if a command ended it
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


def request_output(
    generation: Generation, prompt: str | None, tokenizer: Tokenizer
) -> RequestOutput:
    """The output of a finished prompt. Decodes text, which may take a while."""
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
        outputs=[_completion(sample, tokenizer) for sample in generation.take_all()],
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
