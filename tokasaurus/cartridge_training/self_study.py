"""Self-study: the model asks and answers questions about a document that it sees.

A question is what the model writes where a user would speak, behind a conversation's beginning that
shows it the document (Xu et al., 2024, arXiv:2406.08464, make instructions in this way). It ends
with its first question mark: models are seldom trained to end a user's turn. The answer
is sampled with the document in sight, and its most likely tokens at each position are kept: they
are what a cartridge is trained to predict without the document (Eyuboglu et al., 2025,
arXiv:2506.06266).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ConfigError

__all__ = [
    "QUESTION_TOKENS",
    "ChatForm",
    "Conversation",
    "Question",
    "Sample",
    "Sampler",
    "converse",
    "questions",
]

QUESTION_TOKENS = 64
"""The longest question that is asked for."""

_DOCUMENT, _QUESTION = "[[document]]", "[[question]]"


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model wrote.

    Attributes:
        token_ids: of the text, with the token that ended it.
        text: without the end.
        is_whole: it ended by itself.
        top_ids: [tokens, k] the most likely tokens at each position; k is 0 where none are asked
            for.
        top_logprobs: [tokens, k] their natural logarithms.
    """

    token_ids: list[int]
    text: str
    is_whole: bool
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


class Sampler(Protocol):
    """Continues prompts, which are token ids."""

    def __call__(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, top_k: int
    ) -> list[Sample]:
        """``top_k`` is how many of the most likely tokens each sample brings."""
        ...


@dataclass(frozen=True, eq=False)
class Conversation:
    """A question and its answer, as a cartridge is trained on them.

    Attributes:
        prompt_ids: what comes behind the cartridge: the question, and the beginning of the answer's
            turn.
        answer: of the model that saw the document.
    """

    prompt_ids: list[int]
    answer: Sample


@dataclass(frozen=True)
class Question:
    """A question about a document, as a prompt in two forms.

    Attributes:
        with_document: what comes before an answer where the document is in sight.
        behind_cartridge: the same where a cartridge stands for the document.
    """

    with_document: list[int]
    behind_cartridge: list[int]


@dataclass(frozen=True)
class ChatForm:
    """A model's conversations, cut where a document, a question and an answer stand.

    Attributes:
        before_document: the text before a document, which is the system message.
        before_question: between the document and the question.
        before_answer: between the question and the answer.
        begin: the text before a question where there is no document, without a BOS token.
    """

    before_document: str
    before_question: str
    before_answer: str
    begin: str

    @classmethod
    def of(cls, render: Callable[[list[dict[str, str]]], str], bos: str) -> ChatForm:
        """Finds the form of a chat template.

        Args:
            render: writes a conversation up to the beginning of the answer.
            bos: the text of the BOS token; "" if there is none.

        Raises:
            ConfigError: the template has no system message, or changes what it is given.
        """
        question = {"role": "user", "content": _QUESTION}
        try:
            whole = render([{"role": "system", "content": _DOCUMENT}, question])
            alone = render([question])
        except Exception as error:  # a template may raise anything
            raise ConfigError(
                f"model: its chat template refuses a system message: {error}"
            ) from None
        before_document, found, rest = whole.partition(_DOCUMENT)
        before_question, found_too, before_answer = rest.partition(_QUESTION)
        begin, found_alone, _ = alone.partition(_QUESTION)
        if not (found and found_too and found_alone):
            raise ConfigError("model: its chat template does not write messages as they are")
        return cls(before_document, before_question, before_answer, begin.removeprefix(bos))


def converse(
    sample: Sampler,
    encode: Callable[[str], list[int]],
    form: ChatForm,
    document: str,
    *,
    count: int,
    seed: int,
    excerpt_tokens: int,
    answer_tokens: int = 256,
    top_k: int = 20,
) -> list[Conversation]:
    """Makes conversations about a document.

    Args:
        sample: continues prompts.
        encode: ids of a text, without special tokens around it.
        form: of the model's conversations.
        document: the text.
        count: how many are wanted; questions and answers that do not end by themselves are dropped,
            so there may be fewer.
        seed: of the choice of excerpts.
        excerpt_tokens: a longer document is shown in excerpts of this length, each conversation at
            a place of its own.
        answer_tokens: the longest answer that is asked for.
        top_k: of the answers.

    Returns:
        The conversations; equal questions stand once for each excerpt.
    """
    asked = questions(
        sample, encode, form, document, count=count, seed=seed, excerpt_tokens=excerpt_tokens
    )
    answers = sample(
        [each.with_document for each in asked],
        max_tokens=answer_tokens,
        temperature=0.7,
        top_k=top_k,
    )
    return [
        Conversation(each.behind_cartridge, answer)
        for each, answer in zip(asked, answers, strict=True)
        if answer.is_whole
    ]


def questions(
    sample: Sampler,
    encode: Callable[[str], list[int]],
    form: ChatForm,
    document: str,
    *,
    count: int,
    seed: int,
    excerpt_tokens: int,
) -> list[Question]:
    """Makes questions about a document; the arguments are those of :func:`converse`."""
    heads = _heads(encode, form, document, count, seed, excerpt_tokens)
    written = sample(heads, max_tokens=QUESTION_TOKENS, temperature=1.0, top_k=0)
    asked: dict[tuple[int, ...], Question] = {}
    for head, question in zip(heads, written, strict=True):
        asked_for, mark, _ = question.text.strip().partition("?")
        text = asked_for + mark
        if text and (question.is_whole or mark):
            turn = encode(form.before_question + text + form.before_answer)
            prompt = _without(head, encode(form.before_question)) + turn
            behind = encode(form.begin + text + form.before_answer)
            asked[tuple(prompt)] = Question(prompt, behind)
    return list(asked.values())


def _heads(
    encode: Callable[[str], list[int]],
    form: ChatForm,
    document: str,
    count: int,
    seed: int,
    excerpt_tokens: int,
) -> list[list[int]]:
    """Prompts that end where a user would ask."""
    before, after = encode(form.before_document), encode(form.before_question)
    ids = encode(document)
    if len(ids) <= excerpt_tokens:
        return [encode(form.before_document + document + form.before_question)] * count
    rng = Random(seed)
    starts = [rng.randrange(len(ids) - excerpt_tokens + 1) for _ in range(count)]
    return [before + ids[start : start + excerpt_tokens] + after for start in starts]


def _without(ids: list[int], end: list[int]) -> list[int]:
    return ids[: len(ids) - len(end)] if end else ids
