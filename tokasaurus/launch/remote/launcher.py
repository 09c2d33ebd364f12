"""A launcher for engines whose processes run at outposts: all of them but the server."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import LaunchError
from tokasaurus.launch.lifeline import Assignment, Lifeline
from tokasaurus.launch.machine import Devices, devices_of
from tokasaurus.launch.process import Process
from tokasaurus.launch.remote.messages import Begin, meeting_door
from tokasaurus.launch.remote.outpost import listen_at, tcp_address
from tokasaurus.launch.remote.outposts import Outposts
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.role import Role

__all__ = ["Place", "RemoteLauncher", "Starter"]

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.5


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    outpost: int
    device: int = 0  # of a worker, among those of its outpost
    num_threads: int | None = None  # of a worker on the CPU; None for its share of the cores


class Starter(Protocol):
    """Starts outposts."""

    def start(self, index: int) -> None:
        """Starts an outpost that is not there, or not any more."""

    def check(self, indices: Sequence[int]) -> None:
        """Raises LaunchError if one of these, which have not joined, cannot come any more."""


class RemoteLauncher:
    """Starts processes where outposts are.

    Args:
        outposts: listens already; closed by ``close``.
        places: of every manager and worker.
        starter: brings outposts back; None if that is not possible.
        on_close: called when the outposts are dismissed.
    """

    def __init__(
        self,
        outposts: Outposts,
        places: Mapping[Role, Place],
        starter: Starter | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._outposts = outposts
        self._places = dict(places)
        self._starter, self._on_close = starter, on_close
        self._is_closed = False
        self._num_replicas = sum(role.kind == "manager" for role in places)
        self._machines: dict[int, str] = {}  # the names of outposts' machines
        self._addresses: dict[str, str] = {}  # of doors
        self._listeners: dict[str, socket.socket] = {}  # of the server's doors

    def await_outposts(self, timeout_s: float) -> None:
        """Waits until every outpost has joined.

        Raises:
            LaunchError: some have not in time.
        """
        deadline = time.monotonic() + timeout_s
        wanted = {place.outpost for place in self._places.values()}
        while missing := self._await_some(wanted):
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{len(missing)} of {len(wanted)} outposts have not joined within"
                    f" {timeout_s:g} s: {', '.join(map(str, missing))}"
                )

    def _await_some(self, wanted: Collection[int]) -> list[int]:
        """Waits for a moment; returns the outposts that have not joined."""
        missing = self._outposts.missing(wanted)
        if missing:
            if self._starter is not None:
                self._starter.check(missing)
            self._outposts.await_change(_CHECK_EVERY_S)
        return missing

    def devices(self, config: EngineConfig) -> Devices:
        """The devices of the workers, on the machines of their outposts.

        Raises:
            ConfigError: a machine lacks what a worker needs.
            LaunchError: an outpost does not answer.
        """
        places = [place for role, place in self._places.items() if role.kind == "worker"]
        indices = {place.outpost for place in places}
        for index in indices:
            self._outposts.look(index, config.device, config.instruction_set)
        seen = {index: self._outposts.seen(index) for index in indices}
        return devices_of(
            config,
            [
                (machine, seen[place.outpost].first_device + place.device)
                for place in places
                if (machine := seen[place.outpost].machine) is not None
            ],
        )

    def prepare(self, roles: Sequence[Role]) -> None:
        for index in {self._places[role].outpost for role in roles if role in self._places}:
            self._machines[index] = self._outposts.name(index)
        asked = []
        for role in roles:
            if role.kind == "server":
                continue
            index = self._places[role].outpost
            for door in self._doors_opened_by(role):
                self._outposts.open(index, door)
                asked.append((index, door))
            if role.kind == "manager":
                self._open_server_door(role.replica)
        for index, door in asked:
            self._addresses[door] = self._outposts.opened(index, door)

    def _doors_opened_by(self, role: Role) -> list[str]:
        doors = [str(role)]
        if role.kind == "worker" and role.rank == 0 and self._is_spread(role.replica):
            doors.append(meeting_door(role.replica))
        return doors

    def _is_spread(self, replica: int) -> bool:
        """Whether the workers of a replica are at several outposts."""
        used = {
            place.outpost
            for role, place in self._places.items()
            if role.kind == "worker" and role.replica == replica
        }
        return len(used) > 1

    def _open_server_door(self, replica: int) -> None:
        manager = self._places[Role("manager", replica)]
        name = str(Role("server", replica))
        listener = listen_at(self._outposts.own_host(manager.outpost))
        if name in self._listeners:  # of a start that did not come to that
            self._listeners.pop(name).close()
        self._listeners[name] = listener
        self._addresses[name] = tcp_address(listener)

    def prepare_again(
        self, roles: Sequence[Role], done: Callable[[LaunchError | None], None]
    ) -> None:
        threading.Thread(target=self._prepare_again, args=(roles, done), daemon=True).start()

    def _prepare_again(
        self, roles: Sequence[Role], done: Callable[[LaunchError | None], None]
    ) -> None:
        """Waits for outposts that are lost, for as long as it takes."""
        wanted = {self._places[role].outpost for role in roles}
        started: set[int] = set()
        try:
            while missing := self._outposts.missing(wanted):
                for index in missing:
                    if self._starter is None:
                        raise LaunchError(f"the program on {self._machines[index]} is gone")
                    if index not in started:
                        started.add(index)
                        self._starter.start(index)
                self._await_some(wanted)
                if self._is_closed:
                    return
            self.prepare(roles)
        except LaunchError as error:
            done(error)
        except Exception as error:  # of a starter's, or no port; the replica must not wait forever
            log.exception("cannot find places again")
            done(LaunchError(f"{type(error).__name__}: {error}"))
        else:
            done(None)

    def doors_of(self, role: Role) -> dict[str, Door]:
        if role.kind == "server":
            doors = {}
            for number in range(self._num_replicas):
                doors.update(self.server_doors_of(number))
            return doors
        names = [str(Role("server", role.replica)), meeting_door(role.replica)]
        names += [str(each) for each in self._places if each.replica == role.replica]
        # Keys do not travel: outposts derive them.
        return {name: Door(self._addresses[name]) for name in names if name in self._addresses}

    def server_doors_of(self, replica: int) -> dict[str, Door]:
        own, managers = str(Role("server", replica)), str(Role("manager", replica))
        listener = self._listeners.pop(own, None)
        fd = None if listener is None else listener.detach()
        keys = self._outposts.keys
        return {
            own: Door(self._addresses[own], keys, fd),
            managers: Door(self._addresses[managers], keys),
        }

    def launch(self, assignment: Assignment) -> tuple[Process, Lifeline]:
        place = self._places[assignment.role]
        workers_at = Counter(
            self._machines[each.outpost]
            for role, each in self._places.items()
            if role.kind == "worker"
        )
        message = Begin(
            _without_secrets(assignment),
            workers_at[self._machines[place.outpost]],
            place.device,
            place.num_threads,
        )
        return self._outposts.begin(place.outpost, message)

    def where(self, role: Role) -> str:
        place = self._places.get(role)
        return "" if place is None else f" on {self._machines[place.outpost]}"

    def close(self) -> None:
        """Dismisses the outposts. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._outposts.close()
        for listener in self._listeners.values():
            listener.close()
        self._on_close()


def _without_secrets(assignment: Assignment) -> Assignment:
    """An assignment that may be read on its way: without what only the server needs."""
    slices = assignment.slices
    server = replace(slices.server, api_key_digests=(), admin_key_digests=(), key_priorities={})
    return msgspec.structs.replace(assignment, slices=replace(slices, server=server))
