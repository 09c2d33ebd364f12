"""Answers of completions and chats, whole and streamed, read with the openai client."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from fake_engine import (
    EOS_ID,
    STOP_LAG,
    TOKENIZER,
    WRAPPED,
    RunningServer,
    ids_of,
    logprob_row,
    random_ids,
    with_config,
)
from rows import each_row

from tokasaurus.server.operations.logprobs import chat_logprobs
from tokasaurus.text.samples import TokenLogprobs

SAID = "hello 😀 naïve\n"


@pytest.fixture
def client(server):
    return server.client()


def says(server, text, *, then=(EOS_ID,)):
    server.engine.script = lambda request, index: [*ids_of(text), *then]


def completion_ids(answer):
    return json.loads(answer.system_fingerprint)["completion_ids"]


def chat(client, content="hi", **fields):
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return client.chat.completions.create(model="m", messages=messages, **fields)


# --- completions -------------------------------------------------------------------------------


def test_a_completion_as_the_openai_client_reads_it(server, client):
    says(server, SAID)
    answer = client.completions.create(model="any/name", prompt="the cat", max_tokens=40)
    assert answer.object == "text_completion"
    assert answer.model == "any/name"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (SAID, "stop", None)
    num_prompt, num_said = len(TOKENIZER.encode("the cat")), len(ids_of(SAID)) + 1
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_said)
    assert usage.total_tokens == num_prompt + num_said
    assert completion_ids(answer) == [[*ids_of(SAID), EOS_ID]]


def test_default_limits_and_temperatures_of_completions_and_chats(server, client):
    client.completions.create(model="m", prompt="the cat")
    chat(client)
    completion, conversation = server.engine.requests
    assert completion.max_tokens == 16
    assert conversation.max_tokens == 512 - len(conversation.prompt_ids)
    assert (completion.sampling.temperature, conversation.sampling.temperature) == (1.0, 0.7)


def test_defaults_of_the_generation_config_come_first():
    with RunningServer(
        with_config(sampling_defaults={"temperature": 0.3, "top_k": 7})
    ).running() as server:
        client = server.client()
        client.completions.create(model="m", prompt="the cat")
        chat(client, max_tokens=3)
        chat(client, max_tokens=3, temperature=0)
    temperatures = [request.sampling.temperature for request in server.engine.requests]
    assert temperatures == [0.3, 0.3, 0]
    assert {request.sampling.top_k for request in server.engine.requests} == {7}


def test_the_default_limit_gives_way_to_the_context(server, client):
    prompt = [10] * 505
    assert client.completions.create(model="m", prompt=prompt).usage.completion_tokens == 7


@each_row(
    "prompt", ["the cat", ["the cat", "a"], ids_of("the cat"), [ids_of("the cat"), ids_of("a")]]
)
@pytest.mark.parametrize("n", [1, 3])
def test_choices_are_ordered_by_prompt_and_sample(server, client, prompt, n):
    server.engine.received.clear()
    server.engine.num_cached_tokens = 1
    answer = client.completions.create(model="m", prompt=prompt, n=n, max_tokens=4, seed=1)
    sent = [request.prompt_ids.tolist() for request in server.engine.requests]
    many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    assert sent == [TOKENIZER.encode(p) if isinstance(p, str) else p for p in many]
    assert [choice.index for choice in answer.choices] == list(range(len(many) * n))
    expected = [random_ids(request, k) for request in server.engine.requests for k in range(n)]
    assert completion_ids(answer) == expected
    assert [choice.text for choice in answer.choices] == [TOKENIZER.decode(i) for i in expected]
    assert answer.usage.prompt_tokens == sum(map(len, sent))
    assert answer.usage.completion_tokens == 4 * n * len(many)
    assert answer.usage.prompt_tokens_details.cached_tokens == len(many)


def test_an_empty_prompt_is_the_beginning_of_a_text(server, client):
    client.completions.create(model="m", prompt="")
    assert server.engine.requests[0].prompt_ids.tolist() == [WRAPPED.bos_token_id]


def test_stop_strings_end_a_completion(server, client):
    says(server, "one two three", then=ids_of("x") * 400)
    request = {"model": "m", "prompt": "the cat", "max_tokens": 400}
    answer = client.completions.create(**request, stop=["three", "o t"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one tw", "stop")
    assert client.completions.create(**request, stop=" tw").choices[0].text == "one"
    says(server, "one<|end|>two", then=ids_of("x") * 400)
    answer = client.completions.create(**request, stop=["<|end|>"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one", "stop")


def test_echo_puts_the_prompt_before_the_text(server, client):
    says(server, " sat")
    for prompt in ("the cat", ids_of("the cat"), TOKENIZER.encode("the cat")):
        answer = client.completions.create(model="m", prompt=prompt, echo=True, n=2)
        assert [choice.text for choice in answer.choices] == ["the cat sat"] * 2
        chunks = client.completions.create(model="m", prompt=prompt, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "the cat sat"


@each_row("number", [0, 1, 4])
def test_logprobs_of_a_completion(server, client, number):
    says(server, SAID)
    request = {"model": "m", "prompt": "the cat", "logprobs": number, "max_tokens": 40}
    choice = client.completions.create(**request).choices[0]
    check_completion_logprobs(choice.logprobs, [*ids_of(SAID), EOS_ID], number, choice.text)
    pieces = [c.choices[0].logprobs for c in client.completions.create(**request, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [each for piece in pieces for each in getattr(piece, name)]
        assert joined == getattr(choice.logprobs, name)


def check_completion_logprobs(logprobs, ids, number, text):
    assert logprobs.tokens == [TOKENIZER.token_text(i) for i in ids]
    for token_id, token, chosen, top, offset in zip(
        ids,
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
        strict=True,
    ):
        one, best, values = logprob_row(token_id, number)
        assert chosen == one
        assert top[token] == chosen
        assert {TOKENIZER.token_text(i) for i in [*best, token_id]} == set(top)
        assert max(top.values()) == (values[0] if number else chosen)
        if token.isascii() and not token.startswith(("bytes:", "</")):
            assert text[offset:].startswith(token)


def test_echo_alone_has_the_prompt_and_its_logprobs(server, client):
    """``max_tokens=0``, as programs ask for the logprobs of a text."""
    server.engine.script = lambda request, index: [EOS_ID]
    prompts = ["the cat", "a mat"]
    body = {"prompt": prompts, "echo": True, "max_tokens": 0, "logprobs": 2, "n": 2}
    more = {"return_weights_versions": True}
    answer = server.post("/v1/completions", {**body, **more}).json
    plain = server.post("/v1/completions", {**body, "max_tokens": 1}).json
    assert [choice["text"] for choice in answer["choices"]] == [p for p in prompts for _ in "ab"]
    for choice, longer in zip(answer["choices"], plain["choices"], strict=True):
        num_tokens = len(TOKENIZER.encode(choice["text"]))
        assert choice["finish_reason"] == "length"
        assert choice["weights_versions"] == []
        for name, values in choice["logprobs"].items():
            assert values == longer["logprobs"][name][:num_tokens], name
            assert len(values) == num_tokens
    num_prompt_tokens = sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == num_prompt_tokens
    assert json.loads(answer["system_fingerprint"]) == {"completion_ids": [[]] * 4}
    chunks = list(
        client.completions.create(
            model="m", **body, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = {chunk.choices[0].index: chunk.choices[0].text for chunk in chunks if chunk.choices}
    assert [texts[index] for index in range(4)] == [p for p in prompts for _ in "ab"]
    assert chunks[-1].usage.completion_tokens == 0


def test_echo_alone_needs_echo(server):
    for fields, param in (
        ({}, "max_tokens"),
        ({"echo": False}, "max_tokens"),
        ({"echo": True, "min_tokens": 1}, "min_tokens"),
        ({"echo": True, "logprobs_in_fingerprint": True}, "logprobs_in_fingerprint"),
    ):
        body = {"prompt": "a", "max_tokens": 0, **fields}
        answer = server.post("/v1/completions", body)
        assert (answer.status, answer.error["param"]) == (400, param)


def test_echo_with_logprobs(server, client):
    says(server, " sat")
    prompt = TOKENIZER.encode("the cat")
    request = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 2, "n": 2}
    for choice in client.completions.create(**request).choices:
        logprobs = choice.logprobs
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        ids = [*prompt, *ids_of(" sat"), EOS_ID]
        assert logprobs.tokens == [TOKENIZER.token_text(i) for i in ids]
        assert logprobs.token_logprobs[1:] == [logprob_row(i, 2)[0] for i in ids[1:]]
        assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(ids)
    chunks = [c.choices[0] for c in client.completions.create(**request, stream=True)]
    for index in (0, 1):
        pieces = [chunk.logprobs.tokens for chunk in chunks if chunk.index == index]
        assert [token for piece in pieces for token in piece] == logprobs.tokens


def test_prompt_logprobs_of_completions_and_chats(server):
    """As in vLLM: in each choice of a completion, and once beside the choices of a chat."""
    prompt = [70, 71, 72, 73, 75]
    ids = dict(enumerate(prompt))
    for number in (0, 3):
        body = {"prompt": prompt, "n": 2, "prompt_logprobs": number, "max_tokens": 3}
        for choice in server.post("/v1/completions", body).json["choices"]:
            check_prompt_logprobs(choice["prompt_logprobs"], ids, number)
            assert choice["logprobs"] is None
        chat_body = {"ids": prompt, "prompt_logprobs": number, "max_tokens": 3, "n": 2}
        answer = server.post("/v1/chat/completions", chat_body).json
        check_prompt_logprobs(answer["prompt_logprobs"], ids, number)
    # With echo, each is as wide as it was asked to be.
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "prompt_logprobs": 4, "max_tokens": 3}
    for wider, narrower in ((4, 1), (1, 4)):
        body |= {"prompt_logprobs": wider, "logprobs": narrower}
        (choice,) = server.post("/v1/completions", body).json["choices"]
        check_prompt_logprobs(choice["prompt_logprobs"], ids, wider)
        alone = {**body, "prompt_logprobs": None}
        (plain,) = server.post("/v1/completions", {**alone, "seed": 1}).json["choices"]
        assert plain["logprobs"]["top_logprobs"][:5] == choice["logprobs"]["top_logprobs"][:5]
        assert "prompt_logprobs" not in plain
    for stream in (True, False):
        body = {"prompt": prompt, "prompt_logprobs": 21 - stream, "stream": stream}
        assert server.post("/v1/completions", body).error["param"] == "prompt_logprobs"


def check_prompt_logprobs(written, ids, number):
    assert written[0] is None
    assert len(written) == len(ids)
    for position, entries in enumerate(written[1:], 1):
        chosen, best, values = logprob_row(ids[position], number)
        expected = {
            str(i): (v, rank) for rank, (i, v) in enumerate(zip(best, values, strict=True), 1)
        }
        expected[str(ids[position])] = (chosen, 1 + (ids[position] % 3 == 0))
        got = {key: (entry["logprob"], entry["rank"]) for key, entry in entries.items()}
        assert got == expected
        for key, entry in entries.items():
            assert entry["decoded_token"] == TOKENIZER.token_text(int(key))


def test_minus_infinity_is_written_as_a_number():
    cut_off = TokenLogprobs(
        np.array([-1.5], np.float32),
        np.array([[5, 6]], np.int32),
        np.array([[-1.5, -np.inf]], np.float32),
    )
    top = chat_logprobs(TOKENIZER, [5], cut_off)["content"][0]["top_logprobs"]
    assert [each["logprob"] for each in top] == [-1.5, -9999.0]


@pytest.mark.parametrize("stream", [False, True])
def test_packed_logprobs(server, client, stream):
    says(server, SAID)
    request = {"model": "m", "prompt": "the cat", "n": 2, "max_tokens": 40, "stream": stream}
    ids = [*ids_of(SAID), EOS_ID]
    for number in (None, 0, 3):
        body = {**request, "logprobs": number, "extra_body": {"logprobs_in_fingerprint": True}}
        answer = client.completions.create(**body)
        answers = list(answer) if stream else [answer]
        packs = [[], []]
        for each in answers:
            assert all(choice.logprobs is None for choice in each.choices)
            fields = json.loads(each.system_fingerprint)
            for row, choice in enumerate(each.choices):
                packs[choice.index].append({k: v and v[row] for k, v in fields.items()})
        for pack in packs:
            assert [i for piece in pack for i in piece["completion_ids"]] == ids
            chosen = unpack([piece["packed_chosen_logprobs"] for piece in pack], "<f4")
            assert chosen.tolist() == [logprob_row(i, 1)[0] for i in ids]
            if not number:
                assert pack[0]["packed_topk_indices"] is None
                continue
            top = unpack([piece["packed_topk_indices"] for piece in pack], "<i4").reshape(-1, 3)
            assert top.tolist() == [logprob_row(i, 3)[1] for i in ids]
            values = unpack([piece["packed_topk_logprobs"] for piece in pack], "<f4")
            assert values.reshape(-1, 3).tolist() == [logprob_row(i, 3)[2] for i in ids]


def unpack(strings, dtype):
    return np.frombuffer(b"".join(base64.b64decode(string) for string in strings), dtype)


# --- chat --------------------------------------------------------------------------------------


def test_a_chat_completion_as_the_openai_client_reads_it(server, client):
    says(server, SAID)
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", SAID)
    assert answer.choices[0].finish_reason == "stop"
    assert completion_ids(answer) == [[*ids_of(SAID), EOS_ID]]
    expected = TOKENIZER.render_chat([{"role": "user", "content": "hi"}])
    assert server.engine.requests[0].prompt_ids.tolist() == expected


def test_content_in_text_parts_is_joined(server, client):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    chat(client, [{"role": "user", "content": parts}], max_tokens=2)
    chat(client, "hi", max_tokens=2)
    first, second = (request.prompt_ids.tolist() for request in server.engine.requests)
    assert first == second


def test_the_developer_role_is_rendered_as_system(server, client):
    for role in ("developer", "system"):
        chat(client, [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}])
    first, second = (request.prompt_ids.tolist() for request in server.engine.requests)
    assert first == second


def test_chat_continues_the_assistant(server, client):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hel"}]
    chat(client, messages, max_tokens=2)
    prompt = WRAPPED.decode(server.engine.requests[0].prompt_ids)
    assert prompt.endswith("<|assistant|>hel")


def test_an_answer_can_be_sent_back_unchanged(server, client):
    says(server, "fine")
    answer = chat(client).choices[0].message
    history = [{"role": "user", "content": "hi"}, answer, {"role": "user", "content": "so?"}]
    assert chat(client, history).choices[0].message.content == "fine"
    # Clients may copy every empty field, too.
    history[1] = {**answer.model_dump(), "tool_calls": [], "refusal": None}
    assert chat(client, history).choices[0].message.content == "fine"


def test_a_streamed_chat(server, client):
    says(server, SAID * 3)
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert (last.choices, last.usage.completion_tokens) == ([], 2 * (len(ids_of(SAID * 3)) + 1))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        deltas = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert [delta.delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.delta.content or "" for delta in deltas) == SAID * 3
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
        assert deltas[-1].finish_reason == "stop"
    ids = [completion_ids(c)[0] for c in chunks if c.choices[0].index == 1]
    assert [i for piece in ids for i in piece] == [*ids_of(SAID * 3), EOS_ID]


def test_logprobs_of_a_chat(server, client):
    says(server, SAID)
    ids = [*ids_of(SAID), EOS_ID]
    for number in (None, 0, 3):
        answer = chat(client, logprobs=True, top_logprobs=number)
        content = answer.choices[0].logprobs.content
        pieces = [
            c.choices[0].logprobs.content
            for c in chat(client, logprobs=True, top_logprobs=number, stream=True)
        ]
        assert [entry for piece in pieces for entry in piece] == content
        assert bytes(b for entry in content for b in entry.bytes) == SAID.encode()
        assert (content[-1].token, content[-1].bytes) == ("</s>", [])
        for token_id, entry in zip(ids, content, strict=True):
            chosen, best, values = logprob_row(token_id, number or 0)
            assert (entry.token, entry.logprob) == (TOKENIZER.token_text(token_id), chosen)
            top = [(each.token, each.logprob) for each in entry.top_logprobs]
            assert top == [(TOKENIZER.token_text(i), v) for i, v in zip(best, values, strict=True)]


def test_ids_may_replace_the_messages_of_a_chat(server, client):
    """The prompt is the one that the messages make, and the fingerprint contains it."""
    says(server, SAID)
    ids = TOKENIZER.render_chat([{"role": "user", "content": "hi"}])
    extra = {"ids": ids, "messages": None}
    request = {"model": "m", "messages": [], "extra_body": extra}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == SAID
    assert server.engine.requests[0].prompt_ids.tolist() == ids
    assert json.loads(answer.system_fingerprint)["input_ids"] == [ids]
    first, *rest = client.chat.completions.create(**request, stream=True)
    assert json.loads(first.system_fingerprint)["input_ids"] == [ids]
    assert all("input_ids" not in chunk.system_fingerprint for chunk in rest)
    assert "input_ids" not in chat(client).system_fingerprint


def test_metadata_comes_back(server, client):
    says(server, SAID)
    pairs = {"run": "7", "": "x" * 512}
    assert chat(client, metadata=pairs).metadata == pairs
    assert "metadata" not in chat(client).model_dump(exclude_unset=True)


# --- first_k -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, "END"])
def test_first_k_takes_the_samples_that_end_first(server, client, stop):
    """For each of two prompts. Choices keep their index, and every generated token is counted."""
    lengths = [200, 5, 300, 20, 250]
    end = [EOS_ID] if stop is None else ids_of(stop) + ids_of("y") * 100
    server.engine.script = lambda request, index: [*ids_of("x") * lengths[index], *end]
    before = server.engine.num_sent_tokens
    request = {"model": "m", "prompt": ["a", "b"], "n": 5, "max_tokens": 450, "stop": stop}
    answer = client.completions.create(**request, extra_body={"first_k": 2})
    assert [choice.index for choice in answer.choices] == [1, 3, 6, 8]
    assert [choice.text for choice in answer.choices] == ["x" * 5, "x" * 20] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    ids = completion_ids(answer)
    num_beyond = server.engine.num_sent_tokens - before - answer.usage.completion_tokens
    assert sum(map(len, ids)) < answer.usage.completion_tokens
    if stop is None:
        assert num_beyond == 0
    else:
        assert 0 <= num_beyond <= 4 * STOP_LAG  # tokens of four samples after their stop strings
    server.wait_idle()
    assert not server.engine.aborted  # the manager stops the others by itself


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2, "echo": True}])
def test_first_k_in_a_stream(server, client, fields):
    """Choices that are cancelled end with "abort"."""
    lengths = [200, 5, 300, 20, 250]
    server.engine.script = lambda request, index: [*ids_of("x") * lengths[index], EOS_ID]
    before = server.engine.num_sent_tokens
    *chunks, last = client.completions.create(
        model="m",
        prompt="a",
        n=5,
        max_tokens=400,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"first_k": 2},
        **fields,
    )
    reasons = {index: [] for index in range(5)}
    texts = [""] * 5
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not reasons[choice.index], "a choice goes on after its end"
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            reasons[choice.index].append(choice.finish_reason)
    assert [reasons[index] for index in range(5)] == [
        ["abort"],
        ["stop"],
        ["abort"],
        ["stop"],
        ["abort"],
    ]
    assert [texts[1].count("x"), texts[3].count("x")] == [5, 20]
    num_streamed = sum(len(completion_ids(chunk)[0]) for chunk in chunks)
    assert last.usage.completion_tokens == num_streamed == server.engine.num_sent_tokens - before


def test_first_k_in_chat(server, client):
    lengths = [200, 5, 300]
    server.engine.script = lambda request, index: [*ids_of("x") * lengths[index], EOS_ID]
    (choice,) = chat(client, n=3, extra_body={"first_k": 1}).choices
    assert (choice.index, choice.message.content) == (1, "x" * 5)
    chunks = chat(client, n=3, stream=True, extra_body={"first_k": 1})
    ends = [c.choices[0] for c in chunks if c.choices[0].finish_reason]
    assert {end.index: end.finish_reason for end in ends} == {0: "abort", 1: "stop", 2: "abort"}


# --- streams -----------------------------------------------------------------------------------


@each_row("seed", range(6))
@pytest.mark.parametrize("stop", [None, ["a", "the"]])
def test_a_stream_says_what_the_whole_answer_says(server, client, seed, stop):
    server.engine.largest_step = 1 + 4 * (seed % 2)
    request = {
        "model": "m",
        "prompt": ["the", "cat"],
        "n": 3,
        "seed": seed,
        "max_tokens": 40,
        "stop": stop,
    }
    whole = client.completions.create(**request)
    texts, ids, reasons = [""] * 6, [[] for _ in range(6)], [None] * 6
    for chunk in client.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        assert reasons[choice.index] is None
        assert chunk.usage is None
        texts[choice.index] += choice.text
        ids[choice.index] += completion_ids(chunk)[0]
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ids == completion_ids(whole)
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_usage_in_streams(server):
    body = {"prompt": "the cat", "max_tokens": 30, "stream": True, "seed": 1}
    plain = server.post("/v1/completions", body).events
    assert all(event["choices"] and "usage" not in event for event in plain)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = server.post("/v1/completions", {**body, "stream_options": options}).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 30
    assert last["choices"] == []
    assert last["usage"] == events[-1]["usage"]


def test_an_answer_rendered_in_a_thread_is_complete(server, client):
    """A thousand samples are large enough for that."""
    answer = client.completions.create(model="m", prompt="the", n=1000, max_tokens=20, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(1000))
    ids = [random_ids(server.engine.requests[0], index) for index in range(1000)]
    assert completion_ids(answer) == ids
    assert answer.choices[-1].text == TOKENIZER.decode(ids[-1])


def test_a_long_prompt_is_tokenized_in_a_thread(server, client):
    with pytest.raises(Exception, match="512"):
        client.completions.create(model="m", prompt="the cat " * 5000)
    assert chat(client, "x" * 300, max_tokens=1).usage.prompt_tokens > 300
