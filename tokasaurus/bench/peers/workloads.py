"""The workloads that every engine runs alike.

The lengths of a workload are always the same. The ids differ between repetitions, so that no
engine finds the prompts of an earlier repetition in its prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["WORKLOADS", "Request", "Workload"]

# Ids below are special tokens.
_FIRST_ID = 10


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        prompt: its ids.
        max_tokens: of each completion, which has exactly this length.
        n: completions.
    """

    prompt: list[int]
    max_tokens: int
    n: int = 1


class Workload:
    """Makes the requests of a workload, which are all given at once.

    Args:
        name: one of ``WORKLOADS``.
        vocab_size: ids are below it.
        size: the number of requests, as a multiple of the usual number.
    """

    def __init__(self, name: str, vocab_size: int, size: float = 1.0) -> None:
        self.name, self._vocab_size, self._size = name, vocab_size, size
        self._ids = random.Random(name)

    def requests(self) -> list[Request]:
        """The requests of the next repetition."""
        return WORKLOADS[self.name](self)

    def _count(self, usual: int) -> int:
        return max(1, round(usual * self._size))

    def _prompt(self, length: int) -> list[int]:
        return [self._ids.randrange(_FIRST_ID, self._vocab_size) for _ in range(length)]

    def mixed(self) -> list[Request]:
        """Chat-like traffic: nothing is shared, and lengths are log-normal."""
        lengths = random.Random(1)

        def length(mean: float, deviation: float, shortest: int, longest: int) -> int:
            return max(shortest, min(longest, int(lengths.lognormvariate(mean, deviation))))

        return [
            Request(self._prompt(length(4.6, 0.9, 8, 768)), length(4.2, 0.8, 8, 256))
            for _ in range(self._count(96))
        ]

    def repeated(self) -> list[Request]:
        """Repeated sampling: 32 completions of long prompts that share a few-shot prefix."""
        shots = self._prompt(384)
        return [Request(shots + self._prompt(128), 64, n=32) for _ in range(self._count(4))]

    def separate(self) -> list[Request]:
        """Repeated sampling as a client does it that sends each sample as a request of its own."""
        return [
            Request(request.prompt, request.max_tokens)
            for request in self.repeated()
            for _ in range(request.n)
        ]

    def single(self) -> list[Request]:
        """One request alone: its latency."""
        return [Request(self._prompt(128), 128)]


WORKLOADS = {
    "mixed": Workload.mixed,
    "repeated": Workload.repeated,
    "separate": Workload.separate,
    "single": Workload.single,
}
