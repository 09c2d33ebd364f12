"""Every field of the installed openai package's requests is decided on, one by one.

The fields come from the package. One that is not in the table fails here, so that a new version of
the package brings no field that nobody has decided on. Other versions may lack some of the table.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

import openai.types.chat as openai_chat
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import openai.types.embedding_create_params as embedding_params
import openai.types.responses as openai_types
import openai.types.responses.response_create_params as response_params
import openai.types.shared_params as openai_shared
import pytest
from fake_engine import TOKENIZER
from field_table import BASE, CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, example
from rows import check_each

from tokasaurus.server.operations.fields import _REASONS
from tokasaurus.server.protocols.responses.request import Include
from tokasaurus.server.protocols.table import OPERATIONS

SERVED, HARMLESS, REFUSED = "served", "harmless", "refused"


def decided(*, served: str, harmless: str = "", refused: str = "") -> Mapping[str, str]:
    """A decision for each name.

    Args:
        served: fields of the request's schema.
        harmless: fields with values, besides null, that pass and change nothing.
        refused: fields that are refused with a reason, whatever they ask for.
    """
    names = [
        (name, kind)
        for kind, each in ((SERVED, served), (HARMLESS, harmless), (REFUSED, refused))
        for name in each.split()
    ]
    assert len(dict(names)) == len(names), "a field has one decision"
    return dict(names)


REQUESTS: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    COMPLETIONS: (
        completion_params.CompletionCreateParamsBase,
        decided(
            served="model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n"
            " presence_penalty seed stop stream_options temperature top_p user",
            harmless="suffix",
        ),
    ),
    CHAT: (
        chat_params.CompletionCreateParamsBase,
        decided(
            served="messages model frequency_penalty logit_bias logprobs max_completion_tokens"
            " max_tokens metadata n parallel_tool_calls presence_penalty reasoning_effort"
            " response_format seed service_tier stop stream_options temperature tool_choice tools"
            " top_logprobs top_p user",
            harmless="function_call functions modalities prompt_cache_key prompt_cache_options"
            " prompt_cache_retention safety_identifier store verbosity",
            refused="audio moderation prediction web_search_options",
        ),
    ),
    RESPONSES: (
        response_params.ResponseCreateParamsBase,
        decided(
            served="include input instructions max_output_tokens metadata model"
            " parallel_tool_calls reasoning service_tier stream_options temperature text"
            " tool_choice tools top_logprobs top_p user",
            harmless="background context_management max_tool_calls prompt_cache_key"
            " prompt_cache_options prompt_cache_retention safety_identifier store truncation",
            refused="access_programs background_options conversation image moderation"
            " previous_response_id prompt",
        ),
    ),
    EMBEDDINGS: (
        embedding_params.EmbeddingCreateParams,
        decided(served="dimensions encoding_format input model user"),
    ),
}


@pytest.mark.parametrize("path", REQUESTS)
def test_every_field_has_a_decision(path):
    theirs, decisions = REQUESTS[path]
    assert set(typing.get_type_hints(theirs)) <= set(decisions)


@pytest.mark.parametrize("path", REQUESTS)
def test_every_decision_is_what_the_server_does(server, path):
    (schema,) = OPERATIONS[path].schemas
    check_each(REQUESTS[path][1].items(), lambda row: check_decision(server, path, schema, *row))


def check_decision(server: Any, path: str, schema: Any, name: str, decision: str) -> None:
    assert (name in schema.model_fields) == (decision == SERVED)
    if decision == SERVED:
        return
    values = schema.harmless[name]
    assert bool(values) == (decision == HARMLESS)
    for value in (None, *map(example, values)):
        assert server.post(path, {**BASE[path], name: value}).status == 200, value
    if values == (str,):
        return
    assert name in _REASONS
    error = server.post(path, {**BASE[path], name: {"nonsense": 1}}).error
    assert error["param"] == name
    assert error["message"].endswith(_REASONS[name])


MESSAGE_FIELDS = "audio content function_call name refusal role tool_call_id tool_calls"
NESTED: Mapping[str, tuple[Any, str]] = {
    "stream_options": (
        openai_chat.ChatCompletionStreamOptionsParam,
        "include_obfuscation include_usage",
    ),
    "stream_options of responses": (response_params.StreamOptions, "include_obfuscation"),
    "reasoning": (
        openai_shared.Reasoning,
        "context effort generate_summary mode summary",
    ),
    "text part": (
        openai_chat.ChatCompletionContentPartTextParam,
        "prompt_cache_breakpoint text type",
    ),
    "refusal part": (openai_chat.ChatCompletionContentPartRefusalParam, "refusal type"),
    "allowed tools": (openai_chat.ChatCompletionAllowedToolsParam, "mode tools"),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_field_of_an_object_in_a_request_has_a_decision(name):
    """``test_every_field`` shows what these do."""
    theirs, names = NESTED[name]
    assert set(typing.get_type_hints(theirs)) <= set(names.split())


def test_every_inclusion_has_a_decision():
    assert set(typing.get_args(openai_types.ResponseIncludable)) <= set(typing.get_args(Include))


def messages() -> Iterator[Any]:
    for role in ("Assistant", "Tool", "User", "System", "Developer", "Function"):
        yield getattr(openai_chat, f"ChatCompletion{role}MessageParam")


def test_every_field_of_a_message_has_a_decision():
    found = {name for each in messages() for name in typing.get_type_hints(each)}
    assert found <= set(MESSAGE_FIELDS.split())


# --- what the served ones do ---------------------------------------------------------------------

EFFORT = "{{ enable_thinking }}|{{ reasoning_effort }}|{{ thinking }}"


def prompt_of(server, path, template, **fields):
    server.engine.received.clear()
    kwargs = {"chat_template": template, **fields.pop("kwargs", {})}
    answer = server.post(path, {**BASE[path], "chat_template_kwargs": kwargs, **fields})
    assert answer.status == 200, answer.error
    return TOKENIZER.decode(server.engine.requests[-1].prompt_ids.tolist()), answer.json


def test_the_effort_of_reasoning_reaches_the_template(server):
    for effort, shown in (
        ("none", "False|none|False"),
        ("minimal", "True|minimal|True"),
        ("max", "True|max|True"),
    ):
        assert prompt_of(server, CHAT, EFFORT, reasoning_effort=effort)[0] == shown
        assert prompt_of(server, CHAT, EFFORT, reasoning={"effort": effort})[0] == shown
        prompt, answer = prompt_of(server, RESPONSES, EFFORT, reasoning={"effort": effort})
        assert prompt == shown
        assert answer["reasoning"] == {"effort": effort, "summary": None}
    for path in (CHAT, RESPONSES):
        said = {"reasoning": {"effort": "none"}, "kwargs": {"enable_thinking": True}}
        assert prompt_of(server, path, EFFORT, **said)[0] == "True|none|False"


def test_effort_changes_nothing_for_a_model_that_does_not_reason(server):
    plain = prompt_of(server, CHAT, "{{ messages }}")[0]
    assert prompt_of(server, CHAT, "{{ messages }}", reasoning_effort="high")[0] == plain


def test_a_response_is_never_stored_and_has_nothing_encrypted(server):
    fields = {"store": True, "include": ["reasoning.encrypted_content"], "truncation": "auto"}
    _, answer = prompt_of(server, RESPONSES, "{{ messages }}", **fields)
    assert answer["store"] is False
    assert answer["output"][0]["content"][0]["logprobs"] == []


def test_how_the_prompt_ends_may_stand_beside_the_messages(server):
    template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    user, mine = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    for fields, ends in (
        ({}, ("<u>!", "<u><a")),
        ({"add_generation_prompt": True}, ("<u>!", "<u><a>!")),
        ({"add_generation_prompt": False}, ("<u>", "<u><a>")),
        ({"continue_final_message": False}, ("<u>!", "<u><a>!")),
        ({"continue_final_message": True}, ("<u", "<u><a")),
        ({"continue_final_message": True, "add_generation_prompt": False}, ("<u", "<u><a")),
    ):
        prompts = [
            prompt_of(server, CHAT, template, messages=conversation, **fields)[0]
            for conversation in ([user], [user, mine])
        ]
        assert tuple(prompts) == ends, fields
    body = {**BASE[CHAT], "continue_final_message": True, "add_generation_prompt": True}
    assert server.post(CHAT, body).error["param"] == "continue_final_message"
