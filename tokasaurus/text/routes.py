"""Where requests are: which samples each replica has, and how much work they still are.

Work is counted in tokens: those of the prompt that are probably not in the replica's prefix cache,
and those that the samples are expected to have. It is counted down as tokens arrive and as samples
end, so the work of a replica is what it probably has before it. Numbers are whole, so that nothing
is left over when everything has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tokasaurus.protocol.messages import FromServer, GenerateRequest, Statistics
from tokasaurus.protocol.watching import Outlook

__all__ = ["Part", "Replica", "Route"]


@dataclass(eq=False, slots=True)
class Replica:
    """A replica that lives, as the router sees it.

    Attributes:
        number: of the replica.
        send: gives a message to its manager; must not block.
        num_seats: the sequences that it can run at once.
        num_open: samples that it has and that have not ended.
        work: expected tokens of these samples, of prompts and answers.
        num_delivered: tokens that have come from it.
        statistics: its latest; None before the first.
        outlook: its latest forecast; None before the first.
        backlog_s: its last prediction.
        is_stalled: it gets nothing as long as another replica is not.
        catching_up: commands that bring a restarted replica to where the others are.
        obstacle: why it cannot get there; None if it can.
    """

    number: int
    send: Callable[[FromServer], None]
    num_seats: int
    num_open: int = 0
    work: int = 0
    num_delivered: int = 0
    statistics: Statistics | None = None
    outlook: Outlook | None = None
    backlog_s: float = 0.0
    is_stalled: bool = False
    catching_up: set[int] = field(default_factory=set)
    obstacle: str | None = None

    @property
    def room(self) -> int:
        """Free seats; less than 0 if samples wait there."""
        return self.num_seats - self.num_open

    @property
    def mark(self) -> tuple[int, int]:
        """What changes as long as the replica goes on."""
        return self.num_delivered, 0 if self.statistics is None else self.statistics.num_batches

    @property
    def is_fit(self) -> bool:
        """Whether it may get requests."""
        return not self.catching_up and self.obstacle is None


class Part:
    """Samples of a request that are at one replica, and have not ended.

    Args:
        part_id: how the manager knows the request.
        replica: that has them.
        num_tokens: generated so far, by sample.
        expected: the tokens that each sample is expected to have.
        prompt_work: tokens to compute before the first token comes.
    """

    __slots__ = ("_expected", "_prompt_work", "eta_s", "num_tokens", "part_id", "replica")

    def __init__(
        self,
        part_id: int,
        replica: Replica,
        num_tokens: dict[int, int],
        expected: int,
        prompt_work: int,
    ) -> None:
        self.part_id = part_id
        self.replica = replica
        self.num_tokens = num_tokens
        self.eta_s = 0.0  # its last prediction
        self._expected = expected
        self._prompt_work = prompt_work
        replica.num_open += len(num_tokens)
        replica.work += prompt_work + sum(map(self._left, num_tokens.values()))

    def advance(self, sample_index: int, num_new: int) -> None:
        """More tokens of a sample have come."""
        before = self.num_tokens[sample_index]
        self.num_tokens[sample_index] = before + num_new
        # At least 1 token is left, as in _left.
        num_countable = self._expected - 1 - before
        if num_countable > 0:
            self.replica.work -= min(num_new, num_countable)
        if self._prompt_work:
            self._count_prompt()

    def end(self, sample_index: int) -> int:
        """A sample has ended; returns its tokens."""
        num_tokens = self.num_tokens.pop(sample_index)
        self.replica.num_open -= 1
        self.replica.work -= self._left(num_tokens)
        self._count_prompt()
        return num_tokens

    def leave(self) -> None:
        """The replica does not count these samples any more."""
        self.replica.num_open -= len(self.num_tokens)
        self.replica.work -= sum(map(self._left, self.num_tokens.values()))
        self._count_prompt()

    def _left(self, num_tokens: int) -> int:
        return max(1, self._expected - num_tokens)

    def _count_prompt(self) -> None:
        self.replica.work -= self._prompt_work
        self._prompt_work = 0


@dataclass(eq=False, slots=True)
class Route:
    """Where a request is.

    Attributes:
        request: as the text core sent it.
        parts: by part id.
        held: samples that wait until there is a replica.
        num_parts: made so far.
        num_finished: samples that ended by themselves.
        is_split: it has or had several parts, so that ends are counted in the router.
        is_aborted: its replicas were told to end its samples, and will send the last row of each.
        moved_because: why a replica that had a part of it ended; None if none has.
    """

    request: GenerateRequest
    parts: dict[int, Part] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    num_parts: int = 0
    num_finished: int = 0
    is_split: bool = False
    is_aborted: bool = False
    moved_because: str | None = None

    @property
    def has_enough(self) -> bool:
        """Whether ``first_k`` samples have ended by themselves."""
        return 0 < self.request.first_k <= self.num_finished

    @property
    def is_over(self) -> bool:
        """Whether all its samples have ended."""
        return not self.parts and not self.held
