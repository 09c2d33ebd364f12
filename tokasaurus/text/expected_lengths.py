"""How many tokens a sample is expected to have, learned from those that have ended.

The router predicts with it how much work it sends to a replica. The manager's forecast is finer: it
knows the tokens of every running sequence.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["ExpectedLengths"]

_FIRST_GUESS = 256.0  # tokens, before any sample has ended
_NEW_SHARE = 0.02  # least weight of the latest sample in a mean
_MAX_MEANS = 1024


class ExpectedLengths:
    """The mean length of samples by their ``max_tokens``.

    Clients send many requests of one kind, with one ``max_tokens``. Where none with the same has
    ended, the mean share of ``max_tokens`` of all samples counts.
    """

    def __init__(self) -> None:
        # By max_tokens, the one used longest ago first: the mean, and how many samples it is of.
        self._means: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._share: tuple[float, int] | None = None

    def expect(self, max_tokens: int) -> int:
        """The tokens of a sample, at least 1 and at most ``max_tokens``."""
        mean = self._means.get(max_tokens)
        if mean is not None:
            expected = mean[0]
        elif self._share is not None:
            expected = self._share[0] * max_tokens
        else:
            expected = _FIRST_GUESS
        return max(1, min(max_tokens, round(expected)))

    def learn(self, max_tokens: int, num_tokens: int) -> None:
        """A sample has ended by itself."""
        self._means[max_tokens] = _moved(self._means.get(max_tokens), num_tokens)
        self._means.move_to_end(max_tokens)
        if len(self._means) > _MAX_MEANS:
            self._means.popitem(last=False)
        self._share = _moved(self._share, num_tokens / max_tokens)


def _moved(mean: tuple[float, int] | None, value: float) -> tuple[float, int]:
    if mean is None:
        return float(value), 1
    before, count = mean
    return before + max(_NEW_SHARE, 1 / (count + 1)) * (value - before), count + 1
