"""Penalties, biases, bad words and stop tokens: what the manager is told, where samples end."""

from __future__ import annotations

import json

import pytest
from fake_engine import (
    CONFIG,
    EOS_ID,
    PREPARER,
    TOKENIZER,
    VOCAB_SIZE,
    WRAPPED,
    ids_of,
    with_config,
)
from rows import each_row

from tokasaurus import SamplingParams
from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import Adjustments
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.stop_strings import StopStrings
from tokasaurus.text.text_stream import TextStream
from tokasaurus.text.tokenizer import Tokenizer


def sampling(**params):
    return PREPARER.prepare([70], SamplingParams(**params)).sampling


def test_neutral_values_make_no_adjustments():
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {70: 0},
        "min_tokens": 0,
        "bad_words": [],
        "stop_token_ids": [],
    }
    assert sampling().adjustments is None
    assert sampling(**neutral).adjustments is None
    assert not Adjustments().reads_generated


def test_all_adjustments_together_reach_the_manager():
    got = sampling(
        frequency_penalty=0.5,
        presence_penalty=-2,
        repetition_penalty=1.25,
        logit_bias={"80": -100, 71: 1},
        min_tokens=4,
        stop_token_ids=[90, 91],
        stop="<|end|>",
    ).adjustments
    assert got == Adjustments(
        min_tokens=4,
        late_ids=tuple(sorted([EOS_ID, 90, 91, TOKENIZER.special_ids["<|end|>"]])),
        bias=((71, 1.0), (80, -100.0)),
        repetition_penalty=1.25,
        frequency_penalty=0.5,
        presence_penalty=-2.0,
    )
    assert got.reads_prompt


def test_bad_words_at_the_beginning_and_after_a_space():
    words = sampling(bad_words=["cat", " cat", "zq", "\n"]).adjustments.bad_words
    texts = ["cat", " cat", "zq", " zq", "\n", " \n"]
    assert set(words) == {tuple(ids_of(text)) for text in texts}
    assert any(len(word) > 1 for word in words)
    assert sampling(bad_words=["zq"]).adjustments.reads_generated
    assert not sampling(bad_words=["z"]).adjustments.reads_prompt


def test_bad_words_of_many_tokens_are_refused():
    """The worker searches every slot for words as wide as the longest of any slot."""
    word = "zqx" * 11
    assert len(ids_of(word)) == 33
    assert sampling(bad_words=[word[:-2]]).adjustments.bad_words
    with pytest.raises(
        RequestError, match="bad_words may hold words of at most 32 tokens"
    ) as error:
        sampling(bad_words=["a", word])
    assert error.value.field == "bad_words"


def test_stop_token_ids_end_a_sample():
    for ignore_eos, expected in ((False, {90, EOS_ID}), (True, {90})):
        params = SamplingParams(stop_token_ids=[90, 90], ignore_eos=ignore_eos)
        assert set(PREPARER.prepare([70], params).stop_token_ids) == expected


def test_the_end_of_sequence_is_late_even_where_it_is_ignored():
    """As in vLLM."""
    assert sampling(min_tokens=2, ignore_eos=True).adjustments.late_ids == (EOS_ID,)


@each_row(
    "params, field",
    [
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"logit_bias": {VOCAB_SIZE: 1}}, "logit_bias"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 512, "max_tokens": None}, "min_tokens"),
    ],
)
def test_adjustments_that_the_model_cannot_do_are_refused(params, field):
    with pytest.raises(RequestError) as error:
        PREPARER.prepare([70], SamplingParams(**params))
    assert error.value.field == field
    assert CONFIG.max_request_tokens == 512


def test_a_stop_tokens_text_is_not_shown(server):
    stop = ids_of("x")[0]
    server.engine.script = lambda request, index: [*ids_of("hello"), stop, *ids_of("more")]
    body = {"prompt": "a", "max_tokens": 40, "stop_token_ids": [stop], "logprobs": 1}
    for extra in ({}, {"stop": ["zzz"]}):
        whole = server.post("/v1/completions", {**body, **extra}).json
        (choice,) = whole["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
        assert choice["logprobs"]["tokens"][-1] == "x"
        assert whole["usage"]["completion_tokens"] == len(ids_of("hello")) + 1
        events = server.post("/v1/completions", {**body, **extra, "stream": True}).events
        assert "".join(event["choices"][0]["text"] for event in events) == "hello"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_count_once_min_tokens_are_there(server, stream):
    """A stop string that is complete before, or with the last of them, is plain text."""
    said = [*ids_of("x"), *ids_of("z"), *ids_of("q"), *ids_of("x"), *ids_of("z"), *ids_of("q")]
    assert len(said) == 6
    server.engine.script = lambda request, index: [*said, *ids_of("y") * 20]
    body = {"prompt": "a", "max_tokens": 20, "stop": "zq", "stream": stream}
    for min_tokens, text, count in (
        (0, "x", 3),
        (2, "x", 3),
        (3, "xzqx", 6),
        (5, "xzqx", 6),
        (6, "xzqxzq" + "y" * 14, 20),
    ):
        answer = server.post("/v1/completions", {**body, "min_tokens": min_tokens})
        bodies = answer.events if stream else [answer.json]
        assert "".join(each["choices"][0]["text"] for each in bodies) == text
        ids = [i for each in bodies for i in completion_ids(each)]
        assert len(ids) == count


def completion_ids(body):
    return json.loads(body["system_fingerprint"])["completion_ids"][0]


def test_a_stop_string_that_begins_before_min_tokens_is_text():
    stream = TextStream(TOKENIZER, StopStrings.compile(("zq",), TOKENIZER.special_ids), 2)
    assert not stream.feed(ids_of("z"))
    assert stream.take() == ""
    assert not stream.feed(ids_of("q"))
    assert stream.feed(ids_of("y")) is False
    assert stream.take() == "zqy"


def test_tokens_beyond_the_models_vocabulary_are_left_out():
    """Some tokenizers have more tokens than their models."""
    size = TOKENIZER.special_ids["<|end|>"]
    smaller = Tokenizer(WRAPPED, size, [EOS_ID])
    preparer = Preparer(with_config(vocab_size=size), smaller)
    request = preparer.prepare([0], SamplingParams(stop="<|end|>", min_tokens=1))
    assert request.stop_token_ids == (EOS_ID,)
    assert request.sampling.adjustments.late_ids == (EOS_ID,)
    vocabulary = smaller.vocabulary([EOS_ID])
    assert len(vocabulary.tokens) == size
    assert max(vocabulary.special_token_ids) < size
