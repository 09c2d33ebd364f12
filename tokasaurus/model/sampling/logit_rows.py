"""Some rows of a batch's logits, which are read where they lie."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["LogitRows"]

# Logits that the CPU works on at once, 4 MiB: each step leaves them in its caches for the next one.
# With fewer, threads would wait for one another more often than they compute.
_CACHED = 1 << 20


class LogitRows:
    """Some rows of logits.

    Args:
        logits: [rows of the batch, vocabulary] fp32. Never changed.
        index: [rows] int64, on the same device; None for all rows.
    """

    def __init__(self, logits: Tensor, index: Tensor | None = None) -> None:
        self._logits, self._index = logits, index
        self.vocab_size = logits.shape[1]
        self.device = logits.device

    def __len__(self) -> int:
        return len(self._logits if self._index is None else self._index)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields all rows, as many at a time as the device works on best.

        Yields:
            Which of the rows, and their logits.
        """
        count = len(self)
        step = max(_CACHED // self.vocab_size, 1) if self.device.type == "cpu" else max(count, 1)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, self._logits[part if self._index is None else self._index[part]]

    def gather(self, ids: Tensor) -> Tensor:
        """[rows, some]: the logits of these ids, [rows, some]."""
        if self._index is None:
            return self._logits.gather(1, ids)
        return self._logits[self._index[:, None], ids]

    def take(self, rows: Tensor) -> LogitRows:
        """Some of these rows, by their index among them."""
        return LogitRows(self._logits, rows if self._index is None else self._index[rows])

    def whole(self) -> Tensor:
        """[rows, vocabulary]: a copy, unless these are all rows."""
        return self._logits if self._index is None else self._logits[self._index]
