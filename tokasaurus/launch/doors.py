"""The messages that each door takes."""

from __future__ import annotations

from tokasaurus.protocol.messages import FromServer, FromWorker, ToServer, ToWorker, WorkerStall
from tokasaurus.protocol.relaying import FromHTTP, ToHTTP
from tokasaurus.protocol.wire import Codec

__all__ = ["FROM_HTTP", "TO_HTTP", "TO_MANAGER", "TO_SERVER", "TO_WORKER"]

TO_SERVER: Codec[ToServer | WorkerStall] = Codec(ToServer | WorkerStall)
TO_MANAGER: Codec[FromServer | FromWorker] = Codec(FromServer | FromWorker)
TO_WORKER: Codec[ToWorker] = Codec(ToWorker)
FROM_HTTP: Codec[FromHTTP] = Codec(FromHTTP)
TO_HTTP: Codec[ToHTTP] = Codec(ToHTTP)
