"""``/v1/responses``, as the openai client sends and reads it."""

from __future__ import annotations

import asyncio

import msgspec
import pydantic
import pytest
from fake_engine import EOS_ID, TOKENIZER, ids_of, logprob_row
from rows import each_row

from tokasaurus.errors import EngineDead

PATH = "/v1/responses"
BASE = {"input": "the cat", "seed": 1, "max_output_tokens": 12}
LOGPROBS = ["message.output_text.logprobs"]


def say(server, text, *more):
    server.engine.script = lambda request, index: [*ids_of(text), *more]


def test_a_response_as_the_openai_client_reads_it(server):
    say(server, "hello world", EOS_ID)
    answer = server.client().responses.create(
        model="m",
        input="hi",
        instructions="be brief",
        temperature=0.5,
        top_p=0.75,
        max_output_tokens=64,
        metadata={"run": "7"},
        user="somebody",
        store=False,
    )
    assert answer.output_text == "hello world"
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "m")
    assert answer.output[0].role == "assistant"
    assert answer.output[0].status == "completed"
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.75, 64)
    assert answer.instructions == "be brief"
    assert answer.metadata == {"run": "7"}
    assert (answer.error, answer.incomplete_details) == (None, None)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = TOKENIZER.render_chat(messages)
    request = server.engine.requests[0]
    assert request.prompt_ids.tolist() == prompt
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        len(prompt),
        len(ids_of("hello world")) + 1,
    )
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 0


def test_a_response_that_is_cut_off_is_incomplete(server):
    answer = server.client().responses.create(model="m", input="hi", max_output_tokens=3)
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 3


def test_a_response_can_be_part_of_the_next_input(server):
    """As in the client's documentation."""
    say(server, "sat", EOS_ID)
    with server.client() as client:
        first = client.responses.create(model="m", input="the cat", include=LOGPROBS)
        history = [{"role": "user", "content": "the cat"}]
        history += [item.model_dump(exclude_none=True) for item in first.output]
        history.append(
            {"role": "developer", "content": [{"type": "input_text", "text": "on a mat"}]}
        )
        client.responses.create(model="m", input=history)
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "system", "content": "on a mat"},
    ]
    assert server.engine.requests[1].prompt_ids.tolist() == TOKENIZER.render_chat(messages)


ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.mark.parametrize("end", [EOS_ID, None])
@pytest.mark.parametrize("text", ["the cat sat on the mat, naïve élan", ""])
def test_a_streamed_response_is_typed_events_in_order(server, text, end):
    say(server, text, *([] if end is None else [end]))
    last = "response.incomplete" if end is None else "response.completed"
    with server.client() as client:
        whole = client.responses.create(model="m", input="hi", include=LOGPROBS)
        events = list(client.responses.create(model="m", input="hi", stream=True, include=LOGPROBS))
        with client.responses.stream(model="m", input="hi") as stream:
            assert [event.type for event in stream][-1] == last
            if end is not None:
                assert stream.get_final_response().output_text == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        kind for kind in [*ORDER, last] if kind in kinds or "delta" not in kind
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == text
    final = events[-1].response
    assert final.output_text == whole.output_text == text
    assert final.usage == whole.usage
    assert final.status == whole.status
    entries = final.output[0].content[0].logprobs
    assert [e.model_dump() for e in entries] == [
        e.model_dump() for e in whole.output[0].content[0].logprobs
    ]
    assert len(entries) == final.usage.output_tokens
    streamed = [entry.logprob for event in deltas for entry in event.logprobs]
    assert streamed == [entry.logprob for entry in entries]
    ids = {event.item_id for event in deltas} | {final.output[0].id, events[2].item.id}
    assert len(ids) == 1
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}


def test_each_event_of_a_response_is_a_name_and_a_line_of_json(server):
    """There are no comments, and there is no mark at the end."""
    answer = server.post(PATH, {**BASE, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.content.decode().split("\n\n")
    assert end == ""
    for each in events:
        name, data = each.split("\n")
        body = msgspec.json.decode(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"


def test_the_async_openai_client_reads_a_stream(server):
    say(server, "hello", EOS_ID)

    async def ask():
        async with server.async_client() as client:
            stream = await client.responses.create(model="m", input="hi", stream=True)
            return [event async for event in stream]

    assert asyncio.run(ask())[-1].response.output_text == "hello"


def test_logprobs_of_a_response(server):
    say(server, "the cat", EOS_ID)
    answer = server.client().responses.create(
        model="m", input="hi", include=LOGPROBS, top_logprobs=2
    )
    for token_id, entry in zip(
        [*ids_of("the cat"), EOS_ID], answer.output[0].content[0].logprobs, strict=True
    ):
        chosen, top_ids, top = logprob_row(token_id, 2)
        assert (entry.token, entry.logprob) == (TOKENIZER.token_text(token_id), chosen)
        assert [each.logprob for each in entry.top_logprobs] == top
        assert [each.token for each in entry.top_logprobs] == [
            TOKENIZER.token_text(i) for i in top_ids
        ]


class Animal(pydantic.BaseModel):
    name: str
    legs: int


def test_the_openai_client_parses_structured_output(server):
    say(server, '{"name": "cat", "legs": 4}', EOS_ID)
    answer = server.client().responses.parse(model="m", input="hi", text_format=Animal)
    assert answer.output_parsed == Animal(name="cat", legs=4)
    assert answer.text.format.type == "json_schema"
    assert '"legs"' in server.engine.requests[0].grammar


def test_an_error_in_mid_stream_is_a_failed_response(server):
    server.engine.hold_at = 3
    stream = server.client().responses.create(
        model="m", input="hi", stream=True, extra_body={"ignore_eos": True}, max_output_tokens=400
    )
    events = [next(iter(stream))]
    server.call(lambda: server.generations.fail_all(EngineDead("it broke")))
    events += list(stream)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert "it broke" in events[-1].response.error.message
    server.engine._running.clear()


# --- what is refused ---------------------------------------------------------------------------


@each_row(
    "body, param",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "input_image"}]}, "input"),
        ({"input": [{"role": "alien", "content": ""}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"store": 1}, "store"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "left"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
        ({"include": ["file_search_call.resultz"]}, "include"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "text"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_wrong_values_are_refused_by_field(server, body, param):
    for stream in (False, True):
        answer = server.post(PATH, {**BASE, **body, "stream": stream})
        assert answer.status == 400
        assert answer.error["param"] == param
        assert param in answer.error["message"]


def test_errors_of_input_items_list_the_known_types(server):
    for items, said in (
        ([], "input must have at least 1 item, not []"),
        ([{"type": "input_image"}], "input[0] must be of type 'message', 'function_call'"),
    ):
        assert server.post(PATH, {**BASE, "input": items}).error["message"].startswith(said)
