"""A server with the part of OpenAI's API that the commands need; it answers with the prompt.

It refuses the prompt "too long". An answer to a prompt that begins with "wait" does not end.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler

import pytest
from ports import held_port
from quiet_server import QuietServer


class FakeEngine(QuietServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = self.server_address[1]
        self.requests = []  # (path, body)
        self.refusals = 0  # how many requests to refuse with status 503 from now on
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def do_GET(self):
        self._send({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if self.server.refusals:
            self.server.refusals -= 1
            self._send({"error": {"message": "still loading"}}, 503)
        elif prompt == "too long":
            self._send({"error": {"message": "the prompt is too long"}}, 400)
        elif body.get("stream"):
            self._stream(chat, prompt.split(" "), body.get("n") or 1)
        else:
            self._complete(chat, prompt, body.get("n") or 1)

    def _complete(self, chat, prompt, n):
        texts = [f"{prompt}!{index}" for index in range(n)]
        choices = [
            {"index": i, "finish_reason": "stop", "text": text}
            | ({"message": {"role": "assistant", "content": text}} if chat else {})
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 1, "completion_tokens": 7 * n, "total_tokens": 1 + 7 * n}
        self._send(self._answer(chat, choices) | {"usage": usage})

    def _stream(self, chat, words, n):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in words:
            for index in range(n):
                text = f"{word}~"
                choice = {"index": index, "text": text, "delta": {"content": text}}
                self._event(self._answer(chat, [choice], "chunk"))
            if words[0] == "wait":
                self.server.closing.wait()
        usage = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
        self._event(self._answer(chat, [], "chunk") | {"usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    @staticmethod
    def _answer(chat, choices, kind="completion"):
        name = f"chat.completion.{kind}" if chat else "text_completion"
        return {"id": "x", "object": name, "created": 0, "model": "m", "choices": choices}

    def _event(self, body):
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()

    def _send(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def engine():
    server = FakeEngine()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed_port():
    """A port that nothing listens on."""
    with held_port() as port:
        yield port
