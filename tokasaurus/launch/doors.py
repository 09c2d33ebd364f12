"""The messages that each door takes."""

from __future__ import annotations

from tokasaurus.protocol.messages import ForwardBatch, ForwardResult, FromServer, ToServer
from tokasaurus.protocol.wire import Codec

__all__ = ["TO_MANAGER", "TO_SERVER", "TO_WORKER"]

TO_SERVER: Codec[ToServer] = Codec(ToServer)
TO_MANAGER: Codec[FromServer | ForwardResult] = Codec(FromServer | ForwardResult)
TO_WORKER: Codec[ForwardBatch] = Codec(ForwardBatch)
