"""``POST /generate`` in the engine's own shape and in SGLang's."""

from __future__ import annotations

import functools
import itertools
import json
import operator

import numpy as np
import pytest
from fake_engine import CONFIG, EOS_ID, TOKENIZER, ids_of, logprob_row
from rows import each_row

PATH = "/generate"
LOWEST_TOP = 2

NATIVE = {"prompt": "the cat", "seed": 1, "max_tokens": 12}
SGLANG = {
    "text": "the cat",
    "sampling_params": {"max_new_tokens": 12, "sampling_seed": 1},
}


def _without(sent, *names):
    fields = {each: getattr(sent, each) for each in sent.__struct_fields__ if each not in names}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


# --- the engine's own shape --------------------------------------------------------------------


def test_a_native_request_is_answered_like_the_same_chat(server):
    """As in the setup guide's client: the answer is in both ``text`` and ``output``."""
    server.engine.script = lambda request, index: [*ids_of("hello world"), EOS_ID]
    body = {"model": "m", "system": "be brief", "prompt": "hi", "temperature": 0.0}
    answer = server.post(PATH, {**body, "max_tokens": 64, "stop": ["FEEDBACK"]}).json
    assert answer["text"] == answer["output"] == "hello world"
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == "m"
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    chat = server.post(
        "/v1/chat/completions",
        {"messages": messages, "temperature": 0.0, "max_tokens": 64, "stop": ["FEEDBACK"]},
    ).json
    assert chat["choices"][0]["message"]["content"] == answer["text"]
    assert chat["usage"] == answer["usage"]
    one, other = (_without(each, "request_id", "name") for each in server.engine.requests)
    assert {**one, "seed": 0} == {**other, "seed": 0}


def test_an_empty_answer_is_in_both_text_and_output(server):
    server.engine.script = lambda request, index: [EOS_ID]
    answer = server.post(PATH, {"prompt": "hi", "system": ""}).json
    assert answer["text"] == answer["output"] == ""
    ids = server.engine.requests[0].prompt_ids.tolist()
    assert TOKENIZER.token_text(ids[1]) == "<|system|>"  # an empty message is a message
    assert answer["output_ids"] == [EOS_ID]


def test_ids_in_and_out_with_logprobs(server):
    ids = ids_of("the cat sat")
    body = {"prompt": ids, "logprobs": LOWEST_TOP, "prompt_logprobs": 1, "max_tokens": 5}
    answer = server.post(PATH, body).json
    assert answer["prompt_ids"] == ids
    assert len(answer["output_ids"]) == answer["usage"]["completion_tokens"]
    for token, chosen, top_ids, top in zip(
        answer["output_ids"], *answer["logprobs"].values(), strict=True
    ):
        assert (chosen, top_ids, top) == logprob_row(token, LOWEST_TOP)
    prompt = answer["prompt_logprobs"]
    assert [column[0] for column in prompt.values()] == [None] * 3
    assert prompt["token_logprobs"][1:] == [logprob_row(token, 1)[0] for token in ids[1:]]


def test_a_native_stream_adds_up_to_the_whole_answer(server):
    body = {**NATIVE, "n": 3, "logprobs": 1, "prompt_logprobs": 2}
    whole = server.post(PATH, body).json
    assert [sample["index"] for sample in whole["samples"]] == [0, 1, 2]
    assert whole["text"] == whole["samples"][0]["text"]
    events = server.post(PATH, {**body, "stream": True}).events
    assert events[0]["prompt_ids"] == whole["prompt_ids"]
    assert events[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert {"prompt_ids", "prompt_logprobs"}.isdisjoint(events[1])
    for sample in whole["samples"]:
        pieces = [event for event in events if event["index"] == sample["index"]]
        assert "".join(piece["text"] for piece in pieces) == sample["text"]
        assert (
            functools.reduce(operator.iadd, (piece["output_ids"] for piece in pieces), [])
            == sample["output_ids"]
        )
        assert pieces[-1]["finish_reason"] == sample["finish_reason"]
        chosen = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        assert (
            functools.reduce(operator.iadd, (each["token_logprobs"] for each in chosen), [])
            == (sample["logprobs"]["token_logprobs"])
        )
    assert events[-1]["usage"] == whole["usage"]


@each_row(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": "a", "text": "b"}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1], "system": "s"}, "system"),
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "sampling_params": {}}, "sampling_params"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ],
)
def test_wrong_native_requests_are_refused_by_field(server, body, param):
    answer = server.post(PATH, {"max_tokens": 2, **body})
    assert answer.status == 400
    assert answer.error["param"] == param


def test_an_empty_prompt_is_an_empty_message(server):
    assert server.post(PATH, {"prompt": "", "max_tokens": 2}).status == 200


# --- SGLang's shape ----------------------------------------------------------------------------


@each_row(
    "text, stop, more, matched",
    [
        ("the cat sat on", ["mat", "sat"], {}, "sat"),
        ("the cat sat on the mat", ["t", "cat", "at"], {"min_new_tokens": 5}, "at"),
        ("hi élan", ["zz", "él"], {}, "él"),
        ("the cat<|end|>sat", ["zz", "t<|end|>s"], {}, "t<|end|>s"),
        ("the cat", ["zz"], {}, EOS_ID),
        ("the cat", [], {"stop_token_ids": ids_of("the cat")[-1:]}, ids_of("the cat")[-1]),
    ],
)
def test_sglangs_finish_reason_tells_what_matched(server, text, stop, more, matched):
    ids = [*ids_of(text), EOS_ID]
    server.engine.script = lambda request, index: ids
    params = {"max_new_tokens": 40, "stop": stop, **more}
    answer = server.post(PATH, {"text": "a", "sampling_params": params}).json
    body = {"text": "a", "sampling_params": params, "stream": True}
    for each in (answer, server.post(PATH, body).events[-1]):
        assert each["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}


def test_logprobs_of_sglang(server):
    ids = ids_of("the cat sat on")
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 4, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    for start in (-1, 0, 2, len(ids)):
        answer = server.post(PATH, {**body, "logprob_start_len": start}).json
        info = answer["meta_info"]
        assert [entry[1] for entry in info["output_token_logprobs"]] == answer["output_ids"]
        for (logprob, token, text), top in zip(
            info["output_token_logprobs"], info["output_top_logprobs"], strict=True
        ):
            chosen, top_ids, values = logprob_row(token, 2)
            assert (logprob, text) == (chosen, TOKENIZER.token_text(token))
            assert [(entry[1], entry[0]) for entry in top] == list(
                zip(top_ids, values, strict=True)
            )
        told = info["input_token_logprobs"]
        assert [entry[1] for entry in told] == (ids[start:] if start >= 0 else [])
        assert len(info["input_top_logprobs"]) == len(told)
        for position, entry in enumerate(told, start):
            expected = None if position == 0 else logprob_row(entry[1], 2)[0]
            assert entry[0] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_lists_of_prompts_have_settings_of_their_own(server, stream):
    """Each prompt may have several samples; the index of a streamed event names its sample."""
    body = {
        "text": ["the cat", "a"],
        "sampling_params": [
            {"n": 2, "max_new_tokens": 4, "sampling_seed": 1, "ignore_eos": True},
            {"max_new_tokens": 6, "sampling_seed": 2, "ignore_eos": True},
        ],
        "return_logprob": [False, True],
        "rid": ["x", "y"],
    }
    whole = server.post(PATH, body).json
    assert [each["meta_info"]["id"] for each in whole] == ["x", "x", "y"]
    assert [len(each["output_ids"]) for each in whole] == [4, 4, 6]
    assert ["output_token_logprobs" in each["meta_info"] for each in whole] == [False, False, True]
    if stream:
        events = server.post(PATH, {**body, "stream": True}).events
        for index, expected in enumerate(whole):
            mine = [event for event in events if event["index"] == index]
            texts = [event["text"] for event in mine]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
            last = {name: value for name, value in mine[-1].items() if name != "index"}
            for each in (last, expected):
                del each["meta_info"]["e2e_latency"]
            assert last == expected


@each_row(
    "body, param",
    [
        ({}, "prompt"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": []}, "text"),
        ({"text": [1, 2]}, "text"),
        ({"input_ids": "a"}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [10**6]}, "input_ids"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 99}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
        ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
        (
            {"text": "a", "sampling_params": {"max_new_tokens": CONFIG.max_request_tokens}},
            "sampling_params.max_new_tokens",
        ),
        ({"text": "a", "sampling_params": {"n": 10**9}}, "sampling_params.n"),
        (
            {"text": "a", "sampling_params": {"regex": "a", "json_schema": "{}"}},
            "sampling_params.regex",
        ),
        ({"text": "a", "sampling_params": {"regex": "("}}, "sampling_params.regex"),
        (
            {"text": "a", "sampling_params": {"json_schema": "no json"}},
            "sampling_params.json_schema",
        ),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "priority": 1}, "priority"),
    ],
)
def test_wrong_sglang_requests_are_refused_by_field(server, body, param):
    answer = server.post(PATH, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert param.rpartition(".")[2] in answer.error["message"]


def test_the_default_limit_gives_way_to_the_context(server):
    ids = [20] * (CONFIG.max_request_tokens - 3)
    assert server.post(PATH, {"input_ids": ids}).status == 200
    assert server.engine.requests[0].max_tokens == 3
    assert server.post(PATH, {"text": "a"}).status == 200
    assert server.engine.requests[1].max_tokens == 128


def test_an_error_in_a_stream_comes_before_it(server):
    server.engine.reject = "it will never fit"
    answer = server.post(PATH, {**SGLANG, "stream": True})
    assert answer.status == 400
    assert answer.error["param"] == "text"


def test_an_answer_is_one_line_of_json(server):
    for body in (NATIVE, SGLANG):
        assert b"\n" not in server.post(PATH, body).content
        assert json.loads(server.post(PATH, body).content)


def test_a_wrong_sampling_parameter_is_named_and_its_value_is_quoted_as_it_was(server):
    params = {"max_new_tokens": "max_tokens"}
    answer = server.post("/generate", {"text": "the cat", "sampling_params": params})
    assert answer.status == 400
    assert answer.error["param"] == "sampling_params.max_new_tokens"
    assert answer.error["message"].startswith("sampling_params.max_new_tokens must be")
    assert "'max_tokens'" in answer.error["message"]
