"""What a program does once nobody reads what it prints, as in ``toka --show | head -1``."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["ends_with_its_reader"]

_STATUS = 141  # of a program that SIGPIPE ends, as shells count it

P = ParamSpec("P")
R = TypeVar("R")


def ends_with_its_reader(main: Callable[P, R]) -> Callable[P, R]:
    """Lets a program's ``main`` end without a traceback once its standard output is closed.

    Python ignores SIGPIPE, which would end the program where it prints: sockets raise it, too.
    """

    @functools.wraps(main)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            try:
                return main(*arguments, **options)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _is_closed():
                raise
            # What is still in the buffer would fail again as the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(_STATUS) from None

    return run


def _is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
