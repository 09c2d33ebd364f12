"""Ends connections that send nothing, hardly anything, or no HTTP, with an error like any other.

::

    connected, or first byte of a request ──▶ whole head        within request_read_timeout_s
    whole head ──▶ whole body                                   some of it in each such time
    answered ──▶ first byte of the next request                 uvicorn's timeout_keep_alive

No time passes while the server does not read, because it has enough of a body or of requests.

A head has at most 64 KiB: its lines are counted as they are parsed, since one read may bring more
than one request, and what is not a whole line yet is counted by the read.

When the web server retires, a connection moves to another process between two requests. What has
come of the next request moves with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.launch.moving_connections import Heirs
from tokasaurus.server.errors import HeadTooLarge, ReadTimeout
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.request_ids import REQUEST_ID_HEADER, request_id_of

__all__ = ["Connection", "Retirement", "connections"]

_MIN_BYTES = 1024  # of a body in each timeout
_MAX_HEAD_BYTES = 1 << 16
_LINE_BYTES = 4  # of a header, besides its name and value


@dataclass(eq=False)
class Retirement:
    """Of a web server: it accepts no more connections, and those that it has end or move.

    Attributes:
        has_begun: it has.
        heirs: take connections; None if there are none.
    """

    has_begun: bool = False
    heirs: Heirs | None = None


class _Awaits(Enum):
    HEAD = auto()  # a head, or the rest of one
    BODY = auto()
    NOTHING = auto()


class Connection(HttpToolsProtocol):
    """One connection. It checks itself now and then: a timer for each request would cost more."""

    read_timeout_s: float
    retirement: Retirement

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaits = _Awaits.HEAD
        self._since = self.loop.time()
        self._num_bytes = 0  # since then; of a head, all bytes
        self._head_bytes = 0  # of the lines of the head that are parsed
        self._error: TokasaurusError | None = None  # found while a head is parsed
        self._turned = False  # it awaits something else since the last data came
        self._body_bytes = 0  # of the last request that has begun, so far
        self._held = b""  # has come after the last request before the connection moves
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_in(self.read_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not (self.retirement.has_begun and self._can_move):
            self._read(data)
            return
        self._held += data
        if self._has_begun:
            self._read_request()
        self.retire()

    def _read_request(self) -> None:
        """Reads what is held up to the end of one request."""
        held, self._held = self._held, b""
        start = 0
        while start < len(held) and not self.transport.is_closing():
            end = self._end_of_piece(held, start)
            self._read(held[start:end])
            start = end
            if self._awaits is _Awaits.NOTHING:
                break
        self._held = held[start:]

    def _end_of_piece(self, data: bytes, start: int) -> int:
        """The end of a piece in which no second request begins, since the parser reads all of it.

        A request ends with a line, or with the last byte of a body of known length.
        """
        if self._awaits is _Awaits.BODY:
            for name, value in self.headers:
                if name == b"content-length":
                    return start + max(1, int(value) - self._body_bytes)
        return data.find(b"\n", start) + 1 or len(data)

    def _read(self, data: bytes) -> None:
        self._turned = False
        super().data_received(data)
        if self._awaits is _Awaits.NOTHING and self._is_idle:  # bytes between two requests
            self._await(_Awaits.HEAD)
        # It is unknown how much of the data belongs to what has just begun.
        self._num_bytes += 1 if self._turned else len(data)
        if self._awaits is _Awaits.HEAD and self._num_bytes > _MAX_HEAD_BYTES:
            self._refuse(_head_too_large())

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn if the parser, or a method that it calls, has raised an error."""
        # The bytes that have just come are not counted yet.
        self._num_bytes += 1
        self._refuse(self._error or RequestError("this is not a valid HTTP request"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._awaits is _Awaits.NOTHING:
            self._await(_Awaits.HEAD)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + _LINE_BYTES)
        if self._awaits is not _Awaits.BODY:  # what follows a body may not change its head
            super().on_header(name, value)

    def _count_head(self, num_bytes: int) -> None:
        """Raises an error in the parser if the head is too large, so that it is not answered."""
        self._head_bytes += num_bytes
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._error = _head_too_large()
            raise self._error

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._await(_Awaits.BODY)
        self._body_bytes = 0
        if self.retirement.has_begun:
            self.retire()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.retirement.has_begun:
            self.retire()

    def retire(self) -> None:
        """Moves the connection to another process if it can, and otherwise lets it end in peace.

        Requests that have begun are answered before it moves. A client may send the next one before
        it has these answers, and so on, so no further one begins here.

        If it cannot move, the answer to its last request says that it closes. A client that has the
        head of an answer without ``Connection: close`` may have sent its next request before it can
        see the connection close. So such a connection stays open for one more, or until it has been
        idle for too long.
        """
        if self._may_move:
            self._move()
        elif self._can_move:
            if self._held:  # more waits in the system
                # Not by ``flow``, which reads on as soon as a request asks for its body.
                self.transport.pause_reading()
        elif not self._is_idle and not self.cycle.response_started and self.cycle.keep_alive:
            self.cycle.keep_alive = False
            # uvicorn before 0.53 closes the connection, and does not say so.
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    @property
    def _can_move(self) -> bool:
        """Whether there is another process, and nothing but the socket to move; not with TLS."""
        return self.retirement.heirs is not None and self._is_plain

    @property
    def _has_begun(self) -> bool:
        """Whether a part of a request has been read, and more of it must come."""
        return self._awaits is _Awaits.BODY or (
            self._awaits is _Awaits.HEAD and self._num_bytes > 0
        )

    @property
    def _may_move(self) -> bool:
        """Whether no request and no answer is under way in this process now."""
        return (
            self._can_move
            and self._is_idle
            and not self._has_begun
            and not self.pipeline
            and not self.transport.is_closing()
            and self.transport.get_write_buffer_size() == 0
        )

    def _move(self) -> None:
        heirs = self.retirement.heirs
        assert heirs is not None
        # What the client sends from now on waits in the system.
        self.transport.pause_reading()
        if heirs.give(self.transport.get_extra_info("socket").fileno(), self._held):
            self.transport.abort()  # closes this process's descriptor, not the connection
            return
        self._read_request()  # none can take it now, so the next request is answered here
        if not self._held:
            self.transport.resume_reading()

    @property
    def _is_plain(self) -> bool:
        return self.transport.get_extra_info("sslcontext") is None

    def resume(self, unread: bytes) -> None:
        """The connection was moved here, between two requests.

        Args:
            unread: what the process before has received of the next ones.
        """
        self._await(_Awaits.NOTHING)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        if unread:
            self.data_received(unread)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._await(_Awaits.NOTHING)

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await(self, what: _Awaits) -> None:
        self._awaits, self._since, self._num_bytes = what, self.loop.time(), 0
        self._turned = True

    def _look_in(self, delay_s: float) -> None:
        self._timer = self.loop.call_later(delay_s, self._look)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left_s = self._since + self.read_timeout_s - self.loop.time()
        if self._awaits is _Awaits.NOTHING:
            left_s = self.read_timeout_s
        elif left_s <= 0:
            if not self._goes_on:
                what = "body" if self._awaits is _Awaits.BODY else "head"
                self._refuse(ReadTimeout(what, self.read_timeout_s))
                return
            self._since, left_s = self.loop.time(), self.read_timeout_s
            if self._awaits is _Awaits.BODY:
                self._num_bytes = 0
        self._look_in(left_s)

    @property
    def _goes_on(self) -> bool:
        """Whether the client may take longer: it is not at fault, or it sends enough."""
        if self._awaits is _Awaits.HEAD:
            return not self._is_idle  # the head waits for the answer to the request before it
        waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
        return waits or self._num_bytes >= _MIN_BYTES

    def _refuse(self, error: TokasaurusError) -> None:
        """Closes the connection, with an answer if a request has begun and its answer has not."""
        self._end_timer()
        if self.transport.is_closing():
            return
        is_body = self._awaits is _Awaits.BODY
        # An answer that has begun cannot be followed by one to the next request before its end.
        may_answer = self._is_idle or not self.cycle.response_started
        if may_answer and (not self._is_idle if is_body else self._num_bytes):
            answer = error_answer(error)
            name = (REQUEST_ID_HEADER, request_id_of(self.headers or ()))
            headers = [*answer.raw_headers, name, (b"connection", b"close")]
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            status = STATUS_LINE[answer.status_code]
            self.transport.write(b"".join([status, *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the head of a request may have {_MAX_HEAD_BYTES} bytes")


def connections(read_timeout_s: float, retirement: Retirement) -> type[Connection]:
    """The class that uvicorn makes connections of.

    Args:
        read_timeout_s: ``request_read_timeout_s``.
        retirement: of the web server.
    """
    values = {"read_timeout_s": read_timeout_s, "retirement": retirement}
    return type("ConfiguredConnection", (Connection,), values)
