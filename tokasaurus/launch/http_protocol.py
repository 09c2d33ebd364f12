"""Connections that say nothing, or hardly anything, end: uvicorn alone would hold them for ever.

::

    connected, or first byte of a request ──▶ its head is there      within request_read_timeout_s
    head is there ──▶ body is there                                  in each such time, some of it
    answered ──▶ first byte of the next request                      uvicorn's timeout_keep_alive

While the server itself does not read, since it has enough of a body or of requests for now, no time passes.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.http_errors import HeadTooLarge, ReadTimeout, error_answer
from tokasaurus.server.request_ids import REQUEST_ID_HEADER, new_request_id

__all__ = ["connections"]

_MIN_BYTES = 1024  # of a body, without which it does not come on
_MAX_HEAD_BYTES = 1 << 16


class _Awaits(Enum):
    HEAD = auto()  # the rest of one, or one at all
    BODY = auto()
    NOTHING = auto()


class _Connection(HttpToolsProtocol):
    """One connection. Only what does not come all at once costs a timer."""

    read_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaits = _Awaits.HEAD
        self._num_bytes = 0  # of the head, or of the body since the timer was set
        self._turned = False  # to something else, since the last data came
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._turned = False
        super().data_received(data)
        if self._awaits is _Awaits.NOTHING and self._is_idle:  # bytes between two requests
            self._await(_Awaits.HEAD)
        if self._awaits is not _Awaits.NOTHING and self._timer is None:
            self._set_timer()
        # Who knows how much of it belongs to what has just begun.
        self._num_bytes += 1 if self._turned else len(data)
        if self._awaits is _Awaits.HEAD and self._num_bytes > _MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the head of a request may have {_MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._awaits is _Awaits.NOTHING:
            self._await(_Awaits.HEAD)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._await(_Awaits.BODY)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._await(_Awaits.NOTHING)

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await(self, what: _Awaits) -> None:
        self._awaits, self._num_bytes, self._turned = what, 0, True
        self._end_timer()

    def _set_timer(self) -> None:
        self._timer = self.loop.call_later(self.read_timeout_s, self._time_is_up)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        self._timer = None
        if self._awaits is _Awaits.BODY:
            waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
            goes_on = waits or self._num_bytes >= _MIN_BYTES
            self._num_bytes = 0
        else:
            goes_on = not self._is_idle  # the head of a request behind that which is being answered
        if goes_on:
            self._set_timer()
            return
        what = "body" if self._awaits is _Awaits.BODY else "head"
        self._refuse(ReadTimeout(what, self.read_timeout_s))

    def _refuse(self, error: TokasaurusError) -> None:
        """Closes the connection, with an answer if something was asked and nothing was answered yet."""
        self._end_timer()
        if self.transport.is_closing():
            return
        is_body = self._awaits is _Awaits.BODY
        if not self.cycle.response_started if is_body else self._num_bytes:
            answer = error_answer(error)
            name = (REQUEST_ID_HEADER, new_request_id())
            headers = [*answer.raw_headers, name, (b"connection", b"close")]
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            status = STATUS_LINE[answer.status_code]
            self.transport.write(b"".join([status, *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


def connections(read_timeout_s: float) -> type[asyncio.Protocol]:
    """What uvicorn makes connections of.

    Args:
        read_timeout_s: ``request_read_timeout_s``.
    """
    return type("Connection", (_Connection,), {"read_timeout_s": read_timeout_s})
