"""Several server processes behind one port: one engine, whichever of them a client reaches."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from engine_process import EngineProcess, eventually, running
from http_connections import Connection, one_to_each

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = (
    "max_seqs_per_forward=8",
    "max_tokens_per_forward=64",
    "kv_cache_num_tokens=16384",
    "cpu_threads=1",
    # A drain that does not end by itself would take longer than any test waits.
    "shutdown_timeout_s=600",
)
BODY = {"prompt": "A B C D", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
ENDLESS = {**BODY, "max_tokens": 1900, "n": 8}
GENERATE = "/v1/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with running(tmp_path_factory.mktemp("engine"), *FLAGS, "server_processes=2") as process:
        yield process


@pytest.fixture
def two(engine: EngineProcess) -> Iterator[list[Connection]]:
    connections = one_to_each(engine, 2)
    yield connections
    for connection in connections:
        connection.close()


def figure(engine: EngineProcess, name: str) -> float:
    return engine.metrics().get(name, 0.0)


def test_all_processes_answer_and_are_counted_as_one_engine(engine):
    answers = f'http_requests_total{{path="{GENERATE}",status="200"}}'
    prompts = 'prompts_total{outcome="finished"}'
    before = figure(engine, answers), figure(engine, prompts)

    def ask(number: int) -> tuple[str, str]:
        client = engine.client(timeout=60)  # with a connection of its own
        options = {"extra_body": {"ignore_eos": True}, "stream": bool(number % 2)}
        asked = {"prompt": "A B C D", "max_tokens": 20, "temperature": 0, **options}
        answer = client.completions.create(model="m", **asked)
        parts = list(answer) if number % 2 else [answer]
        return parts[0].id, "".join(part.choices[0].text for part in parts if part.choices)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(48)))
    assert len({request_id for request_id, _ in found}) == 48
    assert len({text for _, text in found}) == 1
    for name in ("http-1", "http-2"):
        assert re.search(rf" {name} .*POST {GENERATE}", engine.log), name
    eventually(lambda: figure(engine, answers) - before[0] == 48, "all are counted")
    assert figure(engine, prompts) - before[1] == 48


def test_commands_through_one_process_hold_for_the_others(engine, two):
    first, second = two
    assert first.ask("/pause?mode=keep")[0] == 200
    second.begin(GENERATE, BODY)
    eventually(lambda: figure(engine, "prompts_in_flight") == 1, "the request waits")
    eventually(lambda: figure(engine, "paused") == 1, "the figures say so")
    assert first.ask("/resume")[0] == 200
    status, answer = second.end()
    assert (status, answer["usage"]["completion_tokens"]) == (200, 20)
    # What answers say of the weights.
    assert first.ask("/update_weight_version", {"new_version": "spring"})[0] == 200
    generate = {"text": "A B", "sampling_params": {"max_new_tokens": 2}}
    for connection in two:
        answer = connection.ask("/generate", generate)[1]
        assert answer["meta_info"]["weight_version"] == "spring"


def test_a_request_of_one_process_is_aborted_through_another(engine, two):
    first, second = two
    second.begin(GENERATE, ENDLESS, **{"X-Request-Id": "mine"})
    eventually(lambda: figure(engine, "prompts_in_flight") == 1, "the request runs")
    assert first.ask("/abort_requests", {"request_ids": ["mine"]})[1]["aborted"] == 8
    status, answer = second.end()
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "abort")
    # So are those that wait in the turnstile, of which the manager has not heard.
    bodies = [{**ENDLESS, "n": 100, "user": "x"}, {**ENDLESS, "user": "x"}]
    for connection, body in zip(two, bodies, strict=True):
        connection.begin(GENERATE, body)
        eventually(lambda: figure(engine, "prompts_in_flight") >= 1, "the request is there")
    eventually(lambda: figure(engine, "prompts_in_flight") == 2, "both are there")
    assert Connection(engine).ask("/abort_requests", {})[1]["aborted"] == 108
    for connection in two:
        status, answer = connection.end()
        assert status == 200
        assert {each["finish_reason"] for each in answer["choices"]} == {"abort"}


def test_stop_strings_errors_and_logprobs_pass(engine, two):
    whole = {**BODY, "logprobs": 2, "echo": True}
    answers = [connection.ask(GENERATE, whole)[1]["choices"][0] for connection in two]
    assert answers[0] == answers[1]
    text = answers[0]["text"].removeprefix("A B C D")
    stopped = two[0].ask(GENERATE, {**ENDLESS, "stop": [text[8:12]]})[1]["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (
        text[: text.index(text[8:12])],
        "stop",
    )
    status, refused = two[1].ask(GENERATE, {**BODY, "max_tokens": -1})
    assert (status, refused["error"]["param"]) == (400, "max_tokens")
    eventually(lambda: figure(engine, "prompts_in_flight") == 0, "nothing is left")


def test_files_and_batches_are_those_of_the_engine(engine):
    client = engine.client(timeout=60)
    lines = [
        {"custom_id": str(number), "method": "POST", "url": GENERATE, "body": BODY}
        for number in range(10)
    ]
    data = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=GENERATE, completion_window="24h")
    # Each request may reach another process.
    eventually(
        lambda: engine.client().batches.retrieve(batch.id).status == "completed", "the batch ends"
    )
    done = engine.client().batches.retrieve(batch.id)
    assert len(engine.client().files.content(done.output_file_id).text.splitlines()) == 10


def test_a_process_that_dies_takes_only_its_connections_along(engine, two):
    first, second = two
    first.begin(GENERATE, ENDLESS)
    eventually(lambda: figure(engine, "prompts_in_flight") == 1, "the request runs")
    os.kill(engine.child(first.process), signal.SIGKILL)
    with pytest.raises((OSError, http.client.HTTPException)):
        first.end()
    assert second.ask(GENERATE, BODY)[0] == 200
    eventually(lambda: figure(engine, "prompts_in_flight") == 0, "its request ends")
    assert f"the {first.process} ended: killed by SIGKILL" in engine.log

    def is_back() -> bool:
        connections = [Connection(engine) for _ in range(8)]
        for connection in connections:
            connection.close()
        return any(each.process not in ("http-1", "http-2") for each in connections)

    eventually(is_back, "there are two again")
    for connection in one_to_each(engine, 2):
        assert connection.ask(GENERATE, BODY)[0] == 200
        connection.close()


# --- engines of their own -------------------------------------------------------------------------


def in_flight(engine: EngineProcess) -> float:
    return figure(engine, "prompts_in_flight")


def test_sigterm_drains_all_processes(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2") as engine:
        two = one_to_each(engine, 2)
        for connection in two:
            connection.begin(GENERATE, {**BODY, "max_tokens": 1000})
        eventually(lambda: in_flight(engine) == 2, "both run")
        engine.signal(signal.SIGTERM)
        for connection in two:
            status, answer = connection.end()
            assert (status, answer["usage"]["completion_tokens"]) == (200, 1000)
        assert engine.wait_exit() == 0
        assert not [line for line in engine.log.splitlines() if "ERROR" in line]


@pytest.mark.long
@pytest.mark.parametrize("role", ["server", "worker"])
def test_the_end_of_the_engine_ends_every_request_with_an_error(tmp_path, role):
    flags = (*FLAGS, "server_processes=3", "local_proc_name=manager")
    with running(tmp_path, *flags) as engine:
        three = one_to_each(engine, 3)
        for connection in three:
            connection.begin(GENERATE, ENDLESS)
        eventually(lambda: in_flight(engine) == 3, "all run")
        os.kill(engine.child(role), signal.SIGKILL)
        for connection in three:
            status, answer = connection.end()
            assert status == 503, answer
            assert f"the {role} ended: killed by SIGKILL" in answer["error"]["message"]
        assert engine.wait_exit() == 1


@pytest.mark.long
def test_the_queue_has_one_limit_for_all_processes(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2", "max_queued_requests=4") as engine:
        two = one_to_each(engine, 2)
        endless = [Connection(engine) for _ in range(4)]
        for connection in endless:
            connection.begin(GENERATE, {**ENDLESS, "user": "x"})
        eventually(lambda: in_flight(engine) == 4, "the queue is full")
        for connection in two:
            status, answer = connection.ask(GENERATE, {**BODY, "user": "x"})
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        # A client with less than its share still gets in, wherever it comes.
        for connection in two:
            connection.begin(GENERATE, {**BODY, "max_tokens": 2, "user": "y"})
            assert connection.end()[0] == 200
        assert two[0].ask("/abort_requests", {})[1]["aborted"] == 32


@pytest.mark.long
def test_shares_are_fair_across_processes(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2") as engine:
        first, second = one_to_each(engine, 2)
        first.begin(GENERATE, {**BODY, "max_tokens": 500, "n": 200, "user": "many"})
        eventually(lambda: figure(engine, "waiting_sequences") > 0, "it fills the engine")
        for _ in range(3):
            assert second.ask(GENERATE, {**BODY, "user": "few"})[0] == 200
        assert in_flight(engine) == 1  # the large one
        assert second.ask("/abort_requests", {})[1]["aborted"] > 100  # of its samples
        assert first.end()[0] == 200


@pytest.mark.long
def test_requests_move_when_one_of_two_replicas_dies(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2", "dp_size=2") as engine:
        two = one_to_each(engine, 2)
        body = {**BODY, "max_tokens": 1000, "n": 4}
        expected = two[0].ask(GENERATE, body)[1]["choices"]
        client = engine.client(timeout=120)
        options = {"stream": True, "extra_body": {"ignore_eos": True}}
        asked = {"prompt": "A B C D", "temperature": 0, "max_tokens": 1000, **options}
        with ThreadPoolExecutor(4) as pool:

            def stream(_: int) -> str:
                parts = client.completions.create(model="m", **asked)
                return "".join(part.choices[0].text for part in parts if part.choices)

            for connection in two:
                connection.begin(GENERATE, body)
            streams = pool.map(stream, range(4))
            eventually(lambda: in_flight(engine) == 6, "all run")
            os.kill(engine.child("worker"), signal.SIGKILL)
            assert [connection.end()[1]["choices"] for connection in two] == [expected] * 2
            assert set(streams) == {expected[0]["text"]}
        assert figure(engine, "moved_samples_total") > 0


@pytest.mark.long
def test_an_engine_without_any_http_process_ends(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2", "replica_restarts=0") as engine:
        for name in ("http-1", "http-2"):
            os.kill(engine.child(name), signal.SIGKILL)
        assert engine.wait_exit() == 1
        assert "not started again, since replica_restarts=0" in engine.log


def test_openai_errors_are_those_of_one_process(engine):
    with pytest.raises(openai.BadRequestError) as caught:
        engine.client().completions.create(model="m", prompt="A", max_tokens=10**9)
    assert "max_tokens" in str(caught.value)


def test_any_process_shows_and_cancels_the_requests_of_all(engine, two):
    first, second = two
    first.begin(GENERATE, {**ENDLESS, "priority": 3})
    found: list[dict] = []

    def is_shown() -> bool:
        status, snapshot = second.ask("GET /v1/engine")
        assert status == 200
        found[:] = snapshot["requests"]
        return bool(found)

    eventually(is_shown, "the request is shown")
    (shown,) = found
    assert (shown["samples"], shown["priority"]) == (8, 3)
    status, _ = second.ask(f"/v1/engine/requests/{shown['id']}/cancel", {})
    assert status == 200
    status, answer = first.end()
    assert status == 200
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"abort"}
    assert engine.get("/")[0] == 200
