"""Clients that ask without a pause while something happens to the engine, and note every error."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine_process import EngineProcess

PROMPT = {"model": "m", "prompt": "A B C D", "temperature": 0}
ASKED = {**PROMPT, "max_tokens": 40}


class SteadyLoad:
    """A context manager. Each client compares all of its answers with the one before the load.

    Args:
        engine: that is ready.

    Attributes:
        num_answers: so far, by client.
        num_connections: that the client of one connection has needed so far.
    """

    def __init__(self, engine: EngineProcess) -> None:
        self.num_answers: dict[str, int] = {}
        self.num_connections = 1
        self._engine = engine
        self._over = threading.Event()
        self._expected = raw_answer(self._connect())[0]
        self._clients: list[Callable[[], None]] = [
            self._whole,
            self._streams,
            self._kept_alive,
            self._fresh,
            self._files,
        ]
        self._pool = ThreadPoolExecutor(len(self._clients))

    def __enter__(self) -> SteadyLoad:
        self._tasks = [self._pool.submit(client) for client in self._clients]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for task in self._tasks:
            task.result(60)

    def check(self) -> None:
        """Raises what a client has met."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._engine.port, timeout=60)

    def _note(self, name: str, text: str) -> None:
        assert text == self._expected, (name, text, self._expected)
        self.num_answers[name] = self.num_answers.get(name, 0) + 1

    def _whole(self) -> None:
        """OpenAI's client, which keeps its connections. It would retry if it were allowed to."""
        with self._engine.client(timeout=60) as client:
            while not self._over.is_set():
                answer = client.completions.create(**ASKED)
                self._note("whole", answer.choices[0].text)

    def _streams(self) -> None:
        with self._engine.client(timeout=60) as client:
            while not self._over.is_set():
                pieces = client.completions.create(**ASKED, stream=True)
                self._note("streams", "".join(each.choices[0].text for each in pieces))

    def _kept_alive(self) -> None:
        """One connection, until an answer says that it closes."""
        connection = self._connect()
        while not self._over.is_set():
            text, is_last = raw_answer(connection)
            self._note("kept alive", text)
            if is_last:
                self.num_connections += 1
                connection.close()
                connection = self._connect()
        connection.close()

    def _fresh(self) -> None:
        """A connection for each request."""
        while not self._over.is_set():
            connection = self._connect()
            self._note("fresh", raw_answer(connection)[0])
            connection.close()

    def _files(self) -> None:
        """Uploads files, reads them again, and deletes them."""
        number = 0
        with self._engine.client(timeout=60) as client:
            while not self._over.wait(0.05):
                number += 1
                data = b'{"number": %d}\n' % number
                file = client.files.create(file=("in.jsonl", data), purpose="batch")
                assert client.files.content(file.id).content == data
                assert file.id in [each.id for each in client.files.list()]
                client.files.delete(file.id)
                self.num_answers["files"] = number


def raw_answer(connection: http.client.HTTPConnection) -> tuple[str, bool]:
    """Asks on a connection that stays open; returns the text, and whether it is the last one."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    connection.request("POST", "/v1/completions", json.dumps(ASKED), headers)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    is_last = answer.getheader("Connection", "").lower() == "close"
    return json.loads(body)["choices"][0]["text"], is_last


class RunningBatch:
    """A batch that takes a while.

    Args:
        engine: that is ready.
        num_lines: of the batch.
    """

    def __init__(self, engine: EngineProcess, num_lines: int) -> None:
        self._engine = engine
        self._ids = [f"{number}" for number in range(num_lines)]
        lines = [
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/completions",
                "body": {**PROMPT, "seed": int(name), "max_tokens": 1 + 7 * int(name) % 60},
            }
            for name in self._ids
        ]
        self.id = engine.begin_batch(lines)

    def num_completed(self) -> int:
        with self._engine.client() as client:
            return client.batches.retrieve(self.id).request_counts.completed

    def check_result(self) -> None:
        """The batch has ended, and each line has one answer, which is right."""
        with self._engine.client() as client:
            batch = client.batches.retrieve(self.id)
            assert batch.status == "completed", batch
            assert batch.error_file_id is None
            answers = client.files.content(batch.output_file_id).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in answers] == self._ids
        assert batch.request_counts.completed == len(self._ids)

    @property
    def is_completed(self) -> bool:
        with self._engine.client() as client:
            batch = client.batches.retrieve(self.id)
        assert batch.status in ("validating", "in_progress", "finalizing", "completed"), batch
        return batch.status == "completed"
