"""The engine's part of a training: it asks and answers questions about the document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokasaurus.cartridge_training.self_study import (
    QUESTION_TOKENS,
    ChatForm,
    Conversation,
    Sample,
    converse,
)
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flags_of
from tokasaurus.errors import ConfigError
from tokasaurus.launch.llm import LLM
from tokasaurus.launch.outputs import CompletionOutput
from tokasaurus.text.params import SamplingParams

if TYPE_CHECKING:
    from tokasaurus.launch.cartridges.train import TrainConfig

__all__ = ["Study", "ask"]

_TOP_K = 20  # of each answer's tokens, as Eyuboglu et al. keep
_UNLIKELY = -100.0  # nats, of what fills up a row of fewer tokens


@dataclass(frozen=True, eq=False)
class Study:
    """What training needs of the engine.

    Attributes:
        conversations: about the document.
        document_ids: what a conversation that shows the document begins with.
        tokenizer: its digest.
    """

    conversations: list[Conversation]
    document_ids: list[int]
    tokenizer: str


def ask(config: TrainConfig, document: str) -> Study:
    """Starts an engine, lets it ask and answer, and ends it.

    Raises:
        ConfigError: flags do not fit the document, or the chat template shows none.
        ModelError: the model cannot be served.
    """
    with LLM(**_engine_flags(config)) as llm:
        tokenizer = llm.get_tokenizer()
        form = ChatForm.of(tokenizer.chat_text, tokenizer.bos_text)
        around = len(tokenizer.encode_fragment("".join(astuple(form))))
        room = llm.max_model_len - around - QUESTION_TOKENS - config.answer_tokens
        if room < 1:
            raise ConfigError(
                f"answer_tokens={config.answer_tokens} and a question leave no room for text"
                f" in the {llm.max_model_len} tokens that a request may have; lower it"
            )
        document_ids = tokenizer.encode_fragment(form.before_document + document)
        if len(document_ids) < config.num_tokens:
            raise ConfigError(
                f"num_tokens={config.num_tokens}: the text has {len(document_ids)} tokens with what"
                " begins a conversation, and a cartridge that is not shorter saves nothing"
            )
        conversations = converse(
            _Sampler(llm, config.seed),
            tokenizer.encode_fragment,
            form,
            document,
            count=config.num_conversations,
            seed=config.seed,
            excerpt_tokens=min(config.excerpt_tokens, room),
            answer_tokens=config.answer_tokens,
            top_k=_TOP_K,
        )
        return Study(conversations, document_ids, tokenizer.digests()["digest"])


def _engine_flags(config: TrainConfig) -> dict[str, Any]:
    """Those that the user has set, and room for the tokens that are kept of each position."""
    flags = {
        each.name: getattr(config, each.name)
        for each in flags_of(EngineConfig).values()
        if getattr(config, each.name) != each.default
    }
    return {**flags, "max_topk_logprobs": max(_TOP_K, config.max_topk_logprobs or 0)}


class _Sampler:
    """Continues prompts by an engine. Each call has seeds of its own."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._llm = llm
        self._seeds = itertools.count(seed << 32)

    def __call__(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, top_k: int
    ) -> list[Sample]:
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                logprobs=top_k or None,
                seed=next(self._seeds),
            )
            for _ in prompts
        ]
        outputs = self._llm.generate(prompts, params)
        return [_sample(each.outputs[0], top_k) for each in outputs]


def _sample(output: CompletionOutput, top_k: int) -> Sample:
    num_tokens = len(output.token_ids)
    ids = np.zeros((num_tokens, top_k), np.int64)
    logprobs = np.full((num_tokens, top_k), _UNLIKELY, np.float32)
    for row, each in enumerate(output.logprobs or ()):
        # The drawn token is there too, even if it is outside the top.
        likeliest = sorted(each.items(), key=lambda item: -item[1].logprob)[:top_k]
        ids[row, : len(likeliest)] = [token_id for token_id, _ in likeliest]
        logprobs[row, : len(likeliest)] = [found.logprob for _, found in likeliest]
    return Sample(output.token_ids, output.text, output.finish_reason == "stop", ids, logprobs)
