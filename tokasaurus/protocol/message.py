"""The base of all messages between the rooms."""

from __future__ import annotations

import msgspec

__all__ = ["Message"]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, eq=False):
    """Base of all messages: immutable, encoded as an array whose first item is the class name."""
