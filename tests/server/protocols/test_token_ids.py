"""``return_token_ids``: the ids of prompts and answers, as vLLM's clients ask for them."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from fake_engine import EOS_ID, TOKENIZER, ids_of, random_ids
from rows import check_each

from tokasaurus.server.operations.token_ids import TokenIds

USER = {"role": "user", "content": "the cat"}
ASKED = {"return_token_ids": True, "seed": 1, "max_tokens": 12}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = {
    COMPLETION: {**ASKED, "prompt": ["the cat", "on a mat"], "n": 3},
    CHAT: {**ASKED, "messages": [USER], "n": 3},
}


def fingerprint_ids(body):
    return json.loads(body["system_fingerprint"])["completion_ids"]


def whole_ids(server, path, body):
    """The ids of each prompt and choice of a whole answer, by index."""
    answer = server.post(path, body).json
    assert [choice["token_ids"] for choice in answer["choices"]] == fingerprint_ids(answer)
    return {
        choice["index"]: (
            (choice if path == COMPLETION else answer)["prompt_token_ids"],
            choice["token_ids"],
        )
        for choice in answer["choices"]
    }


def streamed_ids(server, path, body):
    """The same of a stream, whose prompts come once for each choice, in its first chunk."""
    prompts, ids = {}, defaultdict(list)
    for event in server.post(path, {**body, "stream": True}).events:
        (choice,) = event["choices"]
        prompt = (choice if path == COMPLETION else event)["prompt_token_ids"]
        assert (prompt is None) == (choice["index"] in prompts)
        if prompt is not None:
            prompts[choice["index"]] = prompt
        assert [choice["token_ids"]] == fingerprint_ids(event)
        ids[choice["index"]] += choice["token_ids"]
    return {index: (prompts[index], ids[index]) for index in ids}


@pytest.mark.parametrize("read", [whole_ids, streamed_ids])
def test_ids_are_what_the_engine_got_and_drew(server, read):
    def check(path):
        server.engine.received.clear()
        found = read(server, path, BODIES[path])
        requests = server.engine.requests
        expected = [
            (request.prompt_ids.tolist(), random_ids(request, sample))
            for request in requests
            for sample in range(3)
        ]
        assert [found[index] for index in sorted(found)] == expected
        assert len(expected) == (6 if path == COMPLETION else 3)

    check_each(BODIES, check)


def test_without_the_field_an_answer_has_no_ids(server):
    """The answer with ids is the answer without, and these fields."""

    def names(value):
        if isinstance(value, list):
            return [each for item in value for each in names(item)]
        if not isinstance(value, dict):
            return []
        return [*value, *(each for item in value.values() for each in names(item))]

    def check(path):
        for stream in (False, True):
            body = {**BODIES[path], "stream": stream}
            answers = []
            for wanted in (True, False, None):
                answer = server.post(path, {**body, "return_token_ids": wanted})
                answers.append(names(answer.events[0] if stream else answer.json))
            with_ids, *others = answers
            added = {"token_ids", "prompt_token_ids"}
            assert added <= set(with_ids)
            for each in others:
                assert each == [name for name in with_ids if name not in added]

    check_each(BODIES, check)


@pytest.mark.parametrize("read", [whole_ids, streamed_ids])
def test_ids_reach_to_the_token_that_completes_a_stop_string(server, read):
    """The text is cut before the stop string; the ids are those that were drawn up to its end."""
    script = ids_of("one two three")
    server.engine.script = lambda request, index: [*script, *ids_of("x") * 400]
    body = {"prompt": "a", "max_tokens": 400, "stop": " th", "return_token_ids": True}
    _, ids = read(server, COMPLETION, body)[0]
    assert ids == script[: len(ids)]
    assert TOKENIZER.decode(ids[:-1]).find(" th") == -1
    assert TOKENIZER.decode(ids).startswith("one two th")


@pytest.mark.parametrize("read", [whole_ids, streamed_ids])
def test_ids_of_tokens_without_text_are_returned(server, read):
    """Those of the end, of half a character, and of ``stop_token_ids``."""
    said = ids_of("hello 😀")
    for script, more in (
        ([*said, EOS_ID], {}),
        ([*said[:-1], EOS_ID], {}),
        ([*said, *ids_of("x")], {"stop_token_ids": ids_of("x")}),
    ):
        server.engine.script = lambda request, index, ids=script: ids
        body = {"prompt": "a", "max_tokens": 40, "return_token_ids": True, **more}
        assert read(server, COMPLETION, body)[0][1] == script


@pytest.mark.parametrize("read", [whole_ids, streamed_ids])
def test_an_echo_has_the_prompt_in_its_text_and_not_in_the_generated_ids(server, read):
    server.engine.script = lambda request, index: [*ids_of(" sat"), EOS_ID]
    prompt = TOKENIZER.encode("the cat")
    for max_tokens, ids in ((40, [*ids_of(" sat"), EOS_ID]), (0, [])):
        body = {"prompt": "the cat", "echo": True, "max_tokens": max_tokens}
        found = read(server, COMPLETION, {**body, "return_token_ids": True})
        assert found == {0: (prompt, ids)}


def test_with_first_k_each_choice_has_its_own_ids(server):
    """A stream also has those of choices that end before they are complete."""
    scripts = [[*ids_of("abc" * (3 - index)), EOS_ID] for index in range(3)]
    server.engine.script = lambda request, index: scripts[index]
    body = {"prompt": "a", "n": 3, "first_k": 1, "max_tokens": 40, "return_token_ids": True}
    prompt = TOKENIZER.encode("a")
    ((index, found),) = whole_ids(server, COMPLETION, body).items()
    assert found == (prompt, scripts[index])
    for index, (began, ids) in streamed_ids(server, COMPLETION, body).items():
        assert (began, ids) == (prompt, scripts[index][: len(ids)])


def test_a_chat_by_ids_and_one_with_calls_have_the_ids_of_everything(server):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    server.engine.script = lambda request, index: [*ids_of(call), EOS_ID]
    template = "{{ messages }}{{ tools }}<tool_call>"
    for body in (
        {"ids": ids_of("hello")},
        {
            "messages": [USER],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"chat_template": template},
        },
    ):
        for read in (whole_ids, streamed_ids):
            server.engine.received.clear()
            found = read(server, CHAT, {**body, "return_token_ids": True, "max_tokens": 100})
            prompt = server.engine.requests[0].prompt_ids.tolist()
            assert found == {0: (prompt, [*ids_of(call), EOS_ID])}


def test_long_prompts_are_written_apart_from_the_event_loop():
    """Their size counts once for each sample, and only where the ids are asked for."""

    class Long:
        num_prompt_tokens = 30_000

        def __init__(self, num_samples):
            self.samples = [None] * num_samples

    assert not TokenIds(None).take_long([Long(2)])
    assert not TokenIds(True).take_long([Long(1)])
    assert TokenIds(True).take_long([Long(2)])
    assert TokenIds(True).take_long([Long(1), Long(1)])


def test_routes_that_have_no_place_for_ids_say_where_they_are(server):
    for path, body, said in (
        ("/v1/responses", {"input": "the cat"}, "ask /v1/chat/completions"),
        ("/generate", {"prompt": "the cat"}, "always in output_ids and prompt_ids"),
        ("/generate", {"text": "the cat"}, "output_ids has those of an answer"),
        ("/v1/embeddings", {"input": "the cat"}, "/tokenize tells the ids of a text"),
    ):
        answer = server.post(path, {**body, "return_token_ids": True})
        assert (answer.status, answer.error["param"]) == (400, "return_token_ids")
        assert said in answer.error["message"]
        assert server.post(path, {**body, "return_token_ids": False}).status == 200
    answer = server.post(CHAT, {"messages": [USER], "return_prompt_token_ids": True})
    assert "return_token_ids returns them" in answer.error["message"]
