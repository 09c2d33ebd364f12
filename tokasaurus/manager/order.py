"""The order of sequences: one integer each, by priority, then by virtual time.

::

    bit   62 ............ 42   41 ............. 0
          priority, lower first  virtual time

It decides which sequence enters next, which goes on first, and which gives way.
"""

from __future__ import annotations

from typing import TypeVar

from tokasaurus.protocol.arrays import Int64Array
from tokasaurus.protocol.messages import MAX_PRIORITY

__all__ = ["NO_ORDER", "first_order", "priority_of", "time_of"]

_TIME_BITS = 42
NO_ORDER = (1 << 63) - 1  # after every order

_Order = TypeVar("_Order", int, Int64Array)


def first_order(priority: int) -> int:
    """The order at this priority and the virtual time 0. Later times add to it.

    A time that needs more bits than there are runs on into the next priority: it comes later still.
    """
    return (MAX_PRIORITY + priority) << _TIME_BITS


def priority_of(order: _Order) -> _Order:
    """A number for the priority of a sequence, or of each of these; lower goes first."""
    return order >> _TIME_BITS


def time_of(order: _Order) -> _Order:
    """The virtual time of a sequence, or of each of these."""
    return order & ((1 << _TIME_BITS) - 1)
