"""A value that is computed once, in a thread of its own, when it is first wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Once"]

T = TypeVar("T")


class Once(Generic[T]):
    """The value of a function. Its methods may be called from any thread.

    Args:
        compute: the function.
        name: of the thread.
    """

    def __init__(self, compute: Callable[[], T], name: str) -> None:
        self._compute, self._name = compute, name
        self._future: Future[T] = Future()
        self._lock = threading.Lock()
        self._has_begun = False

    def begin(self) -> None:
        """Begins to compute, unless that has begun before."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def result(self) -> T:
        """Waits for the value. Raises what the function raises."""
        self.begin()
        return self._future.result()

    def _run(self) -> None:
        try:
            self._future.set_result(self._compute())
        except Exception as error:
            self._future.set_exception(error)
