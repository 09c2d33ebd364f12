"""Logprobs as OpenAI writes them: one form for completions, another for chat.

A token's logprob and its entry among the alternatives come from the same float, so a client can
compare them for equality to see whether the token was the likeliest.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.text.samples import SampleOutput, TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CompletionLogprobs", "chat_logprobs", "fingerprint", "finite", "prompt_logprobs"]

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write: for tokens that top_k or the like cut off."""


class CompletionLogprobs:
    """The ``logprobs`` of one completion choice, or of its next piece if it is streamed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0  # characters of the text before the next token

    def prompt(self, token_ids: Sequence[int], logprobs: TokenLogprobs) -> dict[str, list[Any]]:
        """The prompt's tokens, for ``echo``; the first has no logprob."""
        fields = self._fields(token_ids[:1], [None], [None])
        _extend(fields, self.generated(token_ids[1:], logprobs))
        return fields

    def generated(self, token_ids: Sequence[int], logprobs: TokenLogprobs) -> dict[str, list[Any]]:
        """The next tokens."""
        chosen = finite(logprobs.logprobs)
        rows = zip(
            token_ids,
            chosen,
            logprobs.top_ids.tolist(),
            finite(logprobs.top_logprobs),
            strict=True,
        )
        return self._fields(token_ids, chosen, [self._alternatives(*row) for row in rows])

    def prompt_and_generated(
        self,
        prompt_ids: Sequence[int],
        prompt: TokenLogprobs,
        token_ids: Sequence[int],
        logprobs: TokenLogprobs,
    ) -> dict[str, list[Any]]:
        """Both, as one list."""
        fields = self.prompt(prompt_ids, prompt)
        _extend(fields, self.generated(token_ids, logprobs))
        return fields

    def _fields(
        self, token_ids: Sequence[int], chosen: list[Any], top: list[Any]
    ) -> dict[str, list[Any]]:
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": chosen,
            "top_logprobs": top,
            "text_offset": [self._advance(token_id) for token_id in token_ids],
        }

    def _alternatives(
        self, token_id: int, chosen: float, top_ids: list[int], top: list[float]
    ) -> dict[str, float]:
        """The best k, and the chosen token. Tokens with the same text share the better logprob."""
        text = self._tokenizer.token_text
        entries: dict[str, float] = {}
        for each, logprob in zip(top_ids, top, strict=True):
            entries.setdefault(text(each), logprob)
        entries.setdefault(text(token_id), chosen)
        return entries

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokenizer.visible[token_id]))
        return offset


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: TokenLogprobs
) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice.

    The bytes of its tokens join to the text, so special tokens, such as the one at the end, have
    none; their name is in ``token``.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.visible[token_id]),
        }

    content = []
    chosen, top = finite(logprobs.logprobs), finite(logprobs.top_logprobs)
    for row, (token_id, logprob) in enumerate(zip(token_ids, chosen, strict=True)):
        top_ids = logprobs.top_ids[row].tolist()
        alternatives = [entry(*each) for each in zip(top_ids, top[row], strict=True)]
        content.append({**entry(token_id, logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: TokenLogprobs,
    ranks: Int32Array,
) -> list[dict[str, dict[str, Any]] | None]:
    """``prompt_logprobs`` as vLLM writes them: null for the first token, then entries by token id.

    Args:
        tokenizer: spells tokens.
        token_ids: of the prompt.
        logprobs: of the prompt's tokens from the second on.
        ranks: of the same tokens.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    rows = zip(
        token_ids[1:],
        finite(logprobs.logprobs),
        ranks.tolist(),
        logprobs.top_ids.tolist(),
        finite(logprobs.top_logprobs),
        strict=True,
    )
    written: list[dict[str, dict[str, Any]] | None] = [None]
    for token_id, chosen, rank, top_ids, top in rows:
        entries = {str(token_id): entry(token_id, chosen, rank)}
        for number, (top_id, logprob) in enumerate(zip(top_ids, top, strict=True), 1):
            if top_id != token_id:
                entries[str(top_id)] = entry(top_id, logprob, number)
        written.append(entries)
    return written


def fingerprint(
    outputs: Sequence[SampleOutput],
    *,
    packed: bool,
    input_ids: Sequence[Sequence[int]] | None = None,
) -> str:
    """``system_fingerprint``: JSON that carries the ids of each choice.

    Args:
        outputs: one for each choice.
        packed: add the logprobs, as base64 of raw little-endian arrays, top-k row by row.
        input_ids: the ids of each prompt, if the client gets them.
    """
    fields: dict[str, Any] = {"completion_ids": [output.token_ids for output in outputs]}
    if packed:
        pieces = [output.logprobs or _no_logprobs(outputs) for output in outputs]
        has_top = any(piece.top_ids.shape[1] > 0 for piece in pieces)
        fields["packed_chosen_logprobs"] = [_pack(piece.logprobs, "<f4") for piece in pieces]
        fields["packed_topk_indices"] = (
            [_pack(piece.top_ids, "<i4") for piece in pieces] if has_top else None
        )
        fields["packed_topk_logprobs"] = (
            [_pack(piece.top_logprobs, "<f4") for piece in pieces] if has_top else None
        )
    if input_ids is not None:
        fields["input_ids"] = input_ids
    return msgspec.json.encode(fields).decode()


def _no_logprobs(outputs: Sequence[SampleOutput]) -> TokenLogprobs:
    """The logprobs of a choice that gets no token in this piece of the stream."""
    width = max((o.logprobs.top_ids.shape[1] for o in outputs if o.logprobs), default=0)
    none = np.zeros((0, width), np.float32)
    return TokenLogprobs(np.zeros(0, np.float32), np.zeros((0, width), np.int32), none)


def _pack(array: np.ndarray[Any, Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def finite(logprobs: Float32Array) -> Any:
    """Logprobs as nested lists of numbers that JSON can write."""
    return np.maximum(logprobs, np.float32(_LOWEST)).tolist()


def _extend(fields: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    for name, values in more.items():
        fields[name] += values
