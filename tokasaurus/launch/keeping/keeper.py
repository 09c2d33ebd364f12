"""The keeper's own work: it starts engines, watches them, and lets one follow another.

A restart has these stages. Whatever fails before the new engine serves leaves the old one as it
was::

    SIGUSR2 or toka restart
      -> asking     the old engine says whether it can be followed, and what it holds
      -> starting   the new one loads the model beside it; it accepts no connection yet
      -> finishing  the new one serves; the old one accepts no more, and ends with its last request

One thread does everything, and waits for nothing but its selector.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from tokasaurus.launch.keeping.control import ControlLink, listen_for_control
from tokasaurus.launch.keeping.engine_process import EngineProcess, start_engine
from tokasaurus.launch.keeping.notes import (
    LANGUAGE,
    AskRestart,
    AskStanding,
    Begin,
    CannotServe,
    Describe,
    Description,
    Outcome,
    Progress,
    Serves,
    Standing,
    StepDown,
    Watches,
)
from tokasaurus.launch.keeping.service_manager import ServiceManager
from tokasaurus.launch.leftovers import own_directory, remove_directory, sweep
from tokasaurus.launch.note_socket import NotUnderstood

__all__ = ["Keeper"]

log = logging.getLogger(__name__)

_ANSWER_S = 20.0  # for the old engine to say how it stands; its event loop may be busy
_INTERRUPTED = 130
_TOLD = "toka was told to end"
_GRACE_S = 15.0  # that the old engine has beyond its own time limit


@dataclass(eq=False)
class _Restart:
    """A restart that is on its way.

    Attributes:
        words: to be added to the command line.
        asker: ``toka restart``; None for a signal, and for one that did not wait for the end.
        deadline: of the stage, as ``time.monotonic`` counts.
    """

    words: tuple[str, ...]
    asker: ControlLink | None
    stage: str = "asking"
    deadline: float = field(default_factory=lambda: time.monotonic() + _ANSWER_S)


class Keeper:
    """Keeps one port, and the engines that serve on it.

    Args:
        words: the command line of ``toka``.
        host: that the listener is bound to, as the user wrote it.
        listener: the listening socket, which the keeper closes.
    """

    def __init__(self, words: Sequence[str], host: str, listener: socket.socket) -> None:
        self._words = tuple(words)
        self._host = host
        self._listener = listener
        sweep()
        self._directory, self._owner = own_directory()
        self._selector = selectors.DefaultSelector()
        self._engines: set[EngineProcess] = set()  # that live
        self._current: EngineProcess | None = None  # that serves, or the first one on its way
        self._successor: EngineProcess | None = None  # that does not serve yet
        self._retiring: EngineProcess | None = None
        self._restart: _Restart | None = None
        self._num_engines = 0
        self._is_ending = False
        self._status = 0
        self._manager = ServiceManager()

    def run(self) -> int:
        """Keeps engines until they have ended.

        Returns:
            The exit status of the engine that served last: 0 after a drain, 1 after a death, 2 if
            the configuration is wrong, 130 if a second signal cut the drain.
        """
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, _note_signal) for number in numbers}
        # Python writes the number of each signal there.
        previous_fd = signal.set_wakeup_fd(wake.fileno())
        control = listen_for_control(self._directory)
        log.info("process id %d", os.getpid())
        self._selector.register(woken, selectors.EVENT_READ, self._on_signals)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        try:
            self._current = self._start(())
            while self._engines:
                self._take_turn()
        finally:
            self._kill_all()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
            for each in (wake, woken, control, self._listener):
                each.close()
            remove_directory(self._directory, self._owner)
        return self._status

    def _take_turn(self) -> None:
        deadline = None if self._restart is None else self._restart.deadline
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(wait):
            key.data(key.fileobj)
        if self._restart is not None and time.monotonic() >= self._restart.deadline:
            self._on_late(self._restart)

    # --- engines ----------------------------------------------------------------------------------

    def _start(self, added: tuple[str, ...], before: Standing | None = None) -> EngineProcess:
        self._num_engines += 1
        engine = start_engine(
            Begin(
                LANGUAGE,
                self._num_engines,
                self._words,
                added,
                self._listener.fileno(),
                self._directory,
                before,
            )
        )
        self._engines.add(engine)
        self._selector.register(
            engine.link, selectors.EVENT_READ, lambda _: self._on_engine(engine)
        )
        return engine

    def _on_engine(self, engine: EngineProcess) -> None:
        try:
            notes = engine.link.receive()
        except NotUnderstood:  # it is of another version
            engine.reason = "this toka does not understand it; stop toka, and start it again"
            engine.process.kill()
            return
        if notes is None:
            self._selector.unregister(engine.link)
            self._engines.discard(engine)
            self._on_ended(engine, engine.reap())
            return
        for note in notes:
            if isinstance(note, CannotServe):
                engine.reason = note.reason
            elif isinstance(note, Watches):
                self._on_watches(engine, note)
            elif isinstance(note, Serves):
                self._on_serves(engine)
            elif isinstance(note, Standing):
                self._on_standing(engine, note)

    def _on_watches(self, engine: EngineProcess, note: Watches) -> None:
        engine.timeout_s = note.timeout_s
        if engine is self._successor and self._restart is not None:
            # The flags of the new engine win.
            self._restart.deadline = engine.started_at + note.timeout_s

    def _on_serves(self, engine: EngineProcess) -> None:
        engine.serves = True
        restart = self._restart
        if engine is not self._successor or restart is None:
            self._manager.ready()
            return
        old, self._current, self._successor = self._current, engine, None
        self._manager.ready()
        if old is None:  # it has ended meanwhile
            log.info("restart: engine %d serves", engine.number)
            self._finish("the new engine serves; the old one had ended before")
            return
        log.info(
            "restart: engine %d serves; engine %d takes no more connections, and finishes",
            engine.number,
            old.number,
        )
        self._retiring = old
        limit_s = engine.timeout_s or 0.0
        restart.stage, restart.deadline = "finishing", time.monotonic() + limit_s + _GRACE_S
        old.link.send(StepDown(engine.number, limit_s))
        self._tell("the new engine serves; the old one finishes its requests")

    def _on_ended(self, engine: EngineProcess, status: int) -> None:
        how = engine.how_it_ended
        if status < 0:
            sweep()  # its directory
        if not status:
            log.info("engine %d has ended", engine.number)
        if engine is self._successor:
            self._successor = None
            self._fail(f"the new engine cannot serve: {how}")
        elif engine is self._retiring:
            self._retiring = None
            if status:
                log.error("restart: the old engine ended: %s", how)
            if self._current is None:
                self._fail(_TOLD if self._is_ending else "the new engine has ended")
                return
            text = "the new engine serves, and the old one has ended"
            self._finish(text if not status else f"{text}: {how}")
        else:
            self._current = None
            self._end_with(engine, status)

    def _end_with(self, engine: EngineProcess, status: int) -> None:
        """Ends with the status of this engine, unless another serves after it."""
        self._status = status
        if status < 0:
            self._status = _INTERRUPTED if self._is_ending else 1
        how = engine.how_it_ended
        if self._successor is not None and not self._is_ending:
            log.error("engine %d ended: %s; the new engine takes its place", engine.number, how)
        elif status < 0 and not self._is_ending:
            log.error("engine %d ended: %s", engine.number, how)
        if self._retiring is not None and not self._is_ending:
            log.error("the old engine finishes its requests, and then toka ends")

    # --- signals and requests ---------------------------------------------------------------------

    def _on_signals(self, woken: socket.socket) -> None:
        for number in woken.recv(1024):
            if number == signal.SIGUSR2:
                self._ask((), None)
            else:
                self._end()

    def _end(self) -> None:
        """Lets every engine drain; the second time, ends them at once."""
        self._is_ending = True
        self._manager.stopping()
        if self._restart is not None and self._restart.stage != "finishing":
            self._fail(_TOLD)
        for engine in self._engines:
            engine.end()

    def _on_control(self, control: socket.socket) -> None:
        connection, _ = control.accept()
        link = ControlLink(connection)
        self._selector.register(link, selectors.EVENT_READ, lambda _: self._on_asker(link))

    def _on_asker(self, link: ControlLink) -> None:
        try:
            notes = link.receive()
        except NotUnderstood:
            # The package may have been upgraded since the start of this process.
            log.warning("restart: refused, since another version of toka restart wants it")
            link.send(Outcome(False, "toka runs another version; stop it, and start it again"))
            notes = None
        if notes is None:
            self._selector.unregister(link)
            link.close()
            if self._restart is not None and self._restart.asker is link:
                self._restart.asker = None
            return
        for note in notes:
            if isinstance(note, Describe):
                port = self._listener.getsockname()[1]
                link.send(Description(self._host, port, os.getpid()))
            elif isinstance(note, AskRestart):
                self._ask(note.words, link)

    # --- a restart --------------------------------------------------------------------------------

    def _ask(self, words: tuple[str, ...], asker: ControlLink | None) -> None:
        refusal = self._why_not_now()
        if refusal is not None:
            log.warning("restart: refused, since %s", refusal)
            if asker is not None:
                asker.send(Outcome(False, f"refused, since {refusal}"))
            return
        assert self._current is not None
        self._restart = _Restart(words, asker)
        self._current.link.send(AskStanding())

    def _why_not_now(self) -> str | None:
        if self._is_ending:
            return "toka is about to end"
        if self._restart is not None:
            stages = {
                "asking": "the new engine is about to start",
                "starting": "the new engine is not ready yet",
                "finishing": "the old engine still finishes its requests",
            }
            return f"another restart is on its way: {stages[self._restart.stage]}"
        if self._current is None or not self._current.serves:
            return "the engine is not ready yet"
        return None

    def _on_standing(self, engine: EngineProcess, standing: Standing) -> None:
        restart = self._restart
        if restart is None or engine is not self._current or restart.stage != "asking":
            return
        refusal = standing.refusal
        if standing.has_new_weights and not any(w.startswith("model=") for w in restart.words):
            refusal = refusal or (
                "the weights have been updated since the start, and a new engine would load those"
                " of model=; say which it shall load: toka restart model=..."
            )
        if refusal is not None:
            self._fail(f"refused, since {refusal}")
            return
        added = (*engine.added_words, *restart.words)
        try:
            successor = self._successor = self._start(added, standing)
        except OSError as error:
            self._fail(f"no process can be started: {error.strerror}")
            return
        self._manager.restarting()
        limit_s = engine.timeout_s or 0.0
        restart.stage, restart.deadline = "starting", successor.started_at + limit_s
        log.info("restart: engine %d starts beside engine %d", successor.number, engine.number)
        self._tell(f"a new engine starts (process id {successor.process.pid})")

    def _on_late(self, restart: _Restart) -> None:
        if restart.stage == "asking":
            self._fail(f"the engine did not answer within {_ANSWER_S:g} s")
        elif restart.stage == "starting":
            if self._successor is not None:
                took_s = time.monotonic() - self._successor.started_at
                self._successor.reason = (
                    f"it was not ready within {took_s:.3g} s, and restart_timeout_s limits this"
                )
                self._successor.process.kill()
            restart.deadline = time.monotonic() + _GRACE_S
        elif self._retiring is not None:
            self._retiring.reason = "it did not end in time"
            self._retiring.process.kill()
            restart.deadline = time.monotonic() + _GRACE_S

    def _tell(self, text: str) -> None:
        if self._restart is not None and self._restart.asker is not None:
            self._restart.asker.send(Progress(text))

    def _fail(self, text: str) -> None:
        """The restart is over, and the old engine goes on."""
        restart, self._restart = self._restart, None
        if restart is None:
            return
        log.log(logging.WARNING if self._is_ending else logging.ERROR, "restart: %s", text)
        if self._current is not None and not self._is_ending:
            self._manager.ready()
            text = f"{text}; the old engine goes on"
        if restart.asker is not None:
            restart.asker.send(Outcome(False, text))

    def _finish(self, text: str) -> None:
        """The restart is over, and the new engine serves."""
        restart, self._restart = self._restart, None
        log.info("restart: done")
        if restart is not None and restart.asker is not None:
            restart.asker.send(Outcome(True, text))

    def _kill_all(self) -> None:
        for engine in self._engines:
            engine.process.kill()
            engine.reap()


def _note_signal(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has told the keeper's loop."""
