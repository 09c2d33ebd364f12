"""Conversations as clients replay them: what models and tools said, in any shape that it has."""

from __future__ import annotations

import pytest
from fake_engine import TOKENIZER
from rows import each_row

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
USER = {"role": "user", "content": "hi"}
SHOWS = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %}|{{ c.function.arguments | tojson }}{% endfor %}]"
    "{% endfor %}<tool_call>"
)
NEEDS_OBJECTS = (
    "{% for m in messages %}[{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for name, value in c.function.arguments.items() %}|{{ name }}={{ value }}{% endfor %}"
    "{% endfor %}]{% endfor %}"
)
TOOLS_SHOWN = "{% for t in tools %}({{ t.function.name }}){% endfor %}<tool_call>"


def prompt_of(server, path, template=SHOWS, **fields):
    """The prompt that the engine gets; the request must be answered with 200."""
    server.engine.received.clear()
    answer = post(server, path, template, **fields)
    assert answer.status == 200, answer.error
    return TOKENIZER.decode(server.engine.requests[-1].prompt_ids.tolist())


def post(server, path, template=SHOWS, **fields):
    limit = {"max_tokens": 5} if path == CHAT else {"max_output_tokens": 5}
    return server.post(
        path, {**limit, "chat_template_kwargs": {"chat_template": template}, **fields}
    )


def called(arguments):
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


TEXT = {"type": "text", "text": "the cat"}


@each_row(
    "message, shown",
    [
        ({"role": "assistant", "content": None}, "[assistant||]"),
        ({"role": "assistant"}, "[assistant||]"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "[assistant||]"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "[assistant|No.|]"),
        ({"role": "assistant", "content": "Hm.", "refusal": "No."}, "[assistant|Hm.\nNo.|]"),
        ({"role": "assistant", "content": "Hm.", "refusal": None}, "[assistant|Hm.|]"),
        (
            {"role": "assistant", "content": [TEXT, {"type": "refusal", "refusal": "No."}]},
            "[assistant|the catNo.|]",
        ),
        ({"role": "assistant", "content": "a", "reasoning": None}, "[assistant|a|]"),
        ({"role": "assistant", "content": "a", "reasoning": "hm"}, "[assistant|a|hm]"),
        (
            {"role": "assistant", "content": "a", "reasoning": "hm", "reasoning_content": "hm"},
            "[assistant|a|hm]",
        ),
        ({"role": "tool", "tool_call_id": "c", "content": None}, "[tool||]"),
        ({"role": "tool", "tool_call_id": "c"}, "[tool||]"),
        ({"role": "function", "name": "f", "content": None}, "[function||]"),
        (
            {"role": "user", "content": [{**TEXT, "cache_control": {"type": "ephemeral"}}]},
            "[user|the cat|]",
        ),
        (
            {"role": "user", "content": [{**TEXT, "cache_control": None}]},
            "[user|the cat|]",
        ),
        (
            {"role": "user", "content": [{**TEXT, "prompt_cache_breakpoint": {}}]},
            "[user|the cat|]",
        ),
    ],
)
def test_a_replayed_message_reaches_the_template(server, message, shown):
    assert prompt_of(server, CHAT, messages=[message, USER]) == f"{shown}[user|hi|]<tool_call>"


ARGUMENTS = [
    ('{"a": 1}', '{"a": 1}'),
    ("", "{}"),
    ("null", "{}"),
    ("[1]", '"[1]"'),
    ("7", '"7"'),
    ('{"a": ', r'"{\"a\": "'),
    ("{'a': 1}", r'"{\u0027a\u0027: 1}"'),
    ("9" * 5000, f'"{"9" * 5000}"'),
]


@each_row("arguments, shown", ARGUMENTS[:-1])
def test_the_arguments_of_a_call_may_be_any_text(server, arguments, shown):
    message = {"role": "assistant", "content": None, "tool_calls": [called(arguments)]}
    shown = shown.replace(r"\u0027", "'")
    assert f"|{shown}]" in prompt_of(server, CHAT, messages=[message, USER])
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
    assert f"|{shown}]" in prompt_of(server, RESPONSES, input=[USER, item, USER])


def test_what_the_openai_client_has_parsed_may_come_back(server):
    call = called('{"a": 1}')
    call["function"]["parsed_arguments"] = {"a": 2}
    message = {"role": "assistant", "content": "hm", "parsed": {"b": 3}, "tool_calls": [call]}
    assert prompt_of(server, CHAT, messages=[message, USER]).startswith('[assistant|hm||{"a": 1}]')


def test_a_call_in_a_chat_may_have_no_arguments(server):
    for function in ({"name": "f"}, {"name": "f", "arguments": None}):
        call = {"id": "c", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert "|{}]" in prompt_of(server, CHAT, messages=[message, USER])


@each_row(
    "arguments, shown",
    [
        ('{"a": 1}', "[|a=1][hi]"),
        ("null", "[][hi]"),
        ("[1]", "[|arguments=[1]][hi]"),
        ('{"a": ', '[|arguments={"a": ][hi]'),
    ],
)
def test_a_template_that_needs_objects_gets_the_text_in_an_object(server, arguments, shown):
    message = {"role": "assistant", "content": None, "tool_calls": [called(arguments)]}
    fields = {"messages": [message, USER]}
    assert prompt_of(server, CHAT, NEEDS_OBJECTS, **fields) == shown
    body = {**fields, "chat_template": NEEDS_OBJECTS}
    answer = server.post("/tokenize", body)
    assert TOKENIZER.decode(answer.json["tokens"]) == shown


def test_arguments_of_thousands_of_digits_or_brackets_are_no_error_of_the_server(server):
    for arguments in ("9" * 5000, "[" * 5000):
        message = {"role": "assistant", "content": None, "tool_calls": [called(arguments)]}
        template = "{{ messages[0].tool_calls[0].function.arguments | length }}"
        assert prompt_of(server, CHAT, template, messages=[message, USER]) == "5000"


@each_row(
    "message, said",
    [
        ({"role": "user", "content": None}, "messages[0].content is required"),
        ({"role": "system"}, "messages[0].content is required"),
        (
            {"role": "assistant", "reasoning": "a", "reasoning_content": "b"},
            "messages[0].reasoning and messages[0].reasoning_content are two names",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type must be 'text', not 'image_url'",
        ),
    ],
)
def test_what_nobody_can_replay_is_refused(server, message, said):
    answer = post(server, CHAT, messages=[message, USER])
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert said in answer.error["message"]


def test_a_response_replays_refusals_and_hints(server):
    parts = [
        {"type": "output_text", "text": "the cat", "cache_control": {"type": "ephemeral"}},
        {"type": "refusal", "refusal": "No."},
    ]
    items = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"role": "assistant", "content": parts},
        USER,
    ]
    assert "[assistant|the catNo.|]" in prompt_of(server, RESPONSES, input=items)


# --- some of the tools ---------------------------------------------------------------------------


def tool(name, path):
    return (
        {"type": "function", "function": {"name": name}}
        if path == CHAT
        else {"type": "function", "name": name}
    )


def allowed(path, mode, *names):
    these = {"mode": mode, "tools": [tool(name, path) for name in names]}
    return (
        {"type": "allowed_tools", "allowed_tools": these}
        if path == CHAT
        else {"type": "allowed_tools", **these}
    )


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_allowed_tools_are_the_only_ones_that_the_model_sees(server, path):
    start = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    fields = {**start, "tools": [tool(name, path) for name in "fgh"]}
    for mode in ("auto", "required"):
        choice = allowed(path, mode, "h", "f")
        prompt = prompt_of(server, path, TOOLS_SHOWN, **fields, tool_choice=choice)
        assert prompt == "(f)(h)<tool_call>"
        grammar = server.engine.requests[-1].grammar
        assert bool(grammar) == (mode == "required")
        if grammar:
            assert [f'\\"{name}\\"' in grammar for name in "fgh"] == [True, False, True]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_wrong_tool_choice_is_refused_in_the_words_of_the_api(server, path):
    start = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    fields = {**start, "tools": [tool("f", path)]}
    for choice, said in (
        (allowed(path, "auto", "g"), "tool_choice names 'g', which is not among the tools"),
        (allowed(path, "never", "f"), "mode must be 'auto' or 'required', not 'never'"),
        (allowed(path, "auto"), "tools"),
        ({"type": "custom", "name": "f"}, "tool_choice.type must be"),
        ({"type": "allowed_tools"}, "tool_choice."),
        ("any", "tool_choice must be 'none', 'auto' or 'required'"),
    ):
        error = post(server, path, TOOLS_SHOWN, **fields, tool_choice=choice).error
        assert error["param"] == "tool_choice", choice
        assert said in error["message"], choice
        for name in ("ToolChoice", "AllowedTools", "FunctionChoice", "AllowedFunctions"):
            assert name not in error["message"]
