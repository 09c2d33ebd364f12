"""Which request the code that runs at the moment serves, so that its log lines can say so.

A request has one name in every process: the client's ``X-Request-Id`` or one made for it, as for
every line of a batch. In the process that answers it, the name belongs to the task and to the
threads that work for it. Other processes read it in messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["about", "current_request", "serving"]

_CURRENT: ContextVar[str] = ContextVar("tokasaurus_request", default="")


def current_request() -> str:
    """The name of the request that is being served; "" if there is none."""
    return _CURRENT.get()


@contextlib.contextmanager
def serving(name: str) -> Iterator[None]:
    """Names the request that the block serves."""
    token = _CURRENT.set(name)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def about(name: str) -> dict[str, str]:
    """The ``extra`` of a log line about a request that a message named."""
    return {"request": name}
