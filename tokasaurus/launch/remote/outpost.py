"""An outpost: starts processes on its machine for a supervisor elsewhere.

It owns the processes that it starts: when the link ends, for whatever reason, they end. It knows
nothing of roles but that a worker needs a model and a device.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import msgspec

from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError, LaunchError, ModelError, TokasaurusError
from tokasaurus.launch.leftovers import own_directory, remove_directory, sweep
from tokasaurus.launch.lifeline import Assignment, Failed, Lifeline
from tokasaurus.launch.machine import look_here
from tokasaurus.launch.model_files import find_model
from tokasaurus.launch.processes import spawn
from tokasaurus.launch.processor import num_cores
from tokasaurus.launch.remote.interfaces import use_interface_of
from tokasaurus.launch.remote.link import Link, call, door_keys
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
    meeting_door,
    to_outpost,
)
from tokasaurus.protocol.doors import Door, DoorKeys
from tokasaurus.protocol.role import Role
from tokasaurus.version import __version__

__all__ = ["SILENCE_S", "Outpost"]

log = logging.getLogger(__name__)

SILENCE_S = 15.0
"""How long the other side of a link may be silent before it counts as gone."""

_BEATS = 5  # at least, in that time
_EXIT_S = 5.0  # for a process that has closed its lifeline, or should end
_CALL_AGAIN_S = 0.2

_SAME_PATH = (
    "a directory must be at the same path on every machine, for example on a shared file system"
)

_Child: TypeAlias = "tuple[subprocess.Popen[bytes], Lifeline]"


class Outpost:
    """One outpost, from its call to its dismissal.

    Args:
        address: host and port of the supervisor.
        secret: that both know.
        index: by which the supervisor places processes here.
        first_device: the visible device that its first worker takes.
        silence_s: see ``SILENCE_S``.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: str,
        index: int,
        first_device: int = 0,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._address, self._secret, self._index = address, secret, index
        self._first_device = first_device
        self._silence_s = silence_s
        self._children: dict[Role, _Child] = {}
        self._listeners: dict[str, socket.socket] = {}  # of doors whose process has not begun
        self._keys: DoorKeys | None = None
        self._directory = ""
        self._selector = selectors.DefaultSelector()
        self._is_dismissed = False

    def run(self, patience_s: float = 60.0) -> None:
        """Starts and ends processes until the engine ends.

        Args:
            patience_s: how long to call a supervisor that does not answer yet.

        Raises:
            LaunchError: the supervisor refuses this outpost, does not answer, or is gone.
        """
        sweep()
        self._directory, owner = own_directory()
        try:
            self._run(self._call(patience_s))
        finally:
            remove_directory(self._directory, owner)

    def _run(self, link: Link) -> None:
        self._send(link, Joined(self._index, socket.gethostname(), __version__))
        stop_beating = threading.Event()
        threading.Thread(target=self._beat, args=(link, stop_beating), daemon=True).start()
        try:
            use_interface_of(link.own_host)
            self._serve(link)
        finally:
            self._end_children()
            stop_beating.set()
            self._selector.close()
            link.end()
            link.close()
            for listener in self._listeners.values():
                listener.close()

    # --- the link ---------------------------------------------------------------------------------

    def _call(self, patience_s: float) -> Link:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return call(self._address, self._secret)
            except OSError as error:
                if time.monotonic() > deadline:
                    host, port = self._address
                    raise LaunchError(
                        f"the supervisor at {host}:{port} does not answer: {error}"
                    ) from None
            time.sleep(_CALL_AGAIN_S)

    def _send(self, link: Link, message: FromOutpost) -> None:
        link.send(encode(message))

    def _beat(self, link: Link, stop: threading.Event) -> None:
        while not stop.wait(self._silence_s / _BEATS):
            self._send(link, Beat())

    def _serve(self, link: Link) -> None:
        self._selector.register(link, selectors.EVENT_READ, None)
        heard_at = time.monotonic()
        while not self._is_dismissed:
            for key, _ in self._selector.select(self._silence_s / _BEATS):
                if key.data is not None:
                    self._pass_on(link, key.data)
                    continue
                frames = link.receive()
                if frames is None:
                    raise LaunchError("the connection to the supervisor ended")
                for frame in frames:
                    self._take(link, to_outpost(frame))
                heard_at = time.monotonic()  # to look at devices, or to find a model, takes a while
            if time.monotonic() - heard_at > self._silence_s:
                raise LaunchError(f"the supervisor was silent for {self._silence_s:g} s")

    def _take(self, link: Link, message: ToOutpost) -> None:
        if isinstance(message, Welcome):
            self._keys = door_keys(self._secret, message.session)
        elif isinstance(message, Look):
            self._send(link, self._look(message))
        elif isinstance(message, Open):
            self._send(link, Opened(message.door, self._open(link, message.door)))
        elif isinstance(message, Begin):
            self._begin(link, message)
        elif isinstance(message, Notes):
            if message.role in self._children:
                self._children[message.role][1].write(message.data)
        elif isinstance(message, Kill):
            if message.role in self._children:
                self._children[message.role][0].kill()
        elif isinstance(message, Refused):
            raise LaunchError(f"the supervisor refuses this outpost: {message.reason}")
        elif isinstance(message, Dismissed):
            self._is_dismissed = True

    def _look(self, message: Look) -> Seen:
        try:
            machine = look_here(message.device, message.instruction_set)
        except ConfigError as error:
            return Seen(None, 0, str(error))
        # Where each program sees one device only, that one is its own.
        if len(machine.cuda_bytes) == 1:
            self._first_device = 0
        return Seen(machine, self._first_device)

    # --- processes --------------------------------------------------------------------------------

    def _open(self, link: Link, door: str) -> str:
        if door in self._listeners:
            self._listeners.pop(door).close()
        listener = self._listeners[door] = listen_at(link.own_host)
        return tcp_address(listener)

    def _begin(self, link: Link, message: Begin) -> None:
        role = message.assignment.role
        try:
            assignment = self._placed_here(message)
        except TokasaurusError as error:
            failed = Failed(f"on {socket.gethostname()}: {error}", "")
            self._send(link, Notes(role, msgspec.json.encode(failed) + b"\n"))
            self._send(link, Ended(role, 1))
            return
        child = self._children[role] = spawn(assignment)
        for door in assignment.doors.values():
            if door.listener_fd is not None:
                os.close(door.listener_fd)  # the child has it
        self._selector.register(child[1], selectors.EVENT_READ, role)

    def _placed_here(self, message: Begin) -> Assignment:
        """An assignment with what differs from machine to machine."""
        assignment = message.assignment
        role, slices = assignment.role, assignment.slices
        if role.kind == "worker":
            slices = self._with_worker_here(message)
        owned = {str(role)}
        if role.kind == "worker" and role.rank == 0:
            owned.add(meeting_door(role.replica))
        doors = {name: self._door(name, each, owned) for name, each in assignment.doors.items()}
        return msgspec.structs.replace(
            assignment, directory=self._directory, slices=slices, doors=doors
        )

    def _door(self, name: str, door: Door, owned: set[str]) -> Door:
        listener = self._listeners.pop(name, None) if name in owned else None
        fd = None if listener is None else listener.detach()
        return Door(door.address, self._keys, fd)

    def _with_worker_here(self, message: Begin) -> EngineSlices:
        """The slices with a worker's model, device and threads on this machine."""
        role, slices = message.assignment.role, message.assignment.slices
        replica = slices.replicas[role.replica]
        worker = replica.workers[role.rank]
        model = _model_here(worker.model_path, slices.server.model_root)
        tokenizer = slices.server.tokenizer_path
        if tokenizer == worker.model_path:
            tokenizer = model
        elif not Path(tokenizer).is_dir():
            raise ModelError(f"tokenizer={tokenizer}: no such directory; {_SAME_PATH}")
        worker = replace(worker, model_path=model)
        if worker.device != "cpu":
            worker = replace(worker, device_index=self._first_device + message.device)
        if worker.device == "cpu" and worker.num_threads is None:
            share = max(1, num_cores() // message.num_workers)
            worker = replace(worker, num_threads=message.num_threads or share)
        workers, replicas = list(replica.workers), list(slices.replicas)
        workers[role.rank] = worker
        replicas[role.replica] = replace(replica, workers=tuple(workers))
        server = replace(slices.server, tokenizer_path=tokenizer)
        return replace(slices, replicas=tuple(replicas), server=server)

    def _pass_on(self, link: Link, role: Role) -> None:
        process, lifeline = self._children[role]
        data = lifeline.read()
        if data:
            self._send(link, Notes(role, data))
            return
        self._selector.unregister(lifeline)
        lifeline.close()
        del self._children[role]
        self._send(link, Ended(role, _status(process)))

    def _end_children(self) -> None:
        """Ends the processes that are left: the ends of their lifelines tell them."""
        for _, lifeline in self._children.values():
            lifeline.close()
        for process, _ in self._children.values():
            _status(process)
        self._children.clear()


def listen_at(host: str) -> socket.socket:
    """Takes a free port at one of this machine's addresses."""
    return socket.create_server((host, 0), family=_family(host))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def tcp_address(listener: socket.socket) -> str:
    """A listening socket's address, as ZeroMQ writes it."""
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _status(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that ends, or is made to."""
    try:
        return process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _model_here(path: str, name: str) -> str:
    """The directory on this machine of a model that is at ``path`` on the supervisor's.

    Raises:
        ModelError: it is not here, and it is no repository that can be downloaded.
    """
    if Path(path).is_dir():
        return path
    try:
        return str(find_model(name))
    except ModelError as error:
        raise ModelError(f"{error}; {_SAME_PATH}") from None
