"""An engine's end of the connection to its keeper, as the engine's supervisor uses it."""

from __future__ import annotations

from collections.abc import Iterable

from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch.keeping.memory import untaken_memory
from tokasaurus.launch.keeping.notes import (
    Begin,
    EngineLink,
    Engineward,
    Keeperward,
    Standing,
)
from tokasaurus.launch.lifeline import MayRetire, Succession

__all__ = ["KeeperEnd"]


class KeeperEnd:
    """What an engine says to its keeper, and hears of it.

    Args:
        link: this end.
        begin: the keeper's first note.
    """

    def __init__(self, link: EngineLink, begin: Begin) -> None:
        self._link = link
        self._begin = begin

    def fileno(self) -> int:
        return self._link.fileno()

    def receive(self) -> list[Engineward | Keeperward] | None:
        """The notes that have come; None if the keeper is gone."""
        return self._link.receive()

    def send(self, note: Keeperward) -> None:
        """Tells the keeper."""
        self._link.send(note)

    @property
    def succession(self) -> Succession:
        """What the server does to follow the engine before, and to be followed."""
        begin = self._begin
        return Succession(begin.directory, begin.number, begin.predecessor is not None)

    def tell_standing(
        self, slices: EngineSlices, answer: MayRetire, process_ids: Iterable[int]
    ) -> None:
        """Tells the keeper how the engine stands.

        Args:
            slices: its configuration.
            answer: of its server.
            process_ids: of its workers.
        """
        untaken_bytes, arithmetic = untaken_memory(slices, process_ids)
        self.send(
            Standing(
                refusal=answer.refusal,
                has_new_weights=answer.has_new_weights,
                host=slices.server.host,
                data_dir=slices.server.data_dir,
                num_kv_tokens=slices.memory_plan.kv_tokens,
                max_tokens_per_forward=slices.replicas[0].manager.max_tokens_per_forward,
                untaken_bytes=untaken_bytes,
                untaken_plan=arithmetic,
            )
        )
