"""veRL's rollout against a small HTTP server in an engine's place: no GPU, no engine, no veRL."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import struct
import sys
import threading
import time
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from file_server import Answer, FileServer, file_server
from ports import held_port

from tokasaurus.errors import (
    AccessDenied,
    ConfigError,
    EngineError,
    RequestError,
    TimedOut,
    Unreachable,
)
from tokasaurus.integrations.verl import server as server_module
from tokasaurus.integrations.verl.generation import RolloutDefaults
from tokasaurus.integrations.verl.options import RolloutOptions
from tokasaurus.integrations.verl.server import TokasaurusHttpServer

TEXT, NATIVE = "/custom/cartridge/completions", "/generate"
CONFIG = {"temperature": 0.7, "prompt_length": 16, "response_length": 8, "max_model_len": 20}
PARAMS = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch):
    for name in ("TOKASAURUS_API_KEY", "TOKASAURUS_ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engine():
    with file_server() as served:
        served.answers |= {
            "/health": Answer.json({"status": "ok", "running": 0}),
            "/v1/models": Answer.json({"data": [{"id": "m", "max_model_len": 64}]}),
            "/is_sleeping": Answer.json({"is_sleeping": False}),
            "/is_paused": Answer.json({"is_paused": False}),
            "/flush_cache": Answer.json({"status": "ok"}),
            "/abort_request": Answer.json({"aborted": 1}),
            "/abort_requests": Answer.json({"aborted": 1}),
            TEXT: Answer.json(completion([5, 6, 2], [-0.5, -0.25, -1.0])),
        }
        yield served


def completion(ids, logprobs=None, finish_reason="stop", **choice):
    packed = None
    if logprobs is not None:
        packed = [base64.b64encode(struct.pack(f"<{len(logprobs)}f", *logprobs)).decode()]
    fingerprint = {"completion_ids": [ids], "packed_chosen_logprobs": packed}
    return {
        "choices": [{"index": 0, "text": "", "finish_reason": finish_reason, **choice}],
        "usage": {"prompt_tokens_details": {"cached_tokens": 4}},
        "system_fingerprint": json.dumps(fingerprint),
    }


def server_of(engine: FileServer, *, config=CONFIG, **options) -> TokasaurusHttpServer:
    quick = {"retry_delay": 0.001, "startup_timeout": 5.0, "base_timeout": 5.0}
    return TokasaurusHttpServer(config, engine.url, **{**quick, **options})


def run(engine, work, **options):
    """Runs ``work(server)`` in an event loop, and closes the server."""

    async def main():
        server = server_of(engine, **options)
        try:
            return await work(server)
        finally:
            await server.close()

    return asyncio.run(main())


def generate(
    engine, ids=(1, 2, 3), params=PARAMS, request_id="a-request", *, given=None, **options
):
    def work(server):
        return server.generate(list(ids), params, request_id, **(given or {}))

    return run(engine, work, **options)


def asked(engine, path=TEXT):
    return [json.loads(each.body) for each in engine.questions if each.path == path]


# --- configuration --------------------------------------------------------------------------------


def test_the_documented_configuration_is_read():
    custom = {
        "tokasaurus_url": "http://localhost:10210",
        "cartridges": [{"id": "/tmp/cartridge.pt", "source": "local", "force_redownload": True}],
        "max_retries": 5,
        "base_timeout": 120,
    }
    options = RolloutOptions.of(custom)
    assert options.tokasaurus_url == ("http://localhost:10210",)
    assert options.cartridges == tuple(custom["cartridges"])
    assert (options.max_retries, options.base_timeout) == (5, 120.0)


def test_what_is_left_out_has_the_documented_defaults():
    for custom in (None, {}):
        options = RolloutOptions.of(custom)
        assert options.tokasaurus_url == ("http://localhost:10210",)
        assert (options.cartridges, options.max_retries, options.base_timeout) == ((), 5, 120.0)


def test_wrong_options_are_refused_by_name():
    for custom, said in (
        ({"tokasaurus_urls": "http://a"}, "custom.tokasaurus_urls is unknown; did you mean"),
        ({"tokasaurus_url": "ftp://a"}, "custom.tokasaurus_url"),
        ({"tokasaurus_url": []}, "custom.tokasaurus_url is empty"),
        ({"tokasaurus_url": 3}, "custom.tokasaurus_url=3"),
        ({"max_retries": 1.5}, "custom.max_retries=1.5"),
        ({"max_retries": -1}, "custom.max_retries=-1"),
        ({"max_retries": True}, "custom.max_retries=True"),
        ({"base_timeout": "fast"}, "custom.base_timeout='fast'"),
        ({"base_timeout": 0}, "custom.base_timeout=0"),
        ({"weight_sync": "nccl"}, "custom.weight_sync='nccl' must be one of"),
        ({"cartridges": "notes"}, "cartridges='notes' must be a list"),
        ({"cartridges": ["notes"]}, r"cartridges\[0\]='notes'"),
        ({"cartridges": [{"source": "local"}]}, r"cartridges\[0\].id"),
        ({"cartridges": [{"id": "a", "source": "ftp"}]}, r"cartridges\[0\].source='ftp'"),
        ({"cartridges": [{"id": "a", "reload": True}]}, r"cartridges\[0\].reload is unknown"),
        ({"cartridges": [{"id": "a", "force_redownload": 1}]}, "force_redownload=1"),
        ("http://a", "custom='http://a' must have keys"),
    ):
        with pytest.raises(ConfigError, match=said):
            RolloutOptions.of(custom)


def test_several_engines_are_dealt_to_replicas_and_one_replica_of_each_gives_the_commands():
    options = RolloutOptions.of({"tokasaurus_url": ["http://a:1/v1", "b:2"]})
    assert [options.url_of(rank) for rank in range(4)] == ["http://a:1", "http://b:2"] * 2
    assert [options.is_first_with_its_engine(rank) for rank in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    twice = RolloutOptions.of({"tokasaurus_url": "http://a:1, http://a:1/"})
    assert [twice.is_first_with_its_engine(rank) for rank in range(3)] == [True, False, False]


def test_weights_are_sent_unless_only_cartridges_change():
    cartridges = [{"id": "a", "source": "local"}]
    for custom, sent in (
        ({}, True),
        ({"cartridges": cartridges}, False),
        ({"cartridges": cartridges, "weight_sync": "http"}, True),
        ({"weight_sync": "none"}, False),
    ):
        assert RolloutOptions.of(custom).sends_weights is sent


# --- requests and answers -------------------------------------------------------------------------


def test_a_request_on_the_wire(engine):
    output = generate(engine, params={**PARAMS, "logprobs": True})
    (body,) = asked(engine)
    assert body == {
        "model": "default",
        "prompt": [1, 2, 3],
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "return_weights_versions": True,
        "logprobs_in_fingerprint": True,
        "logprobs_mode": "processed",
    }
    question = next(each for each in engine.questions if each.path == TEXT)
    assert question.headers["x-request-id"] == "a-request"
    assert output.token_ids == [5, 6, 2]
    assert output.log_probs == [-0.5, -0.25, -1.0]
    assert output.stop_reason == "completed"
    assert output.extra_fields["num_cached_tokens"] == 4


def test_sampling_parameters_that_are_missing_come_from_the_configuration(engine):
    config = {**CONFIG, "top_p": 0.8, "repetition_penalty": 1.2, "ignore_eos": True}
    generate(engine, params={}, config=config)
    (body,) = asked(engine)
    given = ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos")
    assert [body[name] for name in given] == [0.7, 0.8, -1, 1.2, True]
    assert "logprobs_in_fingerprint" not in body


def test_the_callers_parameters_are_not_changed_and_unknown_ones_reach_the_engine(engine):
    params = {**PARAMS, "max_new_tokens": 3, "logprobs": True, "detokenize": False, "min_p": 0.1}
    before = dict(params)
    generate(engine, params=params)
    assert params == before
    (body,) = asked(engine)
    assert (body["max_tokens"], body["min_p"]) == (3, 0.1)
    assert "detokenize" not in body
    assert "max_new_tokens" not in body


def test_token_ids_may_come_as_a_list_an_array_or_one_row(engine):
    for ids in ([1, 2], np.array([1, 2]), np.array([[1, 2]]), (1, 2)):
        run(engine, lambda server, ids=ids: server.generate(ids, PARAMS, "r"))
    assert [body["prompt"] for body in asked(engine)] == [[1, 2]] * 4
    for wrong in ([], ["a"], [[1], [2]]):
        with pytest.raises(RequestError, match="prompt_ids"):
            run(engine, lambda server, ids=wrong: server.generate(ids, PARAMS, "r"))


def test_the_limit_of_tokens():
    of = RolloutDefaults.of(CONFIG).limit
    assert of(3, {}) == 8  # response_length
    assert of(15, {}) == 5  # max_model_len
    assert of(3, {"max_tokens": 100}) == 17
    assert of(3, {"max_new_tokens": 2}) == 2
    longer = RolloutDefaults.of({**CONFIG, "max_model_len": None}).limit
    assert longer(22, {}) == 2  # prompt_length + response_length
    assert longer(40, {}) == 1  # at least one
    assert longer(10, {"max_tokens": 100}, engine_limit=64) == 54
    assert longer(10, {"max_tokens": 100}, engine_limit=64, num_before=21) == 33
    with pytest.raises(RequestError, match="21 positions of cartridges leaves no room"):
        longer(43, {}, engine_limit=64, num_before=21)
    with pytest.raises(RequestError, match="max_model_len=20"):
        of(20, {})


def test_images_and_other_media_are_refused(engine):
    for name in ("image_data", "video_data", "audio_data"):
        with pytest.raises(RequestError, match=name):
            generate(engine, given={name: ["x"]})
        generate(engine, given={name: None})
        generate(engine, given={name: [], "priority": 3})


def test_a_mode_of_logprobs_that_is_not_supported_is_refused(engine):
    with pytest.raises(ConfigError, match="logprobs_mode='raw_logits'"):
        server_of(engine, config={**CONFIG, "logprobs_mode": "raw_logits"})
    generate(engine, params={"logprobs": True}, config={**CONFIG, "logprobs_mode": "raw_logprobs"})
    assert asked(engine)[0]["logprobs_mode"] == "raw"


def test_deterministic_requests_have_seeds_of_their_own(engine):
    config = {**CONFIG, "full_determinism": True, "seed": 7}
    for request_id in ("det-1", "det-2", "det-1"):
        generate(engine, request_id=request_id, config=config)
    first, second, again = (body["seed"] for body in asked(engine))
    assert first == again != second
    generate(engine, params={**PARAMS, "seed": 3}, config=config)
    assert asked(engine)[-1]["seed"] == 3


def test_a_finish_reason_becomes_a_stop_reason(engine):
    for reason, stop in (
        ("stop", "completed"),
        ("length", "completed"),
        ("abort", "aborted"),
        (None, None),
    ):
        engine.answers[TEXT] = Answer.json(completion([5], finish_reason=reason))
        assert generate(engine).stop_reason == stop


def test_an_answer_without_a_fingerprint_has_no_ids():
    parse = TokasaurusHttpServer._parse
    for text in (None, "fp_123", "{", '{"completion_ids": null}'):
        answer = {"choices": [{"text": "x", "finish_reason": "stop"}], "system_fingerprint": text}
        output = parse(answer, True)
        assert (output.token_ids, output.log_probs) == ([], None)
    assert parse({}, True).token_ids == []


def test_damaged_logprobs_are_none_and_a_warning(caplog):
    for packed in (None, [], ["?"], [base64.b64encode(b"abc").decode()], ["AAAAAA=="]):
        answer = completion([5, 6])
        fields = json.loads(answer["system_fingerprint"])
        answer["system_fingerprint"] = json.dumps({**fields, "packed_chosen_logprobs": packed})
        caplog.clear()
        output = TokasaurusHttpServer._parse(answer, True)
        assert (output.token_ids, output.log_probs) == ([5, 6], None)
        assert "logprobs" in caplog.text
    assert TokasaurusHttpServer._parse(completion([5], [-1.0]), False).log_probs is None


def test_the_steps_of_the_weights_are_told(engine):
    async def work(server):
        await server.set_global_steps(3)
        plain = await server.generate([1], PARAMS, "a")
        runs = [
            {"version": 1, "label": "global-step-3", "num_tokens": 1},
            {"version": 2, "label": "global-step-4", "num_tokens": 2},
        ]
        engine.answers[TEXT] = Answer.json(completion([5, 6, 2], weights_versions=runs))
        return plain, await server.generate([1], PARAMS, "b")

    plain, mixed = run(engine, work)
    assert plain.extra_fields["global_steps"] == 3
    steps = ("min_global_steps", "max_global_steps", "global_steps")
    assert [mixed.extra_fields[name] for name in steps] == [3, 4, 4]


def native(ids, prompt, num_top):
    def column(value, rest):
        return [None, *([value] * rest)]

    rest = len(prompt) - 1
    return {
        "output_ids": ids,
        "finish_reason": "length",
        "prompt_ids": prompt,
        "usage": {},
        "prompt_logprobs": {
            "token_logprobs": [None, *(-float(i) for i in range(1, rest + 1))],
            "top_ids": column(list(range(num_top)), rest),
            "top_logprobs": column([-0.1 * i for i in range(num_top)], rest),
        },
    }


def test_prompt_logprobs_have_the_shape_that_verl_reads(engine):
    teacher = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
    for k in (0, 3):
        engine.answers[NATIVE] = Answer.json(native([9], [11, 12, 13], k))
        output = generate(engine, [11, 12, 13], {**teacher, "prompt_logprobs": k})
        ids, logprobs = (output.extra_fields[n] for n in ("prompt_ids", "prompt_logprobs"))
        assert np.shape(ids) == np.shape(logprobs) == (3, max(k, 1))
        assert (ids[-1], logprobs[-1]) == ([0] * max(k, 1), [0.0] * max(k, 1))
        if k == 0:
            assert (ids[:-1], logprobs[:-1]) == ([[12], [13]], [[-1.0], [-2.0]])
        else:
            assert ids[0] == [0, 1, 2]
    body = asked(engine, NATIVE)[-1]
    assert (body["prompt_logprobs"], body["max_tokens"], body["logprobs_mode"]) == (3, 1, "raw")


def test_a_teacher_reads_the_document_and_no_cartridge(engine):
    engine.answers[NATIVE] = Answer.json(native([9], [1, 2, 3, 4, 5], 0))

    async def work(server):
        found = await server.get_teacher_logprobs([3], [4, 5], [1, 2], "t")
        with pytest.raises(RequestError, match="document_ids and prompt_ids are empty"):
            await server.get_teacher_logprobs([], [4], [], "t")
        return found

    found = run(engine, work, cartridges=[{"id": "notes", "source": "local"}])
    assert found == [-3.0, -4.0]
    (body,) = asked(engine, NATIVE)
    assert body["prompt"] == [1, 2, 3, 4, 5]
    assert "cartridges" not in body


# --- retries --------------------------------------------------------------------------------------


def failing(times, status, then):
    """Answers with a status, then as it should."""
    left = [times]

    def answer(question):
        left[0] -= 1
        return Answer.json({"error": {"message": "no"}}, status) if left[0] >= 0 else then

    return answer


def test_what_may_help_is_repeated_under_one_request_id(engine):
    then = engine.answers[TEXT]
    for status in (408, 429, 500, 502, 503):
        engine.questions.clear()
        engine.answers[TEXT] = failing(2, status, then)
        assert generate(engine).token_ids == [5, 6, 2]
        tries = [each.headers["x-request-id"] for each in engine.questions if each.path == TEXT]
        assert tries == ["a-request"] * 3
        if status >= 500:  # the engine may be at work on the lost attempt
            assert asked(engine, "/abort_request") == [{"rid": "a-request"}] * 2


def test_a_wrong_request_is_not_repeated(engine):
    for status, kind in ((400, RequestError), (401, AccessDenied), (404, RequestError)):
        engine.questions.clear()
        engine.answers[TEXT] = Answer.json(
            {"error": {"message": "wrong", "param": "top_p"}}, status
        )
        with pytest.raises(kind, match="wrong"):
            generate(engine)
        assert len(asked(engine)) == 1


def test_retries_end(engine):
    engine.answers[TEXT] = Answer.json({"error": {"message": "broken"}}, 500)
    with pytest.raises(EngineError, match="broken"):
        generate(engine, max_retries=2)
    assert len(asked(engine)) == 3


def test_a_connection_that_breaks_is_made_again(engine):
    then = engine.answers[TEXT]
    engine.answers[TEXT] = lambda question: (
        Answer(b"{", length=99) if len(asked(engine)) == 1 else then
    )
    assert generate(engine).token_ids == [5, 6, 2]


def test_connections_are_used_again(engine):
    async def work(server):
        for number in range(5):
            await server.generate([1], PARAMS, f"r{number}")

    opened = engine_connections(engine)
    run(engine, work)
    assert opened() <= 3  # one for tokens, one for commands, one to spare


def engine_connections(engine):
    """Counts the connections from which questions come, by the threads that answer them."""
    threads: set[int] = set()
    for path, answer in engine.answers.items():
        engine.answers[path] = noting(answer, threads)
    return lambda: len(threads)


def noting(answer, threads):
    def noted(question):
        threads.add(threading.get_ident())
        return answer if isinstance(answer, Answer) else answer(question)

    return noted


def test_a_late_answer_is_awaited_while_the_engine_serves(engine):
    then = engine.answers[TEXT]

    def slowly(question):
        time.sleep(0.5)
        return then

    engine.answers[TEXT] = slowly
    assert generate(engine, base_timeout=0.1).token_ids == [5, 6, 2]
    assert len(asked(engine)) == 1
    assert engine.count("GET", "/health") >= 1


def test_a_late_answer_is_given_up_if_the_engine_does_not_serve(engine):
    then, over = engine.answers[TEXT], threading.Event()

    def hang_once(question):
        if len(asked(engine)) > 1:
            return then
        engine.answers["/health"] = Answer.json({"status": "stalled"}, 503)
        over.wait(20)
        return then

    def healthy_again(question):
        engine.answers["/health"] = Answer.json({"status": "ok"})
        return Answer.json({"aborted": 1})

    engine.answers[TEXT] = hang_once
    engine.answers["/abort_request"] = healthy_again
    try:
        assert generate(engine, base_timeout=0.1).token_ids == [5, 6, 2]
    finally:
        over.set()
    assert len(asked(engine)) == 2
    assert asked(engine, "/abort_request") == [{"rid": "a-request"}]


def test_requests_outlive_a_restart_of_the_engine(engine):
    """More failures than there are retries: all wait until the engine serves again."""
    then, down = engine.answers[TEXT], threading.Event()

    def answer(question):
        if down.is_set():
            return Answer.json({"error": {"message": "draining"}}, 503)
        return then

    engine.answers[TEXT] = answer
    engine.answers["/health"] = lambda question: Answer.json(
        {"status": "loading"}, 503 if down.is_set() else 200
    )
    down.set()
    threading.Timer(0.6, down.clear).start()

    async def work(server):
        asks = [server.generate([1], PARAMS, f"r{number}") for number in range(30)]
        return await asyncio.gather(*asks)

    outputs = run(engine, work, max_retries=1)
    assert [output.token_ids for output in outputs] == [[5, 6, 2]] * 30
    assert engine.count("GET", "/health") < 60  # they share one look


@pytest.fixture
def absent():
    """An engine that is not there."""
    with held_port() as port:
        yield FileServer(f"127.0.0.1:{port}")


def test_an_engine_that_does_not_come_back_is_an_error(absent):
    began = time.monotonic()
    with pytest.raises(Unreachable, match="nothing answers at"):
        generate(absent, max_retries=2, startup_timeout=0.3)
    assert time.monotonic() - began < 20


# --- its start ------------------------------------------------------------------------------------


def test_a_start_waits_for_the_engine_and_says_so(engine, caplog):
    states = iter([503, 503, 503])

    def loading(question):
        status = next(states, 200)
        return Answer.json({"status": "ok" if status == 200 else "loading"}, status)

    engine.answers["/health"] = loading
    with caplog.at_level(logging.INFO):
        address = run(engine, lambda server: server.launch_server())
    assert address == engine.address
    assert f"waiting for the engine at {engine.url} (0 s): its status is 'loading'" in caplog.text
    assert f"the engine at {engine.url} serves" in caplog.text


def test_a_start_without_an_engine_fails_soon_and_says_what_to_do(absent):
    with pytest.raises(TimedOut, match=r"does not serve within 0\.2 s: nothing answers") as raised:
        run(absent, lambda server: server.launch_server(), startup_timeout=0.2)
    assert "custom.tokasaurus_url" in str(raised.value)


def test_a_start_refuses_what_is_no_engine_and_what_takes_no_commands(engine):
    engine.answers["/health"] = Answer(status=404)
    with pytest.raises(EngineError, match="status 404; is it an engine"):
        run(engine, lambda server: server.launch_server())
    engine.answers["/health"] = Answer.json({"status": "ok"})
    engine.answers["/is_sleeping"] = Answer.json({"error": {"message": "admin key"}}, 403)
    with pytest.raises(AccessDenied, match="TOKASAURUS_ADMIN_API_KEY"):
        run(engine, lambda server: server.launch_server())


def test_an_engine_that_an_earlier_trainer_has_left_asleep_is_woken(engine):
    engine.answers["/is_sleeping"] = Answer.json({"is_sleeping": True})
    engine.answers["/wake_up"] = Answer.json({"status": "awake"})
    run(engine, lambda server: server.launch_server(), is_first_with_its_engine=False)
    assert engine.count("POST", "/wake_up") == 0
    run(engine, lambda server: server.launch_server())
    assert engine.count("POST", "/wake_up") == 1


def test_a_port_of_its_own_leads_to_the_engine(engine):
    async def work(server):
        addresses = {await server.launch_server("127.0.0.1"), engine.address}
        other = server_of(engine)
        addresses.add(await other.launch_server("127.0.0.1"))
        assert len(addresses) == 3
        for address in addresses:
            assert await asyncio.to_thread(longest, address) == 64
        await other.close()

    run(engine, work)


def longest(address: str) -> int:
    with urllib.request.urlopen(f"http://{address}/v1/models", timeout=10) as answer:
        return json.load(answer)["data"][0]["max_model_len"]


def test_keys_come_from_the_environment_admin_keys_first(engine, monkeypatch):
    monkeypatch.setenv("TOKASAURUS_API_KEY", "sk-user")
    generate(engine)
    monkeypatch.setenv("TOKASAURUS_ADMIN_API_KEY", "sk-admin")
    generate(engine)
    generate(engine, api_key="sk-given")
    sent = [each.headers["authorization"] for each in engine.questions if each.path == TEXT]
    assert sent == ["Bearer sk-user", "Bearer sk-admin", "Bearer sk-given"]


# --- aborts ---------------------------------------------------------------------------------------


@asynccontextmanager
async def held(engine, server):
    """A request under way, whose answer comes with the first abort: the tokens so far."""
    then, aborted = engine.answers[TEXT], threading.Event()

    def until_aborted(question):
        assert aborted.wait(20)
        return Answer.json(completion([5], finish_reason="abort"))

    engine.answers[TEXT] = until_aborted
    engine.answers["/abort_requests"] = lambda question: (
        aborted.set() or Answer.json({"aborted": 1})
    )
    request = asyncio.create_task(server.generate([1], PARAMS, "held"))
    while not asked(engine):
        await asyncio.sleep(0.01)
    engine.answers[TEXT] = then
    try:
        yield request
    finally:
        aborted.set()


def test_an_abort_ends_requests_with_their_tokens_and_parks_the_next(engine):
    async def work(server):
        async with held(engine, server) as request:
            result = await server.abort_all_requests()
            assert request.done()
            assert result == {"aborted_count": 1, "request_ids": ["held"]}
        parked = asyncio.create_task(server.generate([1], PARAMS, "late"))
        await asyncio.sleep(0.2)
        assert not parked.done()
        await server.resume_generation()
        return await request, await parked

    partial, late = run(engine, work)
    assert (partial.token_ids, partial.stop_reason) == ([5], "aborted")
    assert (late.token_ids, late.stop_reason) == ([5, 6, 2], "completed")
    assert asked(engine, "/abort_requests")[0] == {"request_ids": ["held"]}
    assert engine.count("POST", "/flush_cache") == 1


def test_an_abort_may_turn_requests_away_also_those_that_wait(engine):
    async def work(server):
        await server.abort_all_requests()
        parked = asyncio.create_task(server.generate([1], PARAMS, "parked"))
        await asyncio.sleep(0.05)
        await server.abort_all_requests(reject_request=True)
        outputs = [await parked, await server.generate([1], PARAMS, "late")]
        await server.abort_all_requests()  # requests wait again
        waits = asyncio.create_task(server.generate([1], PARAMS, "waits"))
        await asyncio.sleep(0.05)
        assert not waits.done()
        await server.resume_generation()
        return outputs, await waits

    turned_away, waited = run(engine, work)
    for output in turned_away:
        assert (output.token_ids, output.stop_reason) == ([], "aborted")
    assert waited.stop_reason == "completed"
    assert len(asked(engine)) == 1


def test_a_request_between_two_attempts_is_aborted_without_tokens(engine):
    engine.answers[TEXT] = Answer.json({"error": {"message": "no"}}, 429)

    async def work(server):
        request = asyncio.create_task(server.generate([1], PARAMS, "held"))
        while not asked(engine):
            await asyncio.sleep(0.01)
        await server.abort_all_requests()
        return await asyncio.wait_for(request, 5)

    output = run(engine, work, retry_delay=60.0)
    assert (output.token_ids, output.stop_reason) == ([], "aborted")


def test_requests_of_an_engine_that_hangs_are_dropped(engine, monkeypatch):
    monkeypatch.setattr(server_module, "_ABORT_LIMIT_S", 0.3)
    over = threading.Event()

    def hang(question):
        over.wait(20)
        return Answer(status=500)

    engine.answers[TEXT] = engine.answers["/abort_requests"] = hang

    async def work(server):
        request = asyncio.create_task(server.generate([1], PARAMS, "hangs"))
        while not asked(engine):
            await asyncio.sleep(0.01)
        await asyncio.wait_for(server.abort_all_requests(), 10)
        return await request

    try:
        output = run(engine, work)
    finally:
        over.set()
    assert (output.token_ids, output.stop_reason) == ([], "aborted")


def test_an_aborted_teacher_is_asked_again(engine):
    """Its answer is the prompt's logprobs, of which there is no part."""
    busy = Answer.json({"error": {"message": "aborted"}}, 503)
    engine.answers[NATIVE] = busy

    async def work(server):
        request = asyncio.create_task(server.get_teacher_logprobs([1], [2], [], "t"))
        while not asked(engine, NATIVE):
            await asyncio.sleep(0.01)
        await server.abort_all_requests()
        engine.answers[NATIVE] = Answer.json(native([9], [1, 2], 0))
        await server.resume_generation()
        return await request

    assert run(engine, work, retry_delay=60.0) == [-1.0]


# --- memory ---------------------------------------------------------------------------------------


def memory_commands(engine, **options):
    engine.answers["/release_memory_occupation"] = Answer.json({"status": "ok"})
    engine.answers["/resume_memory_occupation"] = Answer.json({"status": "ok"})
    engine.questions.clear()

    async def work(server):
        await server.sleep()
        await server.wake_up()
        await server.wake_up(tags=["weights"])
        await server.release_kv_cache()
        await server.resume_kv_cache()
        await server.clear_kv_cache()
        await server.start_profile()
        await server.stop_profile()

    run(engine, work, **options)
    return [
        (each.path.split("_")[0], json.loads(each.body).get("tags")) for each in engine.questions
    ]


def test_memory_is_released_and_restored_as_verl_says(engine):
    both, flush = ["weights", "kv_cache"], ("/flush", None)
    release, resume = "/release", "/resume"
    whole = [(release, both), (resume, both), (resume, ["weights"])]
    cache = [(release, ["kv_cache"]), (resume, ["kv_cache"])]
    assert memory_commands(engine, rollout_mode="hybrid") == [*whole, *cache, flush]
    assert memory_commands(engine, rollout_mode="colocated") == [*whole, flush]
    assert memory_commands(engine, rollout_mode="standalone") == [*cache, flush]
    kept = {**CONFIG, "free_cache_engine": False}
    assert memory_commands(engine, config=kept) == [flush]
    assert memory_commands(engine, is_first_with_its_engine=False) == [flush]


# --- cartridges -----------------------------------------------------------------------------------


def test_cartridges_are_sent_only_if_there_are_any(engine):
    spec = {"id": "/tmp/cartridge.pt", "source": "local", "force_redownload": True}

    async def work(server):
        await server.generate([1], PARAMS, "a")
        await server.update_cartridges([spec])
        await server.generate([1], PARAMS, "b")
        with pytest.raises(ConfigError, match="source='ftp'"):
            await server.update_cartridges([{"id": "x", "source": "ftp"}])
        await server.generate([1], PARAMS, "c")
        await server.update_cartridges([])
        await server.generate([1], PARAMS, "d")

    run(engine, work)
    assert [body.get("cartridges") for body in asked(engine)] == [None, [spec], [spec], None]


class Store:
    """The engine's routes for cartridges."""

    def __init__(self, engine: FileServer) -> None:
        self.engine = engine
        self.uploads: list[str] = []
        self.names: dict[str, int] = {}
        engine.answers["/v1/cartridges"] = self.collection

    def collection(self, question):
        if question.method == "GET":
            return Answer.json({"data": [self.described(name) for name in self.names]})
        (name,) = [
            part.split(b"\r\n\r\n")[1].split(b"\r\n")[0].decode()
            for part in question.body.split(b"--")
            if b'name="name"' in part
        ]
        self.uploads.append(name)
        self.add(name)
        return Answer.json(self.described(name))

    def add(self, name):
        self.names[name] = len(self.uploads)
        self.engine.answers[f"/v1/cartridges/{name}"] = lambda question: self.one(name, question)

    def one(self, name, question):
        if name not in self.names:
            return Answer.json({"error": {"message": "none"}}, 404)
        if question.method == "DELETE":
            del self.names[name]
            return Answer.json({"deleted": True})
        return Answer.json(self.described(name))

    def described(self, name):
        return {
            "id": name,
            "source": "local",
            "tokens": 21,
            "bytes": 1,
            "digest": "d",
            "uploaded": True,
            "users": 0,
            "versions": [],
            "created_at": self.names[name],
        }


def test_a_file_is_uploaded_once_for_each_content(engine, tmp_path: Path):
    store, file = Store(engine), tmp_path / "cartridge.pt"
    spec = {"id": str(file), "source": "local", "force_redownload": True}
    file.write_bytes(b"one")

    async def work(server):
        for content in (b"one", b"two", b"two", b"three", b"four"):
            file.write_bytes(content)
            await asyncio.gather(*(server.generate([1], PARAMS, f"r{k}") for k in range(3)))

    run(engine, work, cartridges=[spec], cartridge_upload="always")
    assert len(store.uploads) == len(set(store.uploads)) == 4
    sent = [body["cartridges"] for body in asked(engine)]
    assert sent[0] == [{"id": store.uploads[0], "source": "local"}]
    assert [body[0]["id"] for body in sent[::3]] == [store.uploads[k] for k in (0, 1, 1, 2, 3)]
    assert list(store.names) == store.uploads[-2:]  # older ones are deleted
    # Another server finds the content there.
    generate(engine, cartridges=[spec], cartridge_upload="always")
    assert len(store.uploads) == 4


def test_an_engine_that_has_lost_its_uploads_gets_them_again(engine, tmp_path: Path):
    store, file = Store(engine), tmp_path / "cartridge.pt"
    file.write_bytes(b"one")
    then = engine.answers[TEXT]

    def known(question):
        (named,) = json.loads(question.body)["cartridges"]
        if named["id"] in store.names:
            return then
        return Answer.json({"error": {"message": "no such file", "param": "cartridges"}}, 400)

    engine.answers[TEXT] = known

    async def work(server):
        await server.generate([1], PARAMS, "a")
        store.names.clear()
        return await server.generate([1], PARAMS, "b")

    spec = {"id": str(file), "source": "local"}
    assert run(engine, work, cartridges=[spec], cartridge_upload="always").token_ids == [5, 6, 2]
    assert len(store.uploads) == 2


def test_local_cartridges_of_this_machine_are_named_and_not_uploaded(engine, tmp_path: Path):
    store, file = Store(engine), tmp_path / "cartridge.pt"
    file.write_bytes(b"one")
    spec = {"id": str(file), "source": "local", "force_redownload": True}
    generate(engine, cartridges=[spec])
    assert asked(engine)[0]["cartridges"] == [spec]
    assert store.uploads == []


def limit_to_64(engine, lengths):
    """Lets the engine refuse what is longer, with cartridges of these lengths before a prompt."""
    then = engine.answers[TEXT]

    def limited(question):
        body = json.loads(question.body)
        num_before = sum(lengths[each["id"]] for each in body["cartridges"])
        if len(body["prompt"]) + num_before + body["max_tokens"] > 64:
            error = {"message": "too long", "code": "context_length_exceeded"}
            return Answer.json({"error": error}, 400)
        return then

    engine.answers[TEXT] = limited


def test_the_first_request_behind_a_cartridge_finds_out_how_long_it_is(engine):
    Store(engine).add("notes")
    limit_to_64(engine, {"notes": 21})

    async def work(server):
        await server.generate([1] * 10, {"max_tokens": 60}, "a")
        await server.generate([1] * 10, {"max_tokens": 60}, "b")

    config = {**CONFIG, "max_model_len": None}
    run(engine, work, config=config, cartridges=[{"id": "notes", "source": "local"}])
    assert [body["max_tokens"] for body in asked(engine)] == [54, 33, 33]


def test_the_first_requests_behind_a_cartridge_may_be_many(engine):
    """One is refused when another has found out already how long the cartridge is."""
    Store(engine).add("notes")
    limit_to_64(engine, {"notes": 21})
    limited, is_late, first_is_over = engine.answers[TEXT], threading.Event(), threading.Event()

    def answer(question):
        if json.loads(question.body)["prompt"] == [2] and not is_late.is_set():
            is_late.set()
            assert first_is_over.wait(20)
        return limited(question)

    engine.answers[TEXT] = answer

    async def work(server):
        late = asyncio.create_task(server.generate([2], {"max_tokens": 63}, "late"))
        while not is_late.is_set():
            await asyncio.sleep(0.01)
        await server.generate([1], {"max_tokens": 63}, "first")
        first_is_over.set()
        await late

    config = {**CONFIG, "max_model_len": None}
    run(engine, work, config=config, cartridges=[{"id": "notes", "source": "local"}])
    assert [body["max_tokens"] for body in asked(engine)] == [63, 63, 42, 42]


def test_a_refusal_of_former_cartridges_does_not_count_for_those_that_came_meanwhile(engine):
    store = Store(engine)
    store.add("notes")
    store.add("more")
    limit_to_64(engine, {"notes": 21, "more": 0})
    limited, is_held, go_on = engine.answers[TEXT], threading.Event(), threading.Event()

    def answer(question):
        if not is_held.is_set():
            is_held.set()
            assert go_on.wait(20)
        return limited(question)

    engine.answers[TEXT] = answer

    async def work(server):
        former = asyncio.create_task(server.generate([1], {"max_tokens": 63}, "former"))
        while not is_held.is_set():
            await asyncio.sleep(0.01)
        await server.update_cartridges([{"id": "more", "source": "local"}])
        go_on.set()
        await former
        await server.generate([1], {"max_tokens": 63}, "next")

    config = {**CONFIG, "max_model_len": None}
    run(engine, work, config=config, cartridges=[{"id": "notes", "source": "local"}])
    assert [body["max_tokens"] for body in asked(engine)] == [63, 42, 63]


# --- without veRL ---------------------------------------------------------------------------------


def test_the_package_needs_neither_verl_nor_ray():
    import subprocess

    script = (
        "import sys, tokasaurus.integrations.verl.server, tokasaurus.integrations.verl\n"
        "print({'verl', 'ray', 'torch'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


# --- its page -------------------------------------------------------------------------------------


def test_the_page_has_every_option_and_a_configuration_that_is_read():
    page = (Path(__file__).parents[3] / "docs" / "verl.md").read_text()
    (section,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    custom = yaml.safe_load(section)["actor_rollout_ref"]["rollout"]["custom"]
    assert RolloutOptions.of(custom).cartridges[0]["source"] == "local"
    table = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", page, re.MULTILINE))
    for field in fields(RolloutOptions):
        default = field.default[0] if field.name == "tokasaurus_url" else field.default
        said = table[field.name]
        assert said == str(default) or said in ("[]",) or float(said) == default, field.name
