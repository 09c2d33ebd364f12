"""The main loop of each process of an engine.

A role gets its lifeline and its assignment, and returns when its work is done. It does not know
whether it runs in a process of its own or in the foreground of ``toka``.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from tokasaurus.config.slices import EngineSlices, ServerConfig
from tokasaurus.errors import ConfigError, ModelError
from tokasaurus.grammars import Vocabulary
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER, TO_WORKER
from tokasaurus.launch.lifeline import Assignment, Failed, Lifeline, Ready, Stop
from tokasaurus.launch.processor import bound_spinning, with_threads
from tokasaurus.launch.timeline import Timeline
from tokasaurus.launch.worker_loop import WorkerLoop
from tokasaurus.observability.logging import configure_logging
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.commands import TransferDone
from tokasaurus.protocol.messages import FromServer, FromWorker
from tokasaurus.protocol.role import Role

__all__ = ["Front", "roles_of", "run_role"]

log = logging.getLogger(__name__)

# A batch with long contexts takes this many times as long as the largest of the warm-up.
_LONG_BATCHES = 4

Front: TypeAlias = Callable[[Assignment, Lifeline], None]
"""The work of the text core's process: usually, to serve."""


def roles_of(slices: EngineSlices) -> list[Role]:
    """The processes of an engine: its server, then each replica's manager and workers."""
    roles = [Role("server")]
    for number, replica in enumerate(slices.replicas):
        roles.append(Role("manager", number))
        roles += [Role("worker", number, rank) for rank in range(len(replica.workers))]
    return roles


def run_role(
    assignment: Assignment,
    lifeline: Lifeline,
    interrupt: Callable[[], None],
    front: Front | None = None,
) -> bool:
    """Runs one role to its end.

    Args:
        assignment: the role and its configuration.
        lifeline: the role's end; closed on return.
        interrupt: called from another thread when a role without an event loop must end.
        front: what the server's role does instead of serving.

    Returns:
        False if the role failed; the supervisor has been told why.
    """
    role, slices = assignment.role, assignment.slices
    logged_as = "server" if role.kind == "http" else role.kind
    is_quiet = slices.log_procs is not None and logged_as not in slices.log_procs
    level = "ERROR" if is_quiet else slices.log_level
    configure_logging(str(role), level, slices.log_format)
    log.info("process id %d", os.getpid())
    try:
        if role.kind == "server":
            (front or _run_server)(assignment, lifeline)
        elif role.kind == "http":
            _run_http(assignment, lifeline)
        else:
            worker = _Worker()
            threading.Thread(
                target=_await_end, args=(lifeline, interrupt, worker), name="lifeline", daemon=True
            ).start()
            if role.kind == "manager":
                _run_manager(assignment, lifeline, worker)
            else:
                _run_worker(assignment, lifeline)
    except KeyboardInterrupt:
        return True
    except (ConfigError, ModelError) as error:
        # The user must act on the message, so a traceback would not help.
        lifeline.send(Failed(str(error), "", is_final=True))
        return False
    except BaseException as error:
        # Of a message of several lines the first says what failed, for example which batch.
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        lifeline.send(Failed(summary, traceback.format_exc()))
        return False
    finally:
        lifeline.close()
    return True


class _Worker:
    """What a manager hears of its workers, in the thread of its lifeline."""

    def __init__(self) -> None:
        self.largest_batch_s = 0.0  # of the one that was ready last
        self._num_pages: int | None = None
        self._is_ready = threading.Event()

    def ready(self, note: Ready) -> None:
        self.largest_batch_s = note.largest_batch_s
        self._num_pages = note.num_pages  # all workers of a replica have agreed on it
        self._is_ready.set()

    def num_pages(self, planned: int) -> int:
        """Waits for a worker. The pages of its KV cache."""
        self._is_ready.wait()
        return planned if self._num_pages is None else self._num_pages


def _await_end(lifeline: Lifeline, interrupt: Callable[[], None], worker: _Worker) -> None:
    while True:
        notes = lifeline.receive()
        for note in notes or ():
            if isinstance(note, Ready):
                worker.ready(note)
        if notes is None or any(isinstance(note, Stop) for note in notes):
            interrupt()
            return


def _run_server(assignment: Assignment, lifeline: Lifeline) -> None:
    from tokasaurus.launch.serving import serve

    serve(assignment, lifeline)


def _run_http(assignment: Assignment, lifeline: Lifeline) -> None:
    from tokasaurus.launch.http_process import serve_http

    serve_http(assignment, lifeline)


def _run_manager(assignment: Assignment, lifeline: Lifeline, worker: _Worker) -> None:
    from tokasaurus.launch.figures import Figures, WorkerWatch
    from tokasaurus.manager.manager import Manager

    number = assignment.role.replica
    door_of = assignment.door
    door = Receiver(door_of(assignment.role), TO_MANAGER)
    to_server = Sender(door_of(Role("server", number)), TO_SERVER)
    replica = assignment.slices.replicas[number]
    to_workers = [
        Sender(door_of(Role("worker", number, rank)), TO_WORKER)
        for rank in range(len(replica.workers))
    ]
    # Its door is open. What comes before the worker is ready waits there.
    lifeline.send(Ready())
    config = replica.manager
    manager = Manager(replace(config, num_pages=worker.num_pages(config.num_pages)))
    # Requests come and go in thousands and live long enough to look permanent, but leave no cycles
    # when they end. To look for cycles at the usual rate takes a sixth of the time of a request.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    timeline = _timeline(assignment)
    figures = Figures(manager)
    watch = WorkerWatch(manager, assignment.slices.stall_timeout_s)
    while True:
        events = door.receive(watch.wait_s(figures.wait_s))
        started = time.monotonic()
        if not events:
            watch.expect(_LONG_BATCHES * worker.largest_batch_s)
            for stall in watch.check(started):
                to_server.send(stall)
            if manager.at_rest:
                to_server.send(figures.at_rest())
                continue
            if manager.deadline is None or started < manager.deadline:
                continue
        actions = manager.take_turn(events, started)
        if timeline is not None:
            timeline.turn(started, len(events), actions.to_worker)
        for order in actions.to_worker:
            for to_worker in to_workers:
                to_worker.send(order)
        for message in actions.messages:
            to_server.send(message)
        for message in figures.after_turn():
            to_server.send(message)
        for stall in watch.check(started):
            to_server.send(stall)
        manager.turn_took(time.monotonic() - started)


def _run_worker(assignment: Assignment, lifeline: Lifeline) -> None:
    bound_spinning()
    from tokasaurus.model.worker.worker import Worker

    role, door_of = assignment.role, assignment.door
    door = Receiver(door_of(role), TO_WORKER)
    to_manager = Sender(door_of(Role("manager", role.replica)), TO_MANAGER)
    # Without an end-of-sequence id no text is ever complete, and the server refuses grammars.
    server = assignment.slices.server
    load_vocabulary = partial(_load_vocabulary, server) if server.eos_token_ids else None
    log.info("%s", assignment.slices.dtype_plan)
    log.info("%s", assignment.slices.memory_plan.line)
    slices = assignment.slices
    for line in slices.idle_flags if role == Role("worker") else ():
        log.warning("%s", line)
    config = with_threads(slices.replicas[role.replica].workers[role.rank], slices)
    worker = Worker(
        config,
        load_vocabulary,
        _rendezvous(assignment),
        replica=role.replica,
        report=_Reports(assignment),
    )
    largest_batch_s = worker.warm_up()
    lifeline.send(Ready(largest_batch_s, worker.identity(), worker.num_pages))
    timeline = _timeline(assignment)
    submit = worker.submit if timeline is None else timeline.submitting(worker.submit)
    # One rank answers for all.
    send = to_manager.send if worker.ranks.samples else _drop
    loop = WorkerLoop(submit, door.receive, send)
    while True:
        loop.take_turn()


class _Reports:
    """Tells the manager how transfers of weights ended, from threads beside the worker's own.

    Args:
        assignment: of the worker.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._door = assignment.door(Role("manager", assignment.role.replica))
        self._sender: Sender[FromServer | FromWorker] | None = None
        self._lock = threading.Lock()  # a socket may pass from thread to thread, one at a time

    def __call__(self, report: TransferDone) -> None:
        with self._lock:
            if self._sender is None:
                self._sender = Sender(self._door, TO_MANAGER)
            self._sender.send(report)


def _rendezvous(assignment: Assignment) -> str:
    """Where the workers of a replica meet."""
    replica = assignment.role.replica
    meeting = assignment.doors.get(f"ranks-{replica}")
    if meeting is None:  # they are on one machine
        return f"file://{assignment.directory}/ranks-{replica}"
    fd = meeting.listener_fd
    return meeting.address if fd is None else f"{meeting.address}?listener_fd={fd}"


def _drop(result: FromWorker) -> None:
    """Sends nothing."""


def _timeline(assignment: Assignment) -> Timeline | None:
    """The profile of the first replica, if the user asked for one."""
    slices, role = assignment.slices, assignment.role
    if slices.profile_path is None or role.replica or role.rank:
        return None
    return Timeline(Path(slices.profile_path).expanduser(), slices.profile_num_batches)


def _load_vocabulary(config: ServerConfig) -> Vocabulary:
    from tokasaurus.text.tokenizer import Tokenizer

    return Tokenizer.load(config).vocabulary(config.eos_token_ids)
