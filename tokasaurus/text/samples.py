"""One sample of a prompt: what it brought since somebody last asked.

A stream asks whenever there is news, a plain answer asks once, at the end; both get the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.text.text_stream import TextStream
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Sample", "SampleOutput", "TokenLogprobs"]


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Logprobs of consecutive tokens, natural logarithms; k alternatives for each, best first."""

    logprobs: Float32Array  # [tokens]
    top_ids: Int32Array  # [tokens, k]
    top_logprobs: Float32Array  # [tokens, k]

    def __len__(self) -> int:
        return len(self.logprobs)

    def __getitem__(self, tokens: slice) -> TokenLogprobs:
        return TokenLogprobs(self.logprobs[tokens], self.top_ids[tokens], self.top_logprobs[tokens])

    def narrowed(self, width: int) -> TokenLogprobs:
        """With so many alternatives, or fewer, for each."""
        return TokenLogprobs(self.logprobs, self.top_ids[:, :width], self.top_logprobs[:, :width])

    def copy(self) -> TokenLogprobs:
        """The same, without keeping the message alive that the arrays may be views of."""
        return TokenLogprobs(self.logprobs.copy(), self.top_ids.copy(), self.top_logprobs.copy())

    @staticmethod
    def join(pieces: Sequence[TokenLogprobs]) -> TokenLogprobs:
        """Several pieces in order; at least one."""
        if len(pieces) == 1:
            return pieces[0]
        return TokenLogprobs(
            np.concatenate([piece.logprobs for piece in pieces]),
            np.concatenate([piece.top_ids for piece in pieces]),
            np.concatenate([piece.top_logprobs for piece in pieces]),
        )


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """What a sample brought: in a stream, since the output before; otherwise all of it.

    The joined texts of a stream are the text of the whole. A token may be there before its text is:
    while it is half a character, or may begin a stop string.
    """

    index: int
    text: str
    token_ids: list[int]  # with the end-of-sequence token, and up to the end of a stop string
    logprobs: TokenLogprobs | None  # of token_ids; None if none were asked for
    finish_reason: str | None  # "stop", "length", or "abort" if cancelled; None while it goes on


class Sample:
    """One sample on its way.

    Args:
        index: among the samples of its prompt.
        tokenizer: makes its text.
        text: makes its text as tokens come; None if it is wanted at the end only.
        unseen_ids: tokens that end it and are no part of its text.
    """

    __slots__ = (
        "_logprobs",
        "_text",
        "_token_ids",
        "_tokenizer",
        "_unseen_ids",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_tokens",
    )

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        text: TextStream | None,
        unseen_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0  # of its prompt
        self._tokenizer = tokenizer
        self._text = text
        self._unseen_ids = unseen_ids
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def extend(
        self, token_ids: list[int], logprobs: TokenLogprobs | None, finish_reason: str | None
    ) -> None:
        """Takes the next tokens, and the verdict if they are the last.

        Ends with "stop" at a stop string, and then leaves out the tokens after it.
        """
        self.finish_reason = finish_reason
        is_final = finish_reason is not None
        if self._text is not None and self._text.feed(self._seen(token_ids), final=is_final):
            self.finish_reason = "stop"
            counted = self._text.num_tokens - self.num_tokens
            token_ids = token_ids[:counted]
            logprobs = None if logprobs is None else logprobs[:counted]
        self.num_tokens += len(token_ids)
        self._token_ids += token_ids
        if logprobs is not None:
            self._logprobs.append(logprobs.copy())

    def _seen(self, token_ids: list[int]) -> list[int]:
        """Those that make text."""
        if self._unseen_ids and token_ids and token_ids[-1] in self._unseen_ids:
            return token_ids[:-1]
        return token_ids

    @property
    def reads(self) -> bool:
        """Whether its tokens come while it grows."""
        return self._text is not None

    @property
    def was_cancelled(self) -> bool:
        """Whether it did not end by itself."""
        return self.finish_reason == "abort"

    def cancel(self) -> None:
        """It came too late: whatever ended it, nobody wants it any more."""
        self.finish_reason = "abort"

    @property
    def has_news(self) -> bool:
        """Whether a stream has something to show: text, or the end."""
        return self.finish_reason is not None or (self._text is not None and self._text.has_text)

    def take(self) -> SampleOutput:
        """What came since the last call. Decodes what was not decoded on the way, which may take a while."""
        token_ids, self._token_ids = self._token_ids, []
        logprobs, self._logprobs = self._logprobs, []
        if self._text is None:
            text = self._tokenizer.decode(self._seen(token_ids))
        else:
            text = self._text.take()
        return SampleOutput(
            self.index,
            text,
            token_ids,
            TokenLogprobs.join(logprobs) if logprobs else None,
            self.finish_reason,
        )
