"""Connections to the server processes of an engine, of which each has its own."""

from __future__ import annotations

import http.client
import json
import re

from engine_process import EngineProcess, eventually


class Connection:
    """A connection to one of the processes, which the log of its first request names."""

    def __init__(self, engine: EngineProcess) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
        assert self.ask("/tokenize", {"prompt": "A"})[0] == 200
        port = self._http.sock.getsockname()[1]
        line = re.compile(rf" (http-\d+) .*127\.0\.0\.1:{port} \"POST /tokenize")
        eventually(lambda: line.search(engine.log) is not None, "the request is in the log")
        self.process = line.search(engine.log)[1]

    def begin(self, path: str, body: object = None, **headers: str) -> None:
        """Sends a POST, or what stands before a space in ``path``; bytes are sent as they are."""
        method, _, path = path.rpartition(" ")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
        self._http.request(method or "POST", path, data, headers)

    def end(self) -> tuple[int, dict]:
        answer = self._http.getresponse()
        return answer.status, json.loads(answer.read())

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        self.begin(path, body, **headers)
        return self.end()

    def close(self) -> None:
        self._http.close()


def one_to_each(engine: EngineProcess, number: int) -> list[Connection]:
    """A connection to each process. Which one takes a connection is chance."""
    found: dict[str, Connection] = {}
    for _ in range(200):
        connection = Connection(engine)
        if connection.process in found:
            connection.close()
        found.setdefault(connection.process, connection)
        if len(found) == number:
            return [connection for _, connection in sorted(found.items())]
    raise AssertionError(f"only {list(found)} took connections")
