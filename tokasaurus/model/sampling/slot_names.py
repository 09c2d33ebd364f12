"""Which request a slot's sequence belongs to, so that the worker's log can name it."""

from __future__ import annotations

import logging

from tokasaurus.observability.request_names import about
from tokasaurus.protocol.messages import SlotParameters

__all__ = ["SlotNames"]

log = logging.getLogger(__name__)


class SlotNames:
    """The names of the requests in all slots; those without a name are ""."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def enter(self, parameters: SlotParameters) -> None:
        """Sequences enter slots."""
        slots = parameters.slots.tolist()
        if not parameters.names:
            for slot in slots if self._names else ():
                self._names.pop(slot, None)
            return
        is_shown = log.isEnabledFor(logging.DEBUG)
        rows = zip(
            slots,
            parameters.name_index.tolist(),
            parameters.sample_index.tolist(),
            strict=True,
        )
        for slot, place, sample_index in rows:
            name = self._names[slot] = parameters.names[place]
            if is_shown:
                log.debug("sample %d enters slot %d", sample_index, slot, extra=about(name))

    def extra(self, slot: int) -> dict[str, str]:
        """The ``extra`` of a log line about a slot."""
        return about(self._names.get(slot, ""))
