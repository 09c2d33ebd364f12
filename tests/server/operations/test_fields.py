"""Values that completions and chats refuse; ``test_every_field`` checks what each field does."""

from __future__ import annotations

import re

import pytest
from rows import each_row

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = {
    COMPLETIONS: {"prompt": "the cat", "seed": 1, "max_tokens": 12},
    CHAT: {"messages": [{"role": "user", "content": "the cat"}], "seed": 1, "max_tokens": 12},
}
IMAGE = [{"type": "image_url", "image_url": {}}]


@pytest.mark.parametrize("path", BASE)
def test_an_unknown_field_is_refused_with_the_nearest_name(server, path):
    error = server.post(path, {**BASE[path], "temprature": 1}).error
    assert error["param"] == "temprature"
    assert "did you mean temperature?" in error["message"]
    assert "did you mean" not in server.post(path, {**BASE[path], "zzz": 1}).error["message"]


def refusal(server, path, fields):
    """The error of a request with these fields; it is the same for a stream."""
    server.engine.received.clear()
    whole, streamed = (
        server.post(path, {**BASE[path], **fields, "stream": stream}) for stream in (False, True)
    )
    assert (whole.status, streamed.status) == (400, 400)
    assert whole.error == streamed.error
    assert whole.error["type"] == "invalid_request_error"
    assert server.engine.requests == []
    return whole.error


def mentions(error, field):
    """Whether the message names a field, as a word of its own or at the head of a path."""
    return re.search(rf"\b{field}\b", error["message"]) is not None


@each_row(
    "param, value",
    [
        ("bad_words", "cat"),
        ("bad_words", [" "]),
        ("bad_words", [5]),
        ("bad_words", ["x" * 257]),
        ("bad_words", [str(number) for number in range(257)]),
        ("best_of", True),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", True),
        ("logit_bias", {"70": 101}),
        ("logit_bias", {"cat": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {"7": 1, "07": 1}),
        ("logit_bias", {"7": "1"}),
        ("logit_bias", {str(number): 1 for number in range(1025)}),
        ("logprobs", True),
        ("max_tokens", 0),
        ("max_tokens", 600),
        ("metadata", {"a" * 65: "b"}),
        ("metadata", {"a": "b" * 513}),
        ("metadata", {str(number): "" for number in range(17)}),
        ("min_tokens", -1),
        ("min_tokens", 13),
        ("n", 0),
        ("n", 65537),
        ("n", True),
        ("presence_penalty", -2.1),
        ("priority", 1_000_001),
        ("priority", -1_000_001),
        ("priority", 1.0),
        ("priority", True),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 5]),
        ("prompt", [5, "a"]),
        ("prompt", [5, True]),
        ("prompt", [5.5]),
        ("prompt", [99999]),
        ("prompt", [5] * 512),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", "1"),
        ("response_format", {"type": "json_object", "schema": {}}),
        ("response_format", {"type": "text", "json_schema": {"schema": {}}}),
        ("seed", 1 << 70),
        ("service_tier", "scale"),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [99999]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", list(range(129))),
        ("store", 0),
        ("temperature", "1"),
        ("temperature", -1),
        ("user", "u" * 513),
        ("user", 7),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(server, param, value):
    error = refusal(server, COMPLETIONS, {param: value})
    assert error["param"] == param
    assert mentions(error, param)


@each_row(
    "path, fields, param",
    [
        (COMPLETIONS, {"prompt": [[5]] * 300, "n": 300}, "prompt"),
        (COMPLETIONS, {"service_tier": "flex", "priority": 3}, "service_tier"),
        (COMPLETIONS, {"first_k": 2.0, "n": 4}, "first_k"),
        (COMPLETIONS, {"first_k": True, "n": 4}, "first_k"),
        (CHAT, {"first_k": 3, "n": 2}, "first_k"),
        (
            COMPLETIONS,
            {"logprobs_mode": "processed", "logprobs_ignore_temperature": True},
            "logprobs_ignore_temperature",
        ),
        (COMPLETIONS, {"echo": True, "logprobs_in_fingerprint": True}, "logprobs_in_fingerprint"),
        (CHAT, {"priority": -1_000_001}, "priority"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "martian", "content": ""}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 900}]}, "messages"),
        (CHAT, {"ids": [5, 6]}, "ids"),
        (CHAT, {"ids": [], "messages": None}, "ids"),
        (CHAT, {"ids": [99999], "messages": None}, "ids"),
        (CHAT, {"ids": [5] * 512, "messages": None}, "ids"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"max_completion_tokens": 600, "max_tokens": None}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(server, path, fields, param):
    error = refusal(server, path, fields)
    assert error["param"] == param
    assert mentions(error, param)


@each_row(
    "path, fields, param, remedy",
    [
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "max_topk_logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "max_topk_logprobs"),
        (COMPLETIONS, {"best_of": 2, "n": 4}, "best_of", "ask for n samples"),
        (COMPLETIONS, {"best_of": 4, "n": 3}, "best_of", "with the value 4"),
        (COMPLETIONS, {"suffix": "end"}, "suffix", "added after the prompt"),
        (COMPLETIONS, {"store": 1}, "store", "true or false"),
        (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort", "of chat templates"),
        (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal', 'low'"),
        (
            CHAT,
            {"ids": [5], "messages": None, "reasoning_effort": "low"},
            "reasoning_effort",
            "ids",
        ),
        (CHAT, {"ids": [5], "messages": None, "reasoning": {"effort": "low"}}, "reasoning", "ids"),
        (
            CHAT,
            {"ids": [5], "messages": None, "add_generation_prompt": False},
            "add_generation_prompt",
            "no effect",
        ),
        (
            CHAT,
            {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
            "reasoning_effort",
            "leave one out",
        ),
        (COMPLETIONS, {"metadata": {"a": 1}}, "metadata", "metadata.a must be a valid string"),
        (COMPLETIONS, {"first_k": 2}, "first_k", "from 1 to n=1, not 2; leave it out"),
        (COMPLETIONS, {"first_k": 5, "n": 4}, "first_k", "from 1 to n=4"),
        (COMPLETIONS, {"first_k": 0, "n": 4}, "first_k", "leave it out"),
        (
            CHAT,
            {"ids": [5], "messages": None, "apply_chat_template_overrides": {"shout": True}},
            "apply_chat_template_overrides",
            "no effect",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": IMAGE}]},
            "messages",
            "messages[0].content[0].type must be 'text', not 'image_url'",
        ),
    ],
)
def test_a_refusal_tells_the_remedy(server, path, fields, param, remedy):
    error = refusal(server, path, fields)
    assert error["param"] == param
    assert remedy in error["message"]


@pytest.mark.parametrize("path", BASE)
@pytest.mark.parametrize("stream", [False, True])
@each_row(
    "tier, served, priority",
    [
        (None, None, 0),
        ("auto", "default", 0),
        ("default", "default", 0),
        ("flex", "flex", 1000),
        ("priority", "priority", -1000),
    ],
)
def test_service_tiers_are_priorities(server, path, stream, tier, served, priority):
    server.engine.received.clear()
    answer = server.post(path, {**BASE[path], "service_tier": tier, "stream": stream})
    bodies = answer.events if stream else [answer.json]
    assert {body.get("service_tier") for body in bodies} == {served}
    assert server.engine.requests[0].priority == priority


def test_an_unknown_null_beside_a_field_with_the_name_of_a_schema_is_refused(server):
    """Pydantic's names for members of unions are no path into what the client sent."""
    for inner in ("x", [], {"zzz": 1}, [{"zzz": 1}]):
        part = {"type": "text", "text": "a", "zzz": None, "TextPart": inner}
        body = {"messages": [{"role": "user", "content": [part]}]}
        assert server.post(CHAT, body).error["param"] == "messages"
