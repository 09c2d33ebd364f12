"""One sample of a prompt: its output since the last call of ``take``.

A stream takes whenever there is news, a plain answer once, at the end. Both get the same output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.text.text_stream import TextStream
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Sample", "SampleOutput", "TokenLogprobs", "joined_runs"]


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
        """With at most this many alternatives for each token."""
        return TokenLogprobs(self.logprobs, self.top_ids[:, :width], self.top_logprobs[:, :width])

    def copy(self) -> TokenLogprobs:
        """A copy, which does not keep alive the message that the arrays may be views of."""
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
    """The output of a sample: in a stream, since the previous output; otherwise all of it.

    The joined texts of a stream are the whole text. A token may come before its text: while it is
    half a character, or may begin a stop string.

    Attributes:
        index: of the sample.
        text: without stop strings.
        token_ids: with the end-of-sequence token, and up to the end of a stop string.
        logprobs: of ``token_ids``; None if none were asked for.
        finish_reason: "stop", "length", or "abort" if cancelled; None while the sample goes on.
        weights_versions: of ``token_ids``: runs of a version and a number of tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    weights_versions: Sequence[tuple[int, int]] = ()


class Sample:
    """One sample while it grows.

    Args:
        index: among the samples of its prompt.
        tokenizer: makes its text.
        text: makes its text as tokens come; None if the text is made at the end.
        unseen_ids: tokens that end the sample without being part of its text.

    Attributes:
        token_ids: so far, including those that were taken; no longer there once all are taken.
    """

    __slots__ = (
        "_logprobs",
        "_num_taken",
        "_text",
        "_tokenizer",
        "_unseen_ids",
        "_version",
        "_version_ends",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_tokens",
        "token_ids",
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
        self.token_ids: list[int] = []
        self._num_taken = 0
        self._logprobs: list[TokenLogprobs] = []
        self._version = 0  # of the weights that drew the last token
        # Of the versions before it: where their tokens end among those not taken, and the version.
        self._version_ends: list[tuple[int, int]] = []

    def extend(
        self,
        token_ids: list[int],
        logprobs: TokenLogprobs | None,
        finish_reason: str | None,
        weights_version: int = 0,
    ) -> None:
        """Adds the next tokens, and the finish reason if they are the last.

        A stop string ends the sample with "stop"; the tokens after it are left out.
        """
        self.finish_reason = finish_reason
        is_final = finish_reason is not None
        if self._text is not None and self._text.feed(self._seen(token_ids), final=is_final):
            self.finish_reason = "stop"
            counted = self._text.num_tokens - self.num_tokens
            token_ids = token_ids[:counted]
            logprobs = None if logprobs is None else logprobs[:counted]
        if weights_version != self._version:
            if num_untaken := len(self.token_ids) - self._num_taken:
                self._version_ends.append((num_untaken, self._version))
            self._version = weights_version
        self.num_tokens += len(token_ids)
        self.token_ids += token_ids
        if logprobs is not None:
            self._logprobs.append(logprobs.copy())

    def _seen(self, token_ids: list[int]) -> list[int]:
        """The tokens that make text."""
        if self._unseen_ids and token_ids and token_ids[-1] in self._unseen_ids:
            return token_ids[:-1]
        return token_ids

    @property
    def reads(self) -> bool:
        """Whether its text is made while it grows."""
        return self._text is not None

    @property
    def weights_version(self) -> int:
        """Of the weights that drew its last token."""
        return self._version

    @property
    def was_cancelled(self) -> bool:
        """Whether it was cancelled, instead of ending by itself."""
        return self.finish_reason == "abort"

    def cancel(self) -> None:
        """Leaves the sample out of the answer: other samples have ended before it."""
        self.finish_reason = "abort"

    @property
    def has_news(self) -> bool:
        """Whether there is something for a stream: text, or the end."""
        return self.finish_reason is not None or (self._text is not None and self._text.has_text)

    def take(self) -> SampleOutput:
        """The output since the last call. Decodes the rest of the text, which may take a while."""
        token_ids, self._num_taken = self.token_ids[self._num_taken :], len(self.token_ids)
        if self.finish_reason is not None:
            self.token_ids, self._num_taken = [], 0
        logprobs, self._logprobs = self._logprobs, []
        ends, self._version_ends = self._version_ends, []
        ends.append((len(token_ids), self._version))
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
            _runs(ends),
        )


def _runs(ends: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of a version and a number of tokens, from the end of each run and its version."""
    runs: list[tuple[int, int]] = []
    start = 0
    for end, version in ends:
        if end > start:
            runs = joined_runs(runs, [(version, end - start)])
        start = end
    return runs


def joined_runs(
    before: Sequence[tuple[int, int]], more: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Runs of a version and a number of tokens, where neighbours of one version are one run."""
    runs = list(before)
    for version, num_tokens in more:
        if runs and runs[-1][0] == version:
            num_tokens += runs.pop()[1]
        runs.append((version, num_tokens))
    return runs
