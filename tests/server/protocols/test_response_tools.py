"""Function tools and reasoning in ``/v1/responses``, as the openai client sends and reads them."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import EOS_ID, TOKENIZER, ids_of
from rows import each_row
from test_tools import ARGUMENTS, HERMES, HERMES_CALLS, LLAMA, LLAMA_CALLS, PARAMETERS, accepts

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": PARAMETERS,
    "strict": True,
}
TIME = {"type": "function", "name": "time-of.day", "parameters": None, "strict": None}
TOOLS = [WEATHER, TIME]
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}({{ m.reasoning_content }})"
    "{% endfor %}<think>"
)


def says(server, text, *more):
    server.engine.script = lambda request, index: [*ids_of(text), *(more or (EOS_ID,))]


def fields(template=HERMES, **more):
    kwargs = {"chat_template_kwargs": {"chat_template": template}}
    base = {"model": "m", "input": "hi", "tools": TOOLS, "max_output_tokens": 200}
    return {**base, "extra_body": kwargs, **more}


def ask(server, template=HERMES, **more):
    return server.client().responses.create(**fields(template, **more))


def post(server, template=HERMES, **more):
    body = fields(template, **more)
    extra = body.pop("extra_body")
    return server.post("/v1/responses", {**body, **extra})


def prompt_of(server):
    return TOKENIZER.decode(server.engine.requests[-1].prompt_ids.tolist())


def check_calls(items):
    calls = [item for item in items if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", ARGUMENTS),
        ("time-of.day", "{}"),
    ]
    assert {call.status for call in calls} == {"completed"}
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4


@pytest.mark.parametrize(
    ("template", "text", "kinds"),
    [
        (HERMES, HERMES_CALLS, ["message", "function_call", "function_call"]),
        (LLAMA, LLAMA_CALLS, ["function_call", "function_call"]),
    ],
)
def test_tool_calls_are_items_of_the_output(server, template, text, kinds):
    says(server, text)
    answer = ask(server, template)
    assert [item.type for item in answer.output] == kinds
    assert answer.output_text == ("Wait." if "message" in kinds else "")
    assert answer.status == "completed"
    check_calls(answer.output)
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    assert [tool.name for tool in answer.tools] == ["weather", "time-of.day"]
    assert "<tools>weather Of a city. ['city']time-of.day" in prompt_of(server)


@pytest.mark.parametrize(("template", "text"), [(HERMES, HERMES_CALLS), (LLAMA, LLAMA_CALLS)])
@each_row("largest_step", [1, 3, 100])
def test_a_streamed_response_adds_up_to_the_whole(server, template, text, largest_step):
    says(server, text)
    server.engine.largest_step = largest_step
    events = list(ask(server, template, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    output = events[-1].response.output
    check_calls(output)
    of_item = [event for event in events if hasattr(event, "output_index")]
    assert [event.output_index for event in of_item] == sorted(e.output_index for e in of_item)
    for index, item in enumerate(output):
        mine = [event for event in of_item if event.output_index == index]
        assert mine[0].type == "response.output_item.added"
        assert mine[0].item.status == "in_progress"
        assert mine[-1].type == "response.output_item.done"
        assert mine[0].item.id == item.id
        assert mine[-1].item == item
        assert {event.item_id for event in mine[1:-1]} == {item.id}
        if item.type == "function_call":
            assert (mine[0].item.name, mine[0].item.call_id) == (item.name, item.call_id)
            assert mine[0].item.arguments == ""
            kinds = [event.type for event in mine[1:-1]]
            delta, done = (f"response.function_call_arguments.{end}" for end in ("delta", "done"))
            assert kinds == [delta] * (len(kinds) - 1) + [done]
            assert "".join(event.delta for event in mine[1:-2]) == item.arguments
            assert (mine[-2].arguments, mine[-2].name) == (item.arguments, item.name)
    with server.client().responses.stream(**fields(template)) as stream:
        for _ in stream:
            pass
        check_calls(stream.get_final_response().output)


def test_the_async_openai_client_reads_tool_calls(server):
    says(server, HERMES_CALLS)

    async def run():
        async with server.async_client() as client:
            whole = await client.responses.create(**fields())
            stream = await client.responses.create(**fields(stream=True))
            return whole, [event async for event in stream][-1].response

    for answer in asyncio.run(run()):
        check_calls(answer.output)


def test_calls_and_their_results_are_rendered(server):
    """The output goes back unchanged, followed by the results of its calls."""
    says(server, HERMES_CALLS)
    client = server.client()
    output = client.responses.create(**fields()).output
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"rain {number}"}
        for number, item in enumerate(output[1:])
    ]
    says(server, "It rains.")
    history = [{"role": "user", "content": "hi"}, *output, *results]
    answer = client.responses.create(**fields(input=history))
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text == "It rains."
    prompt = prompt_of(server)
    assert '[assistant]Wait.(weather Paris, "nord")(time-of.day )' in prompt
    calls = [item.call_id for item in output[1:]]
    assert f"[tool]rain 0#{calls[0]}[tool]rain 1#{calls[1]}[assistant]" in prompt


def test_tool_choice_decides_which_calls_are_possible(server):
    says(server, HERMES_CALLS)
    answer = ask(server, tool_choice="none")
    assert answer.output_text == HERMES_CALLS
    assert "weather" not in prompt_of(server)
    answer = ask(server, parallel_tool_calls=False)
    assert [item.type for item in answer.output] == ["message", "function_call"]
    assert answer.parallel_tool_calls is False
    assert server.engine.requests[-1].grammar == ""
    one, _, other = HERMES_CALLS[6:].partition("</tool_call>\n")
    one += "</tool_call>"
    named = {"type": "function", "name": "weather"}
    for more, expected in (
        ({"tool_choice": "required"}, (True, True, True, False)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, (True, False, True, False)),
        ({"tool_choice": named}, (True, False, False, False)),
    ):
        says(server, one)
        answer = ask(server, **more)
        assert [item.type for item in answer.output] == ["function_call"]
        grammar = server.engine.requests[-1].grammar
        texts = (one, HERMES_CALLS[6:], other, "It rains.")
        assert tuple(accepts(grammar, text) for text in texts) == expected
    assert answer.tool_choice.name == "weather"


def test_a_tool_call_that_is_cut_off_is_incomplete(server):
    says(server, HERMES_CALLS.partition(', \\"nord')[0], *ids_of("x" * 300))
    answer = ask(server)
    assert [item.status for item in answer.output] == ["completed", "incomplete"]
    assert answer.status == "incomplete"


def test_reasoning_is_an_item_of_the_output(server):
    says(server, "the cat</think>on the mat")
    with server.client() as client:
        answer = client.responses.create(**fields(THINKING, tools=[]))
        thoughts, message = answer.output
        assert (thoughts.type, message.type) == ("reasoning", "message")
        assert (thoughts.content[0].text, thoughts.summary) == ("the cat", [])
        assert answer.output_text == "on the mat"
        details = answer.usage.output_tokens_details
        assert details.reasoning_tokens == len(ids_of("the cat</think>"))
        server.engine.largest_step = 1
        events = list(client.responses.create(**fields(THINKING, tools=[], stream=True)))
        deltas = [event for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(event.delta for event in deltas) == "the cat"
        (done,) = [event for event in events if event.type == "response.reasoning_text.done"]
        assert done.text == "the cat"
        assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
        assert events[-1].response.usage.output_tokens_details == details
        history = [{"role": "user", "content": "hi"}, *answer.output]
        history.append({"role": "user", "content": "why?"})
        client.responses.create(**fields(THINKING, tools=[], input=history))
    assert "[assistant]on the mat(the cat)[user]why?" in prompt_of(server)


@each_row(
    "more, param, said",
    [
        ({"tools": [{"type": "web_search", "search_context_size": "low"}]}, "tools", "web_search"),
        ({"tools": [{"type": "mcp", "server_url": "x"}]}, "tools", "mcp"),
        ({"tools": [{**TIME, "name": "a b"}]}, "tools", "'a b'"),
        ({"tools": [TIME, TIME]}, "tools", "two functions"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "web_search_preview"),
        ({"structured_outputs": {"regex": "a+"}}, "tools", "structured_outputs"),
        ({"guided_regex": "a"}, "tools", "guided_regex"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "structured output"),
        ({"include": ["message.output_text.logprobs"]}, "include", "calls"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "call_id"),
        ({"input": [{"type": "web_search_call"}]}, "input", "web_search_call"),
        (
            {
                "tool_choice": "required",
                "tools": [{**TIME, "parameters": {"properties": {"a": {"type": "foo"}}}}],
            },
            "tools",
            "Invalid type: foo",
        ),
    ],
)
def test_wrong_tools_and_items_are_refused_by_field(server, more, param, said):
    for stream in (False, True):
        answer = post(server, stream=stream, **more)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert said in answer.error["message"]


def test_tools_are_refused_if_the_template_does_not_mention_them(server):
    answer = server.post("/v1/responses", {"input": "hi", "tools": [WEATHER]})
    assert (answer.status, answer.error["param"]) == (400, "tools")
