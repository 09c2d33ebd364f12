"""The role in the foreground of ``toka``, which has the main thread, and its signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tokasaurus.launch.lifeline import Assignment, Lifeline
from tokasaurus.launch.roles import Front, run_role

__all__ = ["Foreground"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_INTERRUPT_EVERY_S = 0.1


class Foreground:
    """Runs one role in the main thread, and can interrupt it.

    Args:
        on_signal: gets the numbers of signals, in the main thread.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._interrupting = False  # the next SIGINT comes from here, to end the role
        self._ended = threading.Event()

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handles signals within the block."""
        previous = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, assignment: Assignment, lifeline: Lifeline, front: Front | None) -> None:
        """Runs the role to its end.

        Args:
            assignment: the role and its configuration.
            lifeline: the role's end, which is closed.
            front: runs in the server's place; None serves.
        """
        with contextlib.suppress(KeyboardInterrupt):
            run_role(assignment, lifeline, interrupt=self._interrupt, front=front)
        self._ended.set()
        lifeline.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._interrupting:
            self._on_signal(number)
        elif not self._ended.is_set():
            raise KeyboardInterrupt

    def _interrupt(self) -> None:
        """Ends a role that has no event loop; called by its lifeline thread.

        A signal that arrives just before a library makes a blocking call does not end that call, so
        the signal is repeated until the role has returned.
        """
        self._interrupting = True
        while not self._ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self._ended.wait(_INTERRUPT_EVERY_S)
