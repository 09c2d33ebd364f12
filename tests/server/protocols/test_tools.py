"""Tools and reasoning as the openai client uses them, on an engine with scripted answers."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import CONFIG, EOS_ID, TOKENIZER, ids_of
from rows import each_row

from tokasaurus.errors import RequestError
from tokasaurus.grammars import GrammarCompiler
from tokasaurus.server.protocols.tools.formats import tool_format

HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }} "
    "{{ t.function.description }} {{ t.function.parameters.required }}{% endfor %}</tools>"
    "<tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }})"
    "{% endfor %}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>")
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"
)
OPENED = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "time-of.day"}}
TOOLS = [WEATHER, TIME]
MESSAGES = [{"role": "user", "content": "hi"}]
ARGUMENTS = '{"city": "Paris, \\"nord\\""}'
HERMES_CALLS = (
    f'Wait.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time-of.day", "arguments": {}}\n</tool_call>'
)
LLAMA_CALLS = (
    f'{{"name": "weather", "parameters": {ARGUMENTS}}}; '
    '{"name": "time-of.day", "parameters": {}}'
)


def says(server, text):
    server.engine.script = lambda request, index: [*ids_of(text), EOS_ID]


def ask(server, template=HERMES, **fields):
    fields = {"model": "m", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, **fields}
    kwargs = fields.pop("chat_template_kwargs", {})
    extra = {"chat_template_kwargs": {"chat_template": template, **kwargs}}
    return server.client().chat.completions.create(extra_body=extra, **fields)


def post(server, template=HERMES, **fields):
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, **fields}
    body["chat_template_kwargs"] = {"chat_template": template}
    return server.post("/v1/chat/completions", body)


def prompt_of(server):
    return TOKENIZER.decode(server.engine.requests[-1].prompt_ids.tolist())


def check_calls(calls):
    assert [call.function.name for call in calls] == ["weather", "time-of.day"]
    assert [call.function.arguments for call in calls] == [ARGUMENTS, "{}"]
    assert {call.type for call in calls} == {"function"}
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    ("template", "text", "content"), [(HERMES, HERMES_CALLS, "Wait."), (LLAMA, LLAMA_CALLS, None)]
)
def test_a_whole_answer_holds_its_tool_calls(server, template, text, content):
    says(server, text)
    (choice,) = ask(server, template).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == content
    check_calls(choice.message.tool_calls)
    assert "<tools>weather Of a city. ['city']time-of.day" in prompt_of(server)


@pytest.mark.parametrize(("template", "text"), [(HERMES, HERMES_CALLS), (LLAMA, LLAMA_CALLS)])
@each_row("largest_step", [1, 2, 7, 100])
def test_streamed_tool_calls_add_up_in_the_openai_client(server, template, text, largest_step):
    says(server, text)
    server.engine.largest_step = largest_step
    with server.client().chat.completions.stream(
        model="m",
        messages=MESSAGES,
        tools=TOOLS,
        max_tokens=200,
        extra_body={"chat_template_kwargs": {"chat_template": template}},
    ) as stream:
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    check_calls(choice.message.tool_calls)


def test_a_streamed_call_has_its_name_first_and_its_arguments_in_pieces(server):
    says(server, HERMES_CALLS)
    server.engine.largest_step = 1
    pieces = []
    for chunk in ask(server, stream=True):
        pieces += [
            (c.id, c.function.name, c.function.arguments)
            for c in chunk.choices[0].delta.tool_calls or []
        ]
    named = [number for number, (_, name, _) in enumerate(pieces) if name]
    assert [pieces[number][1] for number in named] == ["weather", "time-of.day"]
    assert all(pieces[number][0] for number in named)
    assert named[1] - named[0] > 5
    assert "".join(piece[2] for piece in pieces[: named[1]]) == ARGUMENTS


def test_the_async_openai_client_reads_tool_calls(server):
    says(server, HERMES_CALLS)

    async def run():
        async with server.async_client() as client:
            return await client.chat.completions.create(
                model="m",
                messages=MESSAGES,
                tools=TOOLS,
                max_tokens=200,
                extra_body={"chat_template_kwargs": {"chat_template": HERMES}},
            )

    check_calls(asyncio.run(run()).choices[0].message.tool_calls)


def test_calls_and_their_results_are_rendered(server):
    says(server, HERMES_CALLS)
    message = ask(server).choices[0].message
    call = message.tool_calls[0]
    says(server, "It rains.")
    answer = ask(
        server,
        messages=[
            *MESSAGES,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ],
    )
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"
    assert '[assistant]Wait.(weather Paris, "nord")' in prompt_of(server)
    assert f"[tool]rain#{call.id}[assistant]" in prompt_of(server)


def test_tool_choice_none_hides_the_tools_from_the_model(server):
    says(server, HERMES_CALLS)
    (choice,) = ask(server, tool_choice="none").choices
    assert choice.message.content == HERMES_CALLS
    assert choice.message.tool_calls is None
    assert "weather" not in prompt_of(server)


def test_at_most_one_call(server):
    says(server, HERMES_CALLS)
    (choice,) = ask(server, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]


def accepts(grammar, text):
    matcher = GrammarCompiler(TOKENIZER.vocabulary(CONFIG.eos_token_ids)).compile(grammar)
    ids = ids_of(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("template", "one", "both", "other", "wrong"),
    [
        (
            HERMES,
            HERMES_CALLS[6:].partition('\n<tool_call>\n{"name": "time')[0],
            HERMES_CALLS[6:],
            '<tool_call>\n{"name": "time-of.day", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
        ),
        (
            LLAMA,
            LLAMA_CALLS.partition("; ")[0],
            LLAMA_CALLS,
            LLAMA_CALLS.partition("; ")[2],
            '{"name": "weather", "parameters": {"city": 5}}',
        ),
    ],
)
def test_tool_choice_enforces_calls_by_a_grammar(server, template, one, both, other, wrong):
    """Try one call, two calls, another function, wrong arguments and text for each choice."""
    texts = (one, both, other, wrong, "It rains.")
    for fields, expected in (
        ({"tool_choice": "required"}, (True, True, True, False, False)),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            (True, False, True, False, False),
        ),
        ({"tool_choice": NAMED}, (True, False, False, False, False)),
    ):
        says(server, one)
        (choice,) = ask(server, template, **fields).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls[0].function.arguments == ARGUMENTS
        grammar = server.engine.requests[-1].grammar
        assert tuple(accepts(grammar, text) for text in texts) == expected
    ask(server, template, tool_choice="auto")
    assert server.engine.requests[-1].grammar == ""


def test_a_schema_of_a_tool_may_refer_to_its_own_definitions(server):
    parameters = {
        "properties": {"a": {"$ref": "#/$defs/digit"}},
        "required": ["a"],
        "$defs": {"digit": {"enum": [0, 1]}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    says(server, "x")
    ask(server, tools=[tool], tool_choice="required")
    grammar = server.engine.requests[-1].grammar
    head = '<tool_call>\n{"name": "f", "arguments": '
    assert accepts(grammar, head + '{"a": 1}}\n</tool_call>')
    assert not accepts(grammar, head + '{"a": 2}}\n</tool_call>')


def test_arguments_have_no_keys_that_the_tool_does_not_list_and_white_space_as_python(server):
    parameters = {"type": "object", "properties": {"a": {"type": "string", "format": "path"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    says(server, "x")
    ask(server, tools=[tool], tool_choice="required")
    grammar = server.engine.requests[-1].grammar
    head, end = '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"
    texts = ('{"a": "x"}', "{}", '{"a":"x"}', '{"a": "x" }', '{"b": 1}', '{"a": "x", "b": 1}')
    taken = [text for text in texts if accepts(grammar, head + text + end)]
    assert taken == ['{"a": "x"}', "{}"]


SIZE = {
    "type": "json_schema",
    "json_schema": {
        "name": "size",
        "schema": {"type": "object", "properties": {"big": {"type": "boolean"}}},
    },
}


@pytest.mark.parametrize(
    ("template", "calls"),
    [(HERMES, HERMES_CALLS[6:]), (LLAMA, LLAMA_CALLS)],
    ids=["hermes", "llama"],
)
def test_with_a_schema_an_answer_is_calls_or_matches_the_schema(server, template, calls):
    texts = (calls, '{"big": true}', '{"big": 1}', '{"other": 1}', "It rains.", calls + "{}")
    says(server, '{"big": true}')
    for fields, expected in (
        ({}, (True, True, False, False, False, False)),
        ({"tool_choice": "auto"}, (True, True, False, False, False, False)),
        ({"tool_choice": "required"}, (True, False, False, False, False, False)),
        ({"parallel_tool_calls": False}, (False, True, False, False, False, False)),
        ({"tool_choice": "none"}, (False, True, False, False, False, False)),
    ):
        (choice,) = ask(server, template, response_format=SIZE, **fields).choices
        assert choice.message.content == '{"big": true}', fields
        assert choice.finish_reason == "stop"
        grammar = server.engine.requests[-1].grammar
        assert tuple(accepts(grammar, text) for text in texts) == expected, fields
    says(server, calls)
    (choice,) = ask(server, template, response_format=SIZE).choices
    check_calls(choice.message.tool_calls)
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"


def test_a_form_may_begin_like_a_call_of_the_llama_format(server):
    """The library reads the longest piece of a grammar that fits, and does not go back."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for text in ('{"name": "bob"}', '{"name": "weather-man"}'):
        says(server, text)
        (choice,) = ask(server, LLAMA, response_format=form).choices
        assert accepts(server.engine.requests[-1].grammar, text), text
        assert accepts(server.engine.requests[-1].grammar, LLAMA_CALLS)
        assert choice.message.content == text
        assert choice.message.tool_calls is None


def test_with_any_json_object_an_answer_is_calls_or_an_object(server):
    says(server, "{}")
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert post(server, **fields).status == 200
        grammar = server.engine.requests[-1].grammar
        assert accepts(grammar, '{"x": [1, null]}')
        assert accepts(grammar, HERMES_CALLS[6:])
        assert not accepts(grammar, "[1]")
    assert post(server, structured_outputs={"json": {}}).status == 200
    assert accepts(server.engine.requests[-1].grammar, "[1]")


def test_responses_take_tools_with_a_schema(server):
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    format_ = {"type": "json_schema", "name": "size", "schema": SIZE["json_schema"]["schema"]}
    body = {
        "input": "hi",
        "tools": [tool],
        "text": {"format": format_},
        "chat_template_kwargs": {"chat_template": HERMES},
    }
    one = HERMES_CALLS[6:].partition('\n<tool_call>\n{"name": "time')[0]
    for text, kind in (('{"big": true}', "message"), (one, "function_call")):
        says(server, text)
        answer = server.post("/v1/responses", body)
        assert answer.status == 200, answer.error
        assert [item["type"] for item in answer.json["output"]] == [kind]
        assert accepts(server.engine.requests[-1].grammar, text)
    server.post("/v1/responses", {**body, "tool_choice": "required"})
    assert not accepts(server.engine.requests[-1].grammar, '{"big": true}')


@each_row(
    "fields, param, said",
    [
        ({"tools": [{"type": "retrieval"}]}, "tools", "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "'a b'"),
        ({"tools": [TIME, TIME]}, "tools", "two functions"),
        (
            {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
            "tools",
            "128",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tool_choice": "always"}, "tool_choice", "tool_choice"),
        ({"guided_regex": "a+"}, "tools", "guided_regex"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "foo"}},
                }
            },
            "response_format",
            "Invalid type: foo",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"properties": {"a": {"type": "foo"}}},
                        },
                    }
                ],
            },
            "tools",
            "Invalid type: foo",
        ),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "structured output"),
        (
            {"apply_chat_template_overrides": {"shout": True}},
            "apply_chat_template_overrides",
            "two names",
        ),
    ],
)
def test_wrong_tools_and_messages_are_refused_by_field(server, fields, param, said):
    answer = post(server, **fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert said in answer.error["message"]
    assert "\n" not in answer.error["message"], "it quotes a grammar that nobody wrote"


def test_tools_are_refused_if_the_template_does_not_mention_them(server):
    body = {"messages": MESSAGES, "tools": TOOLS}
    answer = server.post("/v1/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "tools")
    assert "chat template does not mention them" in answer.error["message"]
    answer = post(server, template="{{ tools }}")
    assert "tool_call_parser=hermes or llama3" in answer.error["message"]
    assert server.post("/v1/chat/completions", {**body, "tool_choice": "none"}).status == 200


def test_the_tool_format_follows_the_template_or_the_flag():
    assert tool_format("auto", HERMES) == "hermes"
    assert tool_format("auto", LLAMA) == "llama3"
    assert tool_format("llama3", HERMES) == "llama3"
    with pytest.raises(RequestError):
        tool_format("hermes", "{{ messages }} tools")


def test_reasoning_is_apart_from_the_content(server):
    says(server, "<think>\nthe cat\n</think>\n\non the mat")
    (choice,) = ask(server, THINKING, tools=[]).choices
    assert choice.message.reasoning_content == "the cat"
    assert choice.message.content == "on the mat"
    assert choice.finish_reason == "stop"
    server.engine.largest_step = 1
    content = reasoning = ""
    for chunk in ask(server, THINKING, tools=[], stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
    assert (reasoning, content) == ("the cat", "on the mat")


THOUGHTS = [
    # thoughts, up to the last token of the closing mark; the rest of what the model says
    ("<think>\nthe cat sat</think>", "\n\non the mat"),
    ("<think></think>", ""),
    ("\n <think>naïve élan", ""),
    ("", "the cat<think>sat</think>"),
    ("", ""),
]


@each_row("thoughts, rest", THOUGHTS)
@pytest.mark.parametrize("spelled", [False, True])
def test_reasoning_tokens_are_counted_exactly(server, thoughts, rest, spelled):
    """However the marks are cut into tokens, and the tokens into events. Samples add up."""

    def ids(text):  # a token for each byte, or as the tokenizer encodes
        return [i for c in text for i in ids_of(c)] if spelled else ids_of(text)

    answer = [*ids(thoughts), *ids(rest), EOS_ID]
    server.engine.script = lambda request, index: answer
    closed = thoughts.endswith("</think>")
    expected = 0 if not thoughts else len(ids(thoughts)) if closed else len(answer)
    for n in (1, 3):
        whole = ask(server, THINKING, tools=[], n=n).usage
        assert whole.completion_tokens_details.reasoning_tokens == n * expected
        assert whole.completion_tokens == n * len(answer)
        for largest_step in (1, 3, 100):
            server.engine.largest_step = largest_step
            options = {"include_usage": True, "continuous_usage_stats": True}
            *chunks, last = ask(
                server, THINKING, tools=[], n=n, stream=True, stream_options=options
            )
            counts = [
                chunk.usage.completion_tokens_details.reasoning_tokens for chunk in [*chunks, last]
            ]
            assert counts == sorted(counts)
            assert counts[-1] == n * expected


def test_reasoning_tokens_where_the_prompt_has_begun(server):
    says(server, "the cat</think>on the mat")
    expected = len(ids_of("the cat</think>"))
    usage = ask(server, OPENED, tools=[]).usage
    assert usage.completion_tokens_details.reasoning_tokens == expected
    usage = ask(server, OPENED, tools=[], stop=["</thi"]).usage
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens <= expected
    kwargs = {"enable_thinking": False}
    usage = ask(server, THINKING, tools=[], chat_template_kwargs=kwargs).usage
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_tokens_of_samples_that_came_too_late_count(server):
    lengths = [5, 30, 70]
    server.engine.script = lambda request, index: [
        *ids_of("<think>"),
        *ids_of("x") * lengths[index],
        EOS_ID,
    ]
    for stream in (False, True):
        fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = post(server, THINKING, tools=[], n=3, first_k=1, **fields)
        usage = (answer.events[-1] if stream else answer.json)["usage"]
        assert usage["completion_tokens"] > lengths[0] + 2
        thought = usage["completion_tokens_details"]["reasoning_tokens"]
        assert thought == usage["completion_tokens"]


def test_reasoning_that_the_prompt_begins_or_leaves_out(server):
    says(server, "the cat</think>on the mat")
    (choice,) = ask(server, OPENED, tools=[]).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("the cat", "on the mat")
    says(server, "on the mat")
    kwargs = {"enable_thinking": False}
    (choice,) = ask(server, THINKING, tools=[], chat_template_kwargs=kwargs).choices
    assert choice.message.content == "on the mat"
    assert not hasattr(choice.message, "reasoning_content")
    assert prompt_of(server).endswith("<think>\n\n</think>")


def test_structured_output_starts_with_the_first_token_after_an_open_think_mark(server):
    says(server, '{"a": 1}')
    response_format = {"type": "json_object"}
    (choice,) = ask(server, OPENED, tools=[], response_format=response_format).choices
    assert json.loads(choice.message.content) == {"a": 1}


def test_marks_are_text_without_a_template_that_names_them(server):
    says(server, "<think>a</think><tool_call>b</tool_call>")
    body = {"messages": MESSAGES, "max_tokens": 100}
    (choice,) = server.post("/v1/chat/completions", body).json["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "<think>a</think><tool_call>b</tool_call>",
    }
