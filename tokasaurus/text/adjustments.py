"""What a client asks of single tokens, as the ``Adjustments`` that the worker carries out."""

from __future__ import annotations

from collections.abc import Collection

from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import Adjustments
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["adjustments_of", "check_token_ids"]

_NONE = Adjustments()
# The worker compares up to this many tokens of each word with each sequence, at every step.
_MAX_WORD_TOKENS = 32


def adjustments_of(
    params: SamplingParams, late_ids: Collection[int], tokenizer: Tokenizer, vocab_size: int
) -> Adjustments | None:
    """The adjustments; None if the logits stay as they are.

    Args:
        params: already checked against the vocabulary.
        late_ids: tokens that must not be drawn before ``min_tokens``.
        tokenizer: spells bad words.
        vocab_size: of the model, which never draws the tokenizer's ids beyond it.

    Raises:
        RequestError: a bad word is too long.
    """
    adjustments = Adjustments(
        bad_words=_spelled(params.bad_words, tokenizer, vocab_size) if params.bad_words else (),
        min_tokens=int(params.min_tokens) if late_ids else 0,
        late_ids=tuple(sorted(late_ids)) if params.min_tokens else (),
        bias=tuple((int(i), value) for i, value in (params.logit_bias or {}).items() if value),
        repetition_penalty=float(params.repetition_penalty),
        frequency_penalty=float(params.frequency_penalty),
        presence_penalty=float(params.presence_penalty),
    )
    return None if adjustments == _NONE else adjustments


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError if an id is beyond the vocabulary."""
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} must hold token ids from 0 to {vocab_size - 1}, not {token_id}", name
                )


def _spelled(
    words: Collection[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """The spelling of each word at the beginning of a text, and after a space.

    Raises:
        RequestError: a word is too long.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        for text in (bare, " " + bare):
            spellings[tuple(tokenizer.encode_fragment(text))] = None
    longest = max(map(len, spellings))
    if longest > _MAX_WORD_TOKENS:
        raise RequestError(
            f"bad_words may hold words of at most {_MAX_WORD_TOKENS} tokens, not of {longest}",
            "bad_words",
        )
    return tuple(ids for ids in spellings if ids and max(ids) < vocab_size)
