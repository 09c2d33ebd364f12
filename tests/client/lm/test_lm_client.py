"""The language model against a server that answers, refuses, or breaks, as it is told."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from engine_process import eventually
from ports import held_port
from scripted_model import Reply, chat, in_turn, refusal, scripted

from tokasaurus.client.lm import (
    GenerationTruncatedError,
    TokasaurusClient,
    call_log,
    enable_json_logging,
    json_log_context,
)
from tokasaurus.errors import RequestError, TokasaurusError

CONVERSATION = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def client_of(model, **keys) -> TokasaurusClient:
    """A client that does not wait long between attempts."""
    fields = {"model": "some/model", "base_url": model.url, "starting_delay": 0.001, **keys}
    return TokasaurusClient({"max_delay": 0.002, **fields})


def test_requests_of_the_openai_protocol():
    with scripted(chat("text")) as model:
        with client_of(model, base_url=f"{model.url}/v1", temperature=0.5) as lm:
            assert lm.call("", "question") == "text"
        with client_of(
            model, api_key="key", stop_sequences=[], seed=3, top_p=0.5, extra_body={"top_k": 4}
        ) as lm:
            assert lm.call(system_prompt="s", user_prompt="u") == "text"
    first, second = model.asked
    assert first.path == second.path == "/v1/chat/completions"
    assert first.body == {
        "model": "some/model",
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "question"},
        ],
        "temperature": 0.5,
        "max_tokens": 8192,
        "stop": ["FEEDBACK", "OBSERVATION"],
    }
    assert "authorization" not in first.headers
    assert second.headers["authorization"] == "Bearer key"
    assert "stop" not in second.body
    assert [second.body[name] for name in ("seed", "top_p", "top_k")] == [3, 0.5, 4]


def test_requests_and_answers_of_the_toka_protocol():
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    bodies = [
        {"text": "text", "output": "other", "finish_reason": "stop", "usage": usage},
        {"output": "output", "reason": "stop"},
        {"text": "", "finish_reason": "stop"},
    ]
    with scripted(in_turn(*(Reply(body=body) for body in bodies))) as model:
        lm = client_of(model, protocol="toka")
        assert [lm.call("s", "u") for _ in bodies] == ["text", "output", ""]
        assert lm.totals.failures == 0
        assert lm.totals.total_tokens == 7
        with pytest.raises(RequestError, match="protocol: openai"):
            lm.call(CONVERSATION)
        lm.close()
    assert model.asked[0].path == "/generate"
    assert model.asked[0].body == {
        "model": "some/model",
        "system": "s",
        "prompt": "u",
        "temperature": 0.2,
        "max_tokens": 8192,
        "stop": ["FEEDBACK", "OBSERVATION"],
    }


def test_text_of_a_completion_is_read_too():
    body = {"choices": [{"text": "text", "finish_reason": "stop"}]}
    with scripted(Reply(body=body)) as model, client_of(model) as lm:
        assert lm.call("s", "u") == "text"


PASSING = [
    refusal(408),
    refusal(429),
    refusal(500),
    refusal(502),
    refusal(503),
    Reply(503, b"<html>proxy</html>"),
    Reply(0),
]


def test_what_may_pass_is_tried_again():
    for reply in PASSING:
        with scripted(in_turn(reply, reply, chat("text"))) as model:
            with client_of(model) as lm:
                assert lm.call("s", "u") == "text", reply
                assert lm.totals.retries == 2, reply
            with client_of(model, max_retries=0) as lm:
                model.answer = reply
                assert lm.call("s", "u") == "", reply
            assert len(model.asked) == 4, reply
            assert len({each.headers["x-request-id"] for each in model.asked}) == 2, reply


FINAL = [
    refusal(400),
    refusal(401),
    refusal(404),
    refusal(504, X_Should_Retry="false"),
    Reply(200, b"<html>proxy</html>"),
    Reply(200, {"object": "nothing known"}),
    Reply(200, {"choices": [{"message": {"content": 3}}]}),
]


def test_what_would_fail_again_is_not_tried_again():
    for reply in FINAL:
        with scripted(reply) as model, client_of(model, on_failure="raise") as lm:
            with pytest.raises(TokasaurusError):
                lm.call("s", "u")
            assert len(model.asked) == 1, reply
            assert lm.totals.failures == 1


def test_a_failure_is_an_empty_text_and_an_error_in_the_log(caplog):
    with scripted(refusal(401, "wrong key")) as model, client_of(model) as lm:
        assert lm.call("s", "u") == ""
        reply = lm.call(CONVERSATION)
    assert (reply["text"], reply["output_ids"], reply["logprobs"]) == ("", None, None)
    assert "wrong key" in caplog.text
    assert "api_key" in caplog.text
    assert {record.name for record in caplog.records} == {"language_model"}


def test_a_prompt_that_cannot_be_written_is_a_failure_like_others(caplog):
    with scripted(chat("text")) as model, client_of(model) as lm:
        assert lm.call("s", "half of a pair: \ud83d") == ""
        assert "cannot be written" in caplog.text
        assert not model.asked


def test_nothing_that_listens_is_named_with_a_remedy():
    with held_port() as port:
        model = SimpleNamespace(url=f"http://127.0.0.1:{port}")
        with (
            client_of(model, on_failure="raise", max_retries=1) as lm,
            pytest.raises(TokasaurusError, match=f"nothing answers at {model.url}.*`toka"),
        ):
            lm.call("s", "u")


def test_a_server_that_does_not_answer_in_time_is_given_up():
    done = threading.Event()

    def hang(_asked):
        done.wait(30)
        return chat("late")

    with scripted(hang) as model:
        lm = client_of(model, timeout_s=0.05, max_retries=1, on_failure="raise")
        with pytest.raises(TokasaurusError, match=r"timeout_s=0\.05"):
            lm.call("s", "u")
        assert lm.totals.retries == 1
        eventually(lambda: len(model.asked) == 2, "the server has read both")
        done.set()
        lm.close()


def test_retry_after_is_the_least_that_is_waited():
    times = []

    def answer(_asked):
        times.append(time.monotonic())
        return refusal(429, Retry_After="0.2") if len(times) < 2 else chat("text")

    with scripted(answer) as model, client_of(model) as lm:
        assert lm.call("s", "u") == "text"
    assert times[1] - times[0] >= 0.2


def test_truncated_answers():
    cut = chat("cut", "length", num_output=10)
    whole = chat("whole", "stop", num_output=10)
    cases = [
        ({}, [cut], "", 1),
        ({"on_truncation": "return"}, [cut], "cut", 1),
        ({"on_truncation": "retry"}, [cut, whole], "whole", 2),
        ({"on_truncation": "retry", "temperature": 0}, [cut, whole], "", 1),
        ({"on_truncation": "retry", "seed": 1}, [cut, whole], "", 1),
        # It ended by itself at the last token.
        ({"max_output_tokens": 10}, [whole], "whole", 1),
    ]
    for keys, replies, text, num_attempts in cases:
        with scripted(in_turn(*replies)) as model, client_of(model, **keys) as lm:
            assert lm.call("s", "u") == text, keys
            assert len(model.asked) == num_attempts, keys
    with (
        scripted(cut) as model,
        client_of(model, on_failure="raise") as lm,
        pytest.raises(GenerationTruncatedError, match="max_output_tokens=8192"),
    ):
        lm.call("s", "u")
    no_reason = Reply(body={"text": "cut", "usage": {"completion_tokens": 8}})
    with scripted(no_reason) as model:
        with client_of(model, protocol="toka", max_output_tokens=8) as lm:
            assert lm.call("s", "u") == ""
        with client_of(model, protocol="toka", max_output_tokens=9) as lm:
            assert lm.call("s", "u") == "cut"


def test_a_limit_that_does_not_fit_the_context_is_left_to_the_server(caplog):
    """As with max_output_tokens=8192 and a model of 4,096 positions; also without retries."""
    error = {"message": "max_tokens is 8192", "code": "context_length_exceeded"}

    def answer(asked):
        return Reply(400, {"error": error}) if "max_tokens" in asked.body else chat("text")

    async def in_loop(lm):
        text = await lm.acall("s", "u")
        await lm.aclose()
        return text

    with scripted(answer) as model, client_of(model, max_retries=0) as lm:
        assert [lm.call("s", "u"), lm.call("s", "u")] == ["text", "text"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "max_output_tokens=8192 does not fit" in caplog.text
        assert lm.totals.retries == 0
        model.answer = Reply(400, {"error": error})  # the prompt alone is too long
        assert lm.call("s", "u") == ""
        assert len(model.asked) == 6
        model.answer = answer
        assert asyncio.run(in_loop(lm)) == "text"


def packed(values, dtype):
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def test_conversations_bring_ids_and_logprobs_as_arrays():
    fingerprint = {
        "completion_ids": [[5, 6, 2]],
        "packed_chosen_logprobs": [packed([-0.5, -1.0, -2.0], "<f4")],
        "packed_topk_indices": [packed([[5, 1], [6, 2], [2, 3]], "<i4")],
        "packed_topk_logprobs": [packed([[-0.5, -3], [-1, -4], [-2, -5]], "<f4")],
    }
    with (
        scripted(chat("text", system_fingerprint=json.dumps(fingerprint))) as model,
        client_of(model, top_logprobs=2, cartridges=["notes"]) as lm,
    ):
        reply = lm.call(CONVERSATION, [{"id": "me/run", "source": "wandb"}, "local"])
        assert lm.call("s", "u") == "text"
    assert reply["text"] == "text"
    assert reply["output_ids"] == [5, 6, 2]
    assert reply["logprobs"].tolist() == [-0.5, -1.0, -2.0]
    assert reply["topk_token_ids"].tolist() == [[5, 1], [6, 2], [2, 3]]
    assert reply["topk_logprobs"].tolist() == [[-0.5, -3], [-1, -4], [-2, -5]]
    assert reply["topk_logprobs"].dtype == np.float32
    assert reply["topk_token_ids"].dtype == np.int32
    assert reply["metrics"]["output_tokens"] == 3
    assert reply["metrics"]["temperature"] == 0.2
    first, second = model.asked
    assert first.path == second.path == "/custom/cartridge/chat/completions"
    assert first.body["messages"] == CONVERSATION
    assert first.body["cartridges"] == [
        {"id": "me/run", "source": "wandb"},
        {"id": "local", "source": "local"},
    ]
    assert second.body["cartridges"] == [{"id": "notes", "source": "local"}]
    asked = {"logprobs", "top_logprobs", "logprobs_in_fingerprint", "logprobs_ignore_temperature"}
    assert [first.body[name] for name in sorted(asked)] == [True, True, True, 2]
    assert not asked & set(second.body)


def test_other_servers_fingerprints_are_no_ids():
    for fingerprint in (None, "fp_44709d6fcb", "3"):
        with (
            scripted(chat("text", system_fingerprint=fingerprint)) as model,
            client_of(model) as lm,
        ):
            reply = lm.call(messages=CONVERSATION)
            assert (reply["text"], reply["output_ids"]) == ("text", None)


def test_the_log_has_metrics_or_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(call_log, "_base", None)
    enable_json_logging(tmp_path)
    with (
        scripted(in_turn(refusal(500), chat("text"), refusal(400, "bad"))) as model,
        client_of(model, log_calls=True) as lm,
        json_log_context(mode="val"),
    ):
        lm.call("system", "user")
        lm.call("system", "user")
    right, wrong = (json.loads(path.read_text()) for path in sorted(tmp_path.rglob("*.json")))
    assert (right["system_prompt"], right["user_prompt"]) == ("system", "user")
    assert right["output"] == "text"
    metrics = right["extra"]["metrics"]
    assert metrics["input_tokens"] == 7
    assert metrics["output_tokens"] == 3
    assert metrics["total_tokens"] == 10
    assert metrics["thinking_tokens"] is None
    assert metrics["retries"] == 1
    assert metrics["duration"] > 0
    assert metrics["throughput"] == pytest.approx(3 / metrics["duration"])
    assert wrong["output"] == ""
    assert "bad" in wrong["extra"]["error"]


def test_two_hundred_threads_are_answered_at_the_same_time(tmp_path, monkeypatch):
    """The server answers none of them before it has all."""
    monkeypatch.setattr(call_log, "_base", None)
    enable_json_logging(tmp_path)
    everybody = threading.Barrier(200)

    def answer(asked):
        everybody.wait(60)
        return chat(f"reply to {asked.body['messages'][1]['content']}")

    with scripted(answer) as model, client_of(model, log_calls=True) as lm:
        prompts = [("s", f"question {index}") for index in range(400)]
        with json_log_context(mode="train", call_type="action"):
            texts = lm.call_many(prompts, num_threads=200)
    assert texts == [f"reply to question {index}" for index in range(400)]
    assert model.num_connections == 200  # each is used twice
    assert lm.totals.calls == 400
    assert lm.totals.output_tokens == 1200
    assert len(list(tmp_path.glob("train/actions/action_*.json"))) == 400


def test_calls_in_an_event_loop():
    everybody = threading.Barrier(50)

    def answer(asked):
        everybody.wait(60)
        return chat(asked.body["messages"][-1]["content"])

    async def ask(lm, name):
        calls = (lm.acall("s", f"{name} {index}") for index in range(50))
        texts = await asyncio.gather(*calls)
        assert texts == [f"{name} {index}" for index in range(50)]
        model.answer = in_turn(refusal(503), chat("conversation"))
        assert (await lm.acall(CONVERSATION))["text"] == "conversation"
        model.answer = answer

    with scripted(answer) as model:
        lm = client_of(model)
        for name in ("first loop", "second loop"):

            async def run(name=name):
                await ask(lm, name)
                await lm.aclose()

            asyncio.run(run())
        assert lm.totals.calls == 102


def test_many_conversations_and_the_first_failure():
    def answer(asked):
        text = asked.body["messages"][-1]["content"]
        return refusal(400, f"bad {text}") if text == "2" else chat(text)

    conversations = [[{"role": "user", "content": str(index)}] for index in range(4)]
    with scripted(answer) as model:
        with client_of(model) as lm:
            replies = lm.call_many(conversations, num_threads=2)
            assert [reply["text"] for reply in replies] == ["0", "1", "", "3"]
            assert lm.call_many([]) == []
        with client_of(model, on_failure="raise") as lm:
            with pytest.raises(TokasaurusError, match="bad 2"):
                lm.call_many(conversations * 50, num_threads=1)
            assert len(model.asked) < 100


def test_the_health_check_comes_once_and_stops_nothing(caplog):
    caplog.set_level(logging.DEBUG, "language_model")

    def answer(asked):
        return Reply(404) if asked.path == "/ping" else chat("text")

    with scripted(answer) as model, client_of(model, enable_health_check=True) as lm:
        assert [lm.call("s", "u"), lm.call("s", "u")] == ["text", "text"]
        assert [each.path for each in model.asked].count("/ping") == 1
        assert "no pong" in caplog.text
        model.answer = Reply(body={"message": "pong"})
        assert lm.ping()


def test_arguments_of_neither_shape_are_an_error():
    with scripted(chat("text")) as model, client_of(model) as lm:
        for args, kwargs in (
            (("only one",), {}),
            (("s", "u", "more"), {}),
            (("s",), {"messages": []}),
            ((), {"prompt": "u"}),
        ):
            with pytest.raises(TypeError):
                lm.call(*args, **kwargs)
        assert not model.asked
