"""Values of fields that are refused, and what is said of them; what each field does is in test_every_field."""

from __future__ import annotations

import pytest
from rows import each_row

BASE = {
    "/v1/completions": {"prompt": "the cat", "seed": 1, "max_tokens": 12},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "the cat"}],
        "seed": 1,
        "max_tokens": 12,
    },
}


@pytest.mark.parametrize("path", BASE)
def test_an_unknown_field_is_refused_with_the_nearest_name(server, path):
    error = server.post(path, {**BASE[path], "temprature": 1}).error
    assert error["param"] == "temprature"
    assert "did you mean temperature?" in error["message"]
    assert "did you mean" not in server.post(path, {**BASE[path], "zzz": 1}).error["message"]


@each_row(
    "path, body, param, said",
    [
        ("/v1/completions", {"temperature": "1"}, "temperature", "number"),
        ("/v1/completions", {"temperature": -1}, "temperature", "100"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens", "1"),
        ("/v1/completions", {"max_tokens": 600}, "max_tokens", "512"),
        ("/v1/completions", {"n": 0}, "n", "1"),
        ("/v1/completions", {"n": 65537}, "n", "65536"),
        ("/v1/completions", {"best_of": True}, "best_of", "True"),
        ("/v1/completions", {"store": 0}, "store", "0"),
        (
            "/v1/completions",
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format",
            "'schema'",
        ),
        (
            "/v1/completions",
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format",
            "'json_schema'",
        ),
        ("/v1/completions", {"n": True}, "n", "integer"),
        ("/v1/completions", {"logprobs": 21}, "logprobs", "max_topk_logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs", "integer"),
        ("/v1/completions", {"stop": [""]}, "stop", "1"),
        ("/v1/completions", {"seed": 1 << 70}, "seed", "9223372036854775807"),
        ("/v1/completions", {"prompt": []}, "prompt", "list"),
        ("/v1/completions", {"prompt": [[]]}, "prompt", "at least one token"),
        ("/v1/completions", {"prompt": ["a", 5]}, "prompt", "list"),
        ("/v1/completions", {"prompt": [5, "a"]}, "prompt", "list"),
        ("/v1/completions", {"prompt": [5, True]}, "prompt", "list"),
        ("/v1/completions", {"prompt": [5.5]}, "prompt", "list"),
        ("/v1/completions", {"prompt": [99999]}, "prompt", "99999"),
        ("/v1/completions", {"prompt": [5] * 512}, "prompt", "512"),
        ("/v1/completions", {"prompt": [[5]] * 300, "n": 300}, "prompt", "65536"),
        ("/v1/completions", {"frequency_penalty": 2.1}, "frequency_penalty", "from -2 to 2"),
        ("/v1/completions", {"frequency_penalty": True}, "frequency_penalty", "number"),
        ("/v1/completions", {"presence_penalty": -2.1}, "presence_penalty", "from -2 to 2"),
        ("/v1/completions", {"repetition_penalty": 0}, "repetition_penalty", "from 0.001"),
        ("/v1/completions", {"repetition_penalty": -1}, "repetition_penalty", "from 0.001"),
        ("/v1/completions", {"repetition_penalty": "1"}, "repetition_penalty", "number"),
        ("/v1/completions", {"min_tokens": -1}, "min_tokens", "from 0"),
        ("/v1/completions", {"min_tokens": 13}, "min_tokens", "at most 12"),
        ("/v1/completions", {"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ("/v1/completions", {"stop_token_ids": [99999]}, "stop_token_ids", "99999"),
        ("/v1/completions", {"stop_token_ids": [True]}, "stop_token_ids", "integer"),
        ("/v1/completions", {"stop_token_ids": list(range(129))}, "stop_token_ids", "128"),
        ("/v1/completions", {"logit_bias": {"70": 101}}, "logit_bias", "from -100 to 100"),
        ("/v1/completions", {"logit_bias": {"cat": 1}}, "logit_bias", "'cat'"),
        ("/v1/completions", {"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
        ("/v1/completions", {"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ("/v1/completions", {"logit_bias": {"7": 1, "07": 1}}, "logit_bias", "twice"),
        ("/v1/completions", {"logit_bias": {"7": "1"}}, "logit_bias", "number"),
        (
            "/v1/completions",
            {"logit_bias": {str(number): 1 for number in range(1025)}},
            "logit_bias",
            "1024",
        ),
        ("/v1/completions", {"bad_words": "cat"}, "bad_words", "list"),
        ("/v1/completions", {"bad_words": [" "]}, "bad_words", "words"),
        ("/v1/completions", {"bad_words": [5]}, "bad_words", "string"),
        ("/v1/completions", {"bad_words": ["x" * 257]}, "bad_words", "256"),
        ("/v1/completions", {"bad_words": [str(i) for i in range(257)]}, "bad_words", "256"),
        ("/v1/completions", {"best_of": 2, "n": 4}, "best_of", "ask for n samples"),
        ("/v1/completions", {"best_of": 4, "n": 4}, "best_of", "it was 4"),
        ("/v1/completions", {"suffix": "end"}, "suffix", "goes on from the prompt"),
        ("/v1/chat/completions", {"store": True}, "store", "keeps no completions"),
        (
            "/v1/chat/completions",
            {"reasoning_effort": "low"},
            "reasoning_effort",
            "in chat_template_kwargs",
        ),
        ("/v1/completions", {"store": True}, "store", "keeps no completions"),
        ("/v1/completions", {"user": "u" * 513}, "user", "512"),
        ("/v1/completions", {"user": 7}, "user", "string"),
        (
            "/v1/completions",
            {"metadata": {"a": 1}},
            "metadata",
            "metadata.a must be a valid string",
        ),
        ("/v1/completions", {"metadata": {"a" * 65: "b"}}, "metadata", "64"),
        ("/v1/completions", {"metadata": {"a": "b" * 513}}, "metadata", "512"),
        (
            "/v1/completions",
            {"metadata": {str(number): "" for number in range(17)}},
            "metadata",
            "16",
        ),
        ("/v1/completions", {"service_tier": "scale"}, "service_tier", "'priority'"),
        ("/v1/completions", {"service_tier": "flex", "priority": 3}, "service_tier", "priority"),
        ("/v1/chat/completions", {"messages": None}, "messages", "neither"),
        ("/v1/chat/completions", {"ids": [5, 6]}, "ids", "both"),
        (
            "/v1/chat/completions",
            {"ids": [], "messages": None},
            "ids",
            "ids must have at least 1 item",
        ),
        ("/v1/chat/completions", {"ids": [99999], "messages": None}, "ids", "99999"),
        ("/v1/chat/completions", {"ids": [5] * 512, "messages": None}, "ids", "512"),
        (
            "/v1/chat/completions",
            {"ids": [5], "messages": None, "apply_chat_template_overrides": {"shout": True}},
            "apply_chat_template_overrides",
            "no effect",
        ),
        ("/v1/completions", {"priority": 1_000_001}, "priority", "from -1000000 to 1000000"),
        ("/v1/completions", {"priority": 1.0}, "priority", "integer"),
        ("/v1/completions", {"priority": True}, "priority", "integer"),
        ("/v1/completions", {"first_k": 2}, "first_k", "from 1 to n=1, not 2; leave it out"),
        ("/v1/completions", {"first_k": 5, "n": 4}, "first_k", "from 1 to n=4"),
        ("/v1/completions", {"first_k": 0, "n": 4}, "first_k", "leave it out"),
        ("/v1/completions", {"first_k": 2.0, "n": 4}, "first_k", "integer"),
        ("/v1/completions", {"first_k": True, "n": 4}, "first_k", "integer"),
        ("/v1/chat/completions", {"first_k": 3, "n": 2}, "first_k", "from 1 to n=2"),
        ("/v1/chat/completions", {"priority": -1_000_001}, "priority", "from -1000000"),
        (
            "/v1/completions",
            {"logprobs_mode": "processed", "logprobs_ignore_temperature": True},
            "logprobs_ignore_temperature",
            "processed",
        ),
        (
            "/v1/completions",
            {"echo": True, "logprobs_in_fingerprint": True},
            "logprobs_in_fingerprint",
            "echo",
        ),
        ("/v1/chat/completions", {"messages": []}, "messages", "at least 1"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}]},
            "messages",
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "martian", "content": ""}]},
            "messages",
            "martian",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "messages[0].content[0].type must be 'text', not 'image_url'",
        ),
        ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs", "logprobs"),
        (
            "/v1/chat/completions",
            {"top_logprobs": 21, "logprobs": True},
            "top_logprobs",
            "max_topk_logprobs",
        ),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 600, "max_tokens": None},
            "max_completion_tokens",
            "512",
        ),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 5, "max_tokens": 6},
            "max_completion_tokens",
            "6",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 900}]},
            "messages",
            "512",
        ),
    ],
)
def test_wrong_values(server, path, body, param, said):
    server.engine.received.clear()
    for stream in (False, True):
        answer = server.post(path, {**BASE[path], **body, "stream": stream})
        assert answer.status == 400
        assert answer.error["param"] == param
        assert said in answer.error["message"]
        assert answer.error["type"] == "invalid_request_error"
    assert server.engine.requests == []


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
