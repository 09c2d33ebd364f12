"""The outposts of an engine, as its supervisor sees them: who has joined, and what runs there.

One thread reads all links and the supervisor's lifelines of processes elsewhere, and passes bytes
on between them. So to the supervisor a process elsewhere has a lifeline like any other.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

from tokasaurus.errors import LaunchError
from tokasaurus.launch.lifeline import Lifeline
from tokasaurus.launch.remote.link import Link, door_keys, take
from tokasaurus.launch.remote.messages import (
    Beat,
    Begin,
    Dismissed,
    Ended,
    FromOutpost,
    Joined,
    Kill,
    Look,
    Notes,
    Open,
    Opened,
    Refused,
    Seen,
    ToOutpost,
    Welcome,
    encode,
    from_outpost,
)
from tokasaurus.launch.remote.outpost import SILENCE_S
from tokasaurus.protocol.role import Role
from tokasaurus.version import __version__

__all__ = ["Outposts", "RemoteProcess"]

log = logging.getLogger(__name__)

A = TypeVar("A")

_BEATS = 5
_DISMISSAL_S = 10.0
_ANSWER_S = 120.0  # to look for CUDA devices takes the longest
_BACKLOG = 2048
_MAX_UNPROVED = 256  # connections that have not proved themselves


class RemoteProcess:
    """A process that an outpost has started, or will."""

    pid: int | None = None  # of another machine, where it has one

    def __init__(self, role: Role, outpost: _Outpost | None) -> None:
        self.role = role
        self._outpost = outpost
        self._ended = threading.Event()
        self._status: int | None = None

    def kill(self) -> None:
        if self._outpost is not None and not self._ended.is_set():
            self._outpost.send(Kill(self.role))

    def wait(self) -> int | None:
        self._ended.wait()
        return self._status

    def end(self, status: int | None) -> None:
        """Notes its end; None if nobody can know any more how it came."""
        self._status = status
        self._ended.set()


@dataclass(eq=False)
class _Outpost:
    index: int
    name: str
    link: Link
    heard_at: float
    children: dict[Role, tuple[RemoteProcess, Lifeline]] = field(default_factory=dict)
    opened: dict[str, str] = field(default_factory=dict)  # addresses of doors
    seen: Seen | None = None
    is_gone: bool = False

    def send(self, message: ToOutpost) -> None:
        self.link.send(encode(message))


class Outposts:
    """Listens for outposts, and runs processes there.

    Args:
        host: the address to listen at, by which outposts reach this machine.
        secret: that all of them know.
        silence_s: how long an outpost may be silent before it counts as gone.
    """

    def __init__(self, host: str, secret: str, silence_s: float = SILENCE_S) -> None:
        self._secret, self._silence_s = secret, silence_s
        self._session = secrets.token_bytes(32)
        self.keys = door_keys(secret, self._session)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._changed = threading.Condition()  # of all below
        self._by_index: dict[int, _Outpost] = {}
        self._arrived: list[_Outpost] = []  # that the thread does not watch yet
        self._begun: list[tuple[_Outpost, Role, Lifeline]] = []  # likewise
        self._is_closing = False
        self._unproved = threading.BoundedSemaphore(_MAX_UNPROVED)
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="outposts", daemon=True)
        self._thread.start()

    # --- for the launcher -------------------------------------------------------------------------

    def missing(self, indices: Collection[int]) -> list[int]:
        """Those of the indices whose outposts have not joined."""
        with self._changed:
            return sorted(set(indices) - set(self._by_index))

    def await_change(self, timeout_s: float) -> None:
        """Waits until an outpost joins or is lost, or a door is opened."""
        with self._changed:
            self._changed.wait(timeout_s)

    def name(self, index: int) -> str:
        """The name of an outpost's machine; the same for the outposts of one machine."""
        return self._at(index).name

    def own_host(self, index: int) -> str:
        """The address at which an outpost reaches this machine."""
        return self._at(index).link.own_host

    def open(self, index: int, door: str) -> None:
        """Lets an outpost take a port for a door."""
        outpost = self._at(index)
        outpost.opened.pop(door, None)
        outpost.send(Open(door))

    def opened(self, index: int, door: str) -> str:
        """Waits for the address of a door. Raises LaunchError if it does not come."""
        outpost = self._at(index)
        return self._answer(outpost, "open a port", lambda: outpost.opened.get(door))

    def look(self, index: int, device: str, instruction_set: str) -> None:
        """Lets an outpost look at its machine, as ``look_here``."""
        self._at(index).send(Look(device, instruction_set))

    def seen(self, index: int) -> Seen:
        """Waits for what an outpost sees. Raises LaunchError if it does not come."""
        outpost = self._at(index)
        seen = self._answer(outpost, "look at its machine", lambda: outpost.seen)
        if seen.machine is None:
            raise LaunchError(f"on {outpost.name}: {seen.problem}")
        return seen

    def _answer(self, outpost: _Outpost, asked: str, answer: Callable[[], A | None]) -> A:
        deadline = time.monotonic() + _ANSWER_S
        with self._changed:
            while (given := answer()) is None:
                left = deadline - time.monotonic()
                if outpost.is_gone or left <= 0:
                    raise LaunchError(f"the outpost on {outpost.name} was to {asked}, and did not")
                self._changed.wait(left)
            return given

    def begin(self, index: int, message: Begin) -> tuple[RemoteProcess, Lifeline]:
        """Starts a process; returns it, with the supervisor's end of its lifeline."""
        role = message.assignment.role
        ours, theirs = Lifeline.pair()
        with self._changed:
            outpost = self._by_index.get(index)
            process = RemoteProcess(role, outpost)
            if outpost is None:  # it has gone since: the process has ended before it began
                process.end(None)
                theirs.close()
                return process, ours
            outpost.children[role] = process, theirs
            self._begun.append((outpost, role, theirs))
        outpost.send(message)
        self._wake()
        return process, ours

    def close(self) -> None:
        """Dismisses all outposts. May be called again."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
        self._wake()
        self._thread.join()
        self._wake_reader.close()
        self._wake_writer.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            self._wake_writer.send(b"w")

    def _at(self, index: int) -> _Outpost:
        with self._changed:
            if index not in self._by_index:
                raise LaunchError(f"outpost {index} is gone")
            return self._by_index[index]

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        interval = self._silence_s / _BEATS
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        beaten_at = 0.0
        while not self._is_closing:
            for key, _ in self._selector.select(interval):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_reader:
                    self._wake_reader.recv(1024)
                    self._adopt()
                elif isinstance(key.data, _Outpost):
                    self._hear(key.data)
                else:
                    self._pass_on(*key.data)
            now = time.monotonic()
            if now - beaten_at >= interval:
                beaten_at = now
                self._check_all(now)
        self._close_all()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it gave up, or there is no descriptor left
            return
        if not self._unproved.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._welcome, args=(sock,), daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        """Lets an outpost join, in a thread of its own: it may take its time."""
        try:
            host = sock.getpeername()[0]
            link = take(sock, self._secret)
            frames = link.receive()
            while frames == []:
                frames = link.receive()
            joined = from_outpost(frames[0]) if frames else None
        except (OSError, LaunchError, ValueError) as error:
            log.warning("refused a connection: %s", error)
            return
        finally:
            self._unproved.release()
        if not isinstance(joined, Joined):
            log.warning("refused a connection from %s: it does not say what it is", host)
            link.close()
            return
        self._join(_Outpost(joined.index, joined.name, link, time.monotonic()), joined.version)

    def _join(self, outpost: _Outpost, version: str) -> None:
        reason = None
        if version != __version__:
            reason = f"it has Tokasaurus {version}, and the supervisor has {__version__}"
        with self._changed:
            if outpost.index in self._by_index:
                reason = f"outpost {outpost.index} has joined already"
            if reason is None:
                outpost.send(Welcome(self._session))
                self._by_index[outpost.index] = outpost
                self._arrived.append(outpost)
                self._changed.notify_all()
        if reason is None:
            self._wake()
        else:
            log.warning("refused the outpost on %s: %s", outpost.name, reason)
            outpost.send(Refused(reason))
            outpost.link.close()

    def _adopt(self) -> None:
        """Begins to watch what has come since."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            begun, self._begun = self._begun, []
            begun = [each for each in begun if not each[0].is_gone]
        for outpost in arrived:
            log.info("the outpost on %s has joined", outpost.name)
            self._selector.register(outpost.link, selectors.EVENT_READ, outpost)
        for outpost, role, lifeline in begun:
            if role in outpost.children:
                self._selector.register(lifeline, selectors.EVENT_READ, (outpost, role, lifeline))

    def _hear(self, outpost: _Outpost) -> None:
        if outpost.is_gone:
            return
        frames = outpost.link.receive()
        if frames is None:
            self._lose(outpost, "the connection ended")
            return
        outpost.heard_at = time.monotonic()
        for frame in frames:
            self._take(outpost, from_outpost(frame))

    def _take(self, outpost: _Outpost, message: FromOutpost) -> None:
        if isinstance(message, Notes):
            if message.role in outpost.children:
                outpost.children[message.role][1].write(message.data)
        elif isinstance(message, Ended):
            self._end(outpost, message.role, message.status)
        elif isinstance(message, (Opened, Seen)):
            with self._changed:
                if isinstance(message, Seen):
                    outpost.seen = message
                else:
                    outpost.opened[message.door] = message.address
                self._changed.notify_all()

    def _pass_on(self, outpost: _Outpost, role: Role, lifeline: Lifeline) -> None:
        """Passes what the supervisor says to a process on."""
        if role not in outpost.children or outpost.children[role][1] is not lifeline:
            return  # it has ended since
        data = lifeline.read()
        if data:
            outpost.send(Notes(role, data))
        else:
            self._selector.unregister(lifeline)

    def _end(self, outpost: _Outpost, role: Role, status: int | None) -> None:
        with self._changed:
            child = outpost.children.pop(role, None)
            self._begun = [each for each in self._begun if each[:2] != (outpost, role)]
        if child is None:
            return
        process, lifeline = child
        process.end(status)
        if lifeline.fileno() in self._selector.get_map():
            self._selector.unregister(lifeline)
        lifeline.close()

    def _lose(self, outpost: _Outpost, reason: str) -> None:
        """All that runs at an outpost counts as ended."""
        with self._changed:
            outpost.is_gone = True
            if self._by_index.get(outpost.index) is outpost:
                del self._by_index[outpost.index]
            self._changed.notify_all()
        log.error("lost the outpost on %s: %s", outpost.name, reason)
        self._selector.unregister(outpost.link)
        outpost.link.close()
        for role in list(outpost.children):
            self._end(outpost, role, None)

    def _check_all(self, now: float) -> None:
        with self._changed:
            outposts = list(self._by_index.values())
            arriving = set(self._arrived)
        for outpost in outposts:
            if outpost in arriving:
                continue
            outpost.send(Beat())
            silent_s = now - outpost.heard_at
            if silent_s > self._silence_s:
                self._lose(outpost, f"it was silent for {silent_s:.3g} s")

    def _close_all(self) -> None:
        """Dismisses all outposts, and gives them time to end."""
        with self._changed:
            outposts = set(self._by_index.values())
            self._by_index.clear()
        self._selector.close()
        self._listener.close()
        for outpost in outposts:
            outpost.is_gone = True
            outpost.send(Dismissed())
            outpost.link.finish()
        deadline = time.monotonic() + _DISMISSAL_S
        with selectors.DefaultSelector() as selector:
            for outpost in outposts:
                selector.register(outpost.link, selectors.EVENT_READ, outpost)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    # What it still has to say must be read, or it might not hear the last word.
                    if key.data.link.receive() is None:
                        selector.unregister(key.fileobj)
        for outpost in outposts:
            for process, lifeline in outpost.children.values():
                process.end(None)
                lifeline.close()
            outpost.link.close()
