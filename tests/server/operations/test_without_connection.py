"""Requests without a connection, such as a batch's lines, are answered as the routes answer."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import RunningServer, ids_of
from rows import each_row

from tokasaurus.errors import EngineDead, EngineError
from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def ask(server: RunningServer, path: str, body: object, **options: object) -> tuple[int, dict]:
    status, content = server.on_loop(
        Executor(server.state, OPERATIONS).answer(path, body, **options)
    )
    return status, json.loads(content)


@each_row(
    "path, body",
    [
        (COMPLETIONS, {"prompt": ["one", "two"], "n": 2, "seed": 1, "logprobs": 2, "echo": True}),
        (CHAT, {"messages": MESSAGES, "seed": 3, "max_tokens": 9}),
        ("/v1/embeddings", {"input": ["one", "two"], "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": "one", "dimensions": 10_000}),
        ("/v1/responses", {"input": "hello", "seed": 1, "max_output_tokens": 9}),
        ("/v1/responses", {"input": "hello", "background": True}),
        ("/generate", {"prompt": "hello", "seed": 1, "max_tokens": 9, "logprobs": 1}),
        ("/generate", {"input_ids": [[70], [71]], "sampling_params": {"sampling_seed": 1}}),
        ("/generate", {"prompt": "hello", "text": "hello"}),
        ("/generate", [1]),
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 100_000}),
        (COMPLETIONS, {"prompt": "hello", "tools": [1]}),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 100}),
        (CHAT, {"messages": []}),
        (CHAT, [1]),
        (CHAT, None),
    ],
)
def test_the_same_answer_as_over_http(server, path, body):
    answer = server.post(path, body)
    expected = answer.json
    status, got = ask(server, path, body)
    _drop_what_differs(expected)
    _drop_what_differs(got)
    assert (status, got) == (answer.status, expected)


def _drop_what_differs(value: object) -> None:
    """Remove names and times at any depth."""
    if isinstance(value, dict):
        for name in ("id", "created", "created_at", "completed_at", "e2e_latency"):
            value.pop(name, None)
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list)):
            _drop_what_differs(each)


def test_an_unknown_url_and_a_stream_are_refused(server):
    status, body = ask(server, "/v1/models", {})
    assert (status, body["error"]["param"]) == (400, "url")
    status, body = ask(server, COMPLETIONS, {"prompt": "a", "stream": True})
    assert (status, body["error"]["param"]) == (400, "stream")


def test_the_priority_is_added_to_that_of_the_request(server):
    for own, expected in ((None, 70), (-5, 65), (MAX_PRIORITY, MAX_PRIORITY)):
        server.engine.received.clear()
        assert ask(server, COMPLETIONS, {"prompt": "a", "priority": own}, priority=70)[0] == 200
        assert [request.priority for request in server.engine.requests] == [expected]


def test_a_cancelled_request_is_aborted(server):
    server.engine.paused = True

    async def cancelled() -> None:
        task = asyncio.create_task(
            Executor(server.state, OPERATIONS).answer(COMPLETIONS, {"prompt": "a"})
        )
        while not server.engine.num_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    server.on_loop(cancelled())
    assert server.engine.aborted
    server.wait_idle()


def test_a_request_without_connection_raises_when_the_engine_dies():
    with RunningServer().running() as server:
        server.engine.script = lambda request, index: ids_of("never") * 100
        server.engine.paused = True

        async def orphaned() -> None:
            task = asyncio.create_task(
                Executor(server.state, OPERATIONS).answer(COMPLETIONS, {"prompt": "a"})
            )
            while not server.engine.num_running:
                await asyncio.sleep(0.001)
            server.state.die("for a test")
            with pytest.raises(EngineDead):
                await task

        server.on_loop(orphaned())
        with pytest.raises(EngineError):
            ask(server, COMPLETIONS, {"prompt": "a"})
