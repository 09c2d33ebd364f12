"""HTTP clients that put a load on a server whose cost is measured.

They read as little of an answer as possible, since they share the cores with the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from tokasaurus.errors import EngineDead

__all__ = ["Load", "run_load"]

_TIMEOUT_S = 120.0
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Load:
    """Requests that are all alike.

    Attributes:
        path: the path of the endpoint.
        body: the body of each request.
        num_requests: how many requests there are in all.
        num_clients: how many clients share them. A client sends its requests one after the other,
            over one connection.
    """

    path: str
    body: Mapping[str, Any]
    num_requests: int
    num_clients: int


def run_load(port: int, load: Load) -> int:
    """Sends all requests to a server on this machine and waits for the answers.

    Returns:
        How many events the streams had, including their ends; 0 if nothing was streamed.

    Raises:
        EngineDead: an answer is an error.
    """
    quotient, rest = divmod(load.num_requests, load.num_clients)
    shares = [quotient + (index < rest) for index in range(load.num_clients)]
    with ThreadPoolExecutor(load.num_clients) as clients:
        return sum(clients.map(lambda share: _one_client(port, load, share), shares))


def _one_client(port: int, load: Load, num_requests: int) -> int:
    body = json.dumps(load.body).encode()
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    num_events = 0
    for _ in range(num_requests):
        connection.request("POST", load.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            text = answer.read().decode(errors="replace")
            raise EngineDead(f"the server answered {answer.status}: {text[:200]}")
        while piece := answer.read1(_READ_BYTES):
            num_events += piece.count(b"\n\n")
        answer.close()
    connection.close()
    return num_events
