"""An HTTP server that answers as a test tells it: refusals, broken connections, texts."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from quiet_server import QuietServer


@dataclass
class Reply:
    """One answer; the body is JSON unless it is bytes, and a status of 0 hangs up."""

    status: int = 200
    body: object = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict


class ScriptedModel:
    """The server's address, what it was asked, and how it answers.

    Attributes:
        answer: from what was asked to a reply; threads call it at the same time.
    """

    def __init__(self, port: int, answer: Callable[[Asked], Reply]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answer = answer
        self.asked: list[Asked] = []
        self.num_connections = 0
        self.lock = threading.Lock()


def chat(text: str, finish_reason: str = "stop", num_output: int = 3, **fields: object) -> Reply:
    """What a server with OpenAI's routes answers."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": num_output, "total_tokens": 7 + num_output}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return Reply(body={"choices": [choice], "usage": usage, **fields})


def refusal(status: int, message: str = "no", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "param": None, "code": None}}, named)


def in_turn(*replies: Reply) -> Callable[[Asked], Reply]:
    """Each reply once, and the last one for ever after."""
    left = list(replies)
    return lambda _asked: left.pop(0) if len(left) > 1 else left[0]


@contextlib.contextmanager
def scripted(answer: Callable[[Asked], Reply] | Reply) -> Iterator[ScriptedModel]:
    """A server for the length of a with-block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 30

        def setup(self):
            super().setup()
            with model.lock:
                model.num_connections += 1

        def log_message(self, *args):
            pass

        def do_GET(self):
            self._answer({})

        def do_POST(self):
            size = int(self.headers["content-length"])
            self._answer(json.loads(self.rfile.read(size)))

        def _answer(self, body):
            asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            with model.lock:
                model.asked.append(asked)
            reply = model.answer(asked) if callable(model.answer) else model.answer
            if reply.status == 0:
                self.close_connection = True
                return
            content = reply.body
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(QuietServer):
        request_queue_size = 512
        # Connections that clients keep open must not keep the test waiting.
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    model = ScriptedModel(server.server_address[1], answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield model
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
