"""The HTTP processes of an engine as its supervisor sees them."""

from __future__ import annotations

from tokasaurus.launch.lifeline import Failed
from tokasaurus.launch.members import Member
from tokasaurus.launch.restarts import Restarts
from tokasaurus.protocol.role import Role
from tokasaurus.text.numbering import MAX_PROCESSES

__all__ = ["HTTPMembers"]


class HTTPMembers:
    """Which HTTP processes there are, and whether one that has ended is started again.

    They keep nothing, so one that ends costs its connections only. Each gets a number of its own,
    also one that is started again: request ids contain it, and must not come back.

    Args:
        number: of processes; 0 if the server's process answers clients itself.
        most_restarts: of each within ten minutes.
    """

    def __init__(self, number: int, most_restarts: int) -> None:
        self.living: set[Member] = set()
        self._num_numbers = 0
        self._restarts = Restarts(most_restarts)
        self._places = {each + 1: each for each in range(number)}  # by number of the process

    def first_roles(self) -> list[Role]:
        """The processes to start."""
        self._num_numbers = len(self._places)
        return [Role("http", number) for number in self._places]

    @property
    def are_ready(self) -> bool:
        """Whether all of them can serve, as far as they know."""
        return all(member.is_ready for member in self.living)

    def ready(self, member: Member) -> None:
        """A process is ready."""
        self._restarts.ready(self._places[member.role.replica])

    def why_not_again(self, member: Member, failure: Failed) -> str | None:
        """Why a process that has ended is not started again; None if it is."""
        if failure.is_final:
            return "it would end in the same way"
        if self._num_numbers + 1 >= MAX_PROCESSES:
            return f"there were {self._num_numbers} of them"
        return self._restarts.ended(self._places[member.role.replica])

    def next_role(self, member: Member) -> Role:
        """The role of the process that takes the place of one that has ended."""
        self._num_numbers += 1
        self._places[self._num_numbers] = self._places.pop(member.role.replica)
        return Role("http", self._num_numbers)
