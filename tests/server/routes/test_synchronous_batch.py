"""``/custom/synchronous-batch-completions``: many chats in one request."""

from __future__ import annotations

import http.client
import json
import pickle

import msgspec
from fake_engine import RunningServer, wait_for, with_config
from rows import each_row

PATH = "/custom/synchronous-batch-completions"
REQUESTS = [
    {"messages": [{"role": "user", "content": f"number {i}"}], "seed": i, "max_tokens": 4 + i}
    for i in range(5)
]


def comparable(completion: dict) -> dict:
    return {key: value for key, value in completion.items() if key not in ("id", "created")}


def test_the_answers_are_those_of_the_chat_route_in_order(server):
    expected = [comparable(server.post("/v1/chat/completions", each).json) for each in REQUESTS]
    answer = server.post(PATH, {"requests": REQUESTS})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert [comparable(each) for each in answer.json] == expected


@each_row(
    "accept, expected",
    [
        ("application/msgpack", "application/msgpack"),
        ("application/json;q=0.5, application/x-msgpack", "application/msgpack"),
        ("application/msgpack;q=0.5, application/json", "application/json"),
        ("*/*", "application/json"),
        ("application/x-pickle", "application/json"),
        ("application/msgpack;q=zero", "application/msgpack"),
    ],
)
def test_accept_chooses_between_json_and_msgpack(server, accept, expected):
    answer = server.post(PATH, {"requests": REQUESTS}, Accept=accept)
    assert answer.headers["content-type"] == expected
    decode = json.loads if expected.endswith("json") else msgspec.msgpack.decode
    assert [each["usage"]["completion_tokens"] for each in decode(answer.content)] == [
        4,
        5,
        6,
        7,
        8,
    ]


def test_answers_are_pickles_where_the_operator_allows_it():
    with RunningServer(with_config(unsafe_pickle_responses=True)).running() as server:
        answer = server.post(PATH, {"requests": REQUESTS})
        completions = pickle.loads(answer.content)
        assert [each.usage.completion_tokens for each in completions] == [4, 5, 6, 7, 8]
        assert all(each.choices[0].message.role == "assistant" for each in completions)
        answer = server.post(PATH, {"requests": REQUESTS}, Accept="application/json")
        assert len(answer.json) == 5


@each_row(
    "body, param",
    [
        ([], None),
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": REQUESTS, "model": "m"}, "model"),
        ({"requests": [*REQUESTS, 3]}, "requests[5]"),
        ({"requests": [*REQUESTS, {**REQUESTS[0], "top_p": 2}]}, "requests[5].top_p"),
        ({"requests": [{**REQUESTS[0], "stream": True}]}, "requests[0].stream"),
        ({"requests": [{**REQUESTS[0], "n": 60_000}] * 2}, "requests"),
    ],
)
def test_a_wrong_request_is_named_and_nothing_runs(server, body, param):
    server.engine.received.clear()
    answer = server.post(PATH, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert not server.engine.requests


def test_a_prompt_that_the_engine_refuses_fails_the_whole_batch(server):
    server.engine.reject = "no room"
    assert server.post(PATH, {"requests": REQUESTS}).status == 400


def test_a_disconnect_aborts_all_requests_of_a_synchronous_batch(server):
    server.engine.paused = True
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    data = json.dumps({"requests": REQUESTS})
    connection.request("POST", PATH, data, {"Content-Type": "application/json"})
    wait_for(lambda: server.engine.num_running == 5)
    connection.close()
    server.wait_idle()
    assert len(server.engine.aborted) == 5
