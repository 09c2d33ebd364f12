"""An HTTP server for tests, which answers from a table and counts what it is asked for."""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Answer", "FileServer", "Question", "file_server"]


@dataclass(frozen=True)
class Question:
    """A request that came."""

    method: str
    path: str  # without the query
    query: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Answer:
    """What is sent. With fewer bytes than ``length`` says, the connection breaks."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None

    @staticmethod
    def json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        return Answer(json.dumps(value).encode(), status, headers or {})


Answering = Callable[[Question], Answer]


class FileServer:
    """Answers by paths, which may be changed while it runs."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.url = f"http://{address}"
        self.answers: dict[str, Answer | Answering] = {}
        self.questions: list[Question] = []

    def count(self, method: str, path: str) -> int:
        return Counter((each.method, each.path) for each in self.questions)[method, path]

    def answer(self, question: Question) -> Answer:
        self.questions.append(question)
        found = self.answers.get(question.path, Answer(status=404))
        return found if isinstance(found, Answer) else found(question)


@contextlib.contextmanager
def file_server(
    host: str = "127.0.0.1", certificate: tuple[str, str] | None = None
) -> Iterator[FileServer]:
    """A server that runs for the length of a with-block.

    Args:
        certificate: the paths of a certificate and its key, with which it serves HTTPS.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            path, _, query = self.path.partition("?")
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = served.answer(Question(self.command, path, query, headers, body))
            length = len(answer.body) if answer.length is None else answer.length
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(OSError):
                    self.wfile.write(answer.body)
            self.close_connection = length != len(answer.body)

        do_GET = do_HEAD = do_POST = do_DELETE = respond  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 512

        def handle_error(self, *args: Any) -> None:
            # Of clients that have gone, or do not trust it.
            if not isinstance(sys.exc_info()[1], ConnectionError | ssl.SSLError):
                super().handle_error(*args)

    server = Server((host, 0), Handler)
    server.daemon_threads = True
    served = FileServer(f"{host}:{server.server_address[1]}")
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        served.url = f"https://{served.address}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
