"""Every field of every request: it changes something, or it is refused by name, or it is harmless."""

from __future__ import annotations

from unittest import mock

import msgspec
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completion
import pytest

from tokasaurus.server.chat import ChatRequest
from tokasaurus.server.fields import HARMLESS
from tokasaurus.server.schemas import CompletionRequest

SCHEMAS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
BASE = {
    "/v1/completions": {"prompt": "the cat", "seed": 1, "max_tokens": 12},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "the cat"}],
        "seed": 1,
        "max_tokens": 12,
    },
}

ANY_OBJECT = ("apply_chat_template_overrides", "chat_template_kwargs", "guided_json")
TOOL = {"type": "function", "function": {"name": "f"}}
WITH_TOOLS = {
    "chat_template_kwargs": {
        "chat_template": "{{ tools }} <tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
    }
}

# A value that changes something, and what else the request must say for that to show.
CHANGES = {
    "model": ("other", {}),
    "n": (3, {}),
    "temperature": (0.25, {}),
    "top_p": (0.5, {}),
    "top_k": (5, {}),
    "min_p": (0.5, {}),
    "seed": (2, {}),
    "stop": (["a", "b"], {}),
    "ignore_eos": (True, {}),
    "stop_token_ids": ([70, 71], {}),
    "min_tokens": (3, {}),
    "frequency_penalty": (-0.5, {}),
    "presence_penalty": (0.5, {}),
    "repetition_penalty": (1.1, {}),
    "logit_bias": ({"70": -100, "71": 2.5}, {}),
    "bad_words": (["cat"], {}),
    "max_tokens": (5, {}),
    "prompt_logprobs": (2, {}),
    "logprobs_mode": ("raw", {}),
    "logprobs_ignore_temperature": (True, {}),
    "logprobs_in_fingerprint": (True, {}),
    "priority": (-5, {}),
    "first_k": (1, {"n": 3}),
    "response_format": ({"type": "json_object"}, {}),
    "structured_outputs": ({"regex": "[a-z]+"}, {}),
    "guided_json": ({"type": "integer"}, {}),
    "guided_regex": ("[a-z]+", {}),
    "guided_choice": (["a", "b"], {}),
    "guided_grammar": ('start: "a"', {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "user": ("somebody", {}),
    "metadata": ({"run": "7"}, {}),
    "service_tier": ("flex", {}),
}
CHANGES_OF = {
    "/v1/completions": {
        **CHANGES,
        "prompt": ("the dog", {}),
        "logprobs": (3, {}),
        "echo": (True, {}),
    },
    "/v1/chat/completions": {
        **CHANGES,
        "messages": ([{"role": "user", "content": "the dog"}], {}),
        "ids": ([70, 71, 72], {"messages": None}),
        "logprobs": (True, {}),
        "top_logprobs": (3, {"logprobs": True}),
        "max_completion_tokens": (5, {"max_tokens": None}),
        "apply_chat_template_overrides": ({"shout": True}, {}),
        "chat_template_kwargs": ({"shout": True}, {}),
        "tools": ([TOOL], WITH_TOOLS),
        "tool_choice": ("none", {"tools": [TOOL], **WITH_TOOLS}),
        "parallel_tool_calls": (
            False,
            {"tools": [TOOL], "tool_choice": "required", **WITH_TOOLS},
        ),
    },
}
CASES = [(path, field) for path, changes in CHANGES_OF.items() for field in changes]


def observe(server, path, body):
    """All that a client or the engine can see of a request, without what is different each time."""
    server.engine.received.clear()
    generations = server.generations
    with mock.patch.object(generations, "start", wraps=generations.start) as start:
        answer = server.post(path, body)
    if answer.status != 200:
        return answer.status, answer.error["param"]
    (sent,) = server.engine.requests
    request = {name: getattr(sent, name) for name in sent.__struct_fields__ if name != "request_id"}
    request["prompt_ids"] = sent.prompt_ids.tolist()
    request["client_key"] = start.call_args.args[0].client_key
    if body.get("stream"):
        events = answer.events
        seen = [event["model"] for event in events[:1]], [e.get("usage") for e in events][-1]
    else:
        seen = {k: v for k, v in answer.json.items() if k not in ("id", "created")}
    return 200, msgspec.to_builtins(request), seen


def test_these_are_all_fields():
    for path, schema in SCHEMAS.items():
        assert set(CHANGES_OF[path]) == set(schema.model_fields)


@pytest.mark.parametrize(("path", "field"), CASES)
def test_a_supported_field_changes_something(server, path, field):
    value, extra = CHANGES_OF[path][field]
    body = {**BASE[path], **extra}
    plain = observe(server, path, {name: v for name, v in body.items() if name != field})
    changed = observe(server, path, {**body, field: value})
    assert changed[0] == 200
    assert changed != plain


@pytest.mark.parametrize(("path", "field"), CASES)
def test_null_is_the_same_as_left_out(server, path, field):
    if field in ("prompt", "messages"):
        assert observe(server, path, {**BASE[path], field: None}) == (400, field)
        return
    body = {name: value for name, value in BASE[path].items() if name != field}
    if field == "seed":
        body["temperature"] = 0
        seeds = [observe(server, path, {**body, **e})[1]["seed"] for e in ({}, {"seed": None})]
        assert seeds[0] != seeds[1]
        return
    assert observe(server, path, {**body, field: None}) == observe(server, path, body)


@pytest.mark.parametrize(("path", "field"), CASES)
def test_a_value_of_the_wrong_type_is_refused_by_name(server, path, field):
    for wrong in ({"nonsense": 1}, [[["nonsense"]]]):
        if field in ANY_OBJECT and isinstance(wrong, dict):
            continue
        body = {**BASE[path], **CHANGES_OF[path][field][1], field: wrong}
        assert observe(server, path, body) == (400, field)


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path in SCHEMAS for field in HARMLESS]
)
def test_an_unsupported_field_passes_where_it_is_harmless(server, path, field):
    if field in SCHEMAS[path].model_fields:
        return
    plain = observe(server, path, BASE[path])
    values = ["anything" if value is str else value for value in HARMLESS[field]]
    for value in [None, *values]:
        assert observe(server, path, {**BASE[path], field: value}) == plain
    for value in ({"nonsense": 1}, 0.5):
        answer = server.post(path, {**BASE[path], field: value})
        assert answer.status == 400
        assert answer.error["param"] == field
        assert answer.error["type"] == "invalid_request_error"
        assert field in answer.error["message"]


@pytest.mark.parametrize("path", SCHEMAS)
def test_an_unknown_field_is_refused_with_the_nearest_name(server, path):
    error = server.post(path, {**BASE[path], "temprature": 1}).error
    assert error["param"] == "temprature"
    assert "did you mean temperature?" in error["message"]
    assert "did you mean" not in server.post(path, {**BASE[path], "zzz": 1}).error["message"]


@pytest.mark.parametrize("path", SCHEMAS)
def test_every_field_of_openai_is_known(path):
    module = openai_chat if "chat" in path else openai_completion
    for field in ["stream", *module.CompletionCreateParamsBase.__annotations__]:
        assert field in SCHEMAS[path].model_fields or field in HARMLESS, field


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/completions", {"temperature": "1"}, "temperature", "number"),
        ("/v1/completions", {"temperature": -1}, "temperature", "100"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens", "1"),
        ("/v1/completions", {"max_tokens": 600}, "max_tokens", "512"),
        ("/v1/completions", {"n": 0}, "n", "1"),
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
        ("/v1/completions", {"store": True}, "store", "keeps no completions"),
        ("/v1/completions", {"user": "u" * 513}, "user", "512"),
        ("/v1/completions", {"user": 7}, "user", "string"),
        ("/v1/completions", {"metadata": {"a": 1}}, "metadata", "string"),
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
        ("/v1/chat/completions", {"ids": [], "messages": None}, "ids", "at least 1"),
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
            "messages[0].content[0].type: input should be 'text'; it was 'image_url'",
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
    for stream in (False, True):
        answer = server.post(path, {**BASE[path], **body, "stream": stream})
        assert answer.status == 400
        assert answer.error["param"] == param
        assert said in answer.error["message"]
        assert answer.error["type"] == "invalid_request_error"
    assert server.engine.requests == []


@pytest.mark.parametrize("path", SCHEMAS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tier", "served", "priority"),
    [
        (None, None, 0),
        ("auto", "default", 0),
        ("default", "default", 0),
        ("flex", "flex", 1000),
        ("priority", "priority", -1000),
    ],
)
def test_service_tiers_are_priorities(server, path, stream, tier, served, priority):
    answer = server.post(path, {**BASE[path], "service_tier": tier, "stream": stream})
    bodies = answer.events if stream else [answer.json]
    assert {body.get("service_tier") for body in bodies} == {served}
    assert server.engine.requests[0].priority == priority
