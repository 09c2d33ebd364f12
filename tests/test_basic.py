"""The shortest proof that an engine works, for the bundled model or any other.

pytest tests/test_basic.py::test_basic
MODEL=DIR_OR_REPO pytest tests/test_basic.py
"""

from __future__ import annotations

import math

import pytest
from rows import each_row

pytestmark = pytest.mark.engine

PROMPT = "A B C D A B C D A B"


def complete(engine, **fields):
    request = {"model": "default", "prompt": PROMPT, "temperature": 0, "max_tokens": 20, **fields}
    return engine.client().completions.create(**request)


def test_basic(engine):
    first = complete(engine)
    second = complete(engine)  # now from the prefix cache, if the prompt is long enough
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].finish_reason in ("stop", "length")
    assert 1 <= first.usage.completion_tokens <= 20
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


def test_one_token(engine):
    answer = complete(engine, max_tokens=1)
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason == "length"


@each_row("n", range(1, 11))
def test_several_samples(engine, n):
    answer = complete(engine, n=n, temperature=1.0, max_tokens=5, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert answer.usage.completion_tokens == 5 * n


def test_prompts_around_a_page(engine):
    """Prompts of about one and two pages give the same text, cached or not."""
    for length in (15, 16, 17, 31, 32, 33):
        ids = [(7 * i) % 200 + 20 for i in range(length)]
        once, again = (complete(engine, prompt=ids, max_tokens=8) for _ in range(2))
        assert once.choices[0].text == again.choices[0].text
        assert once.usage.prompt_tokens == length
        assert again.usage.prompt_tokens_details.cached_tokens == (length - 1) // 16 * 16


def test_stop_string(engine):
    whole = complete(engine, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = complete(engine, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_chat_and_stream(engine):
    messages = [{"role": "user", "content": "tell me a joke"}]
    request = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = engine.client().chat.completions.create(**request).choices[0].message.content
    chunks = engine.client().chat.completions.create(**request, stream=True)
    assert whole
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole


def test_logprobs(engine):
    answer = complete(engine, logprobs=3, max_tokens=6, extra_body={"ignore_eos": True})
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 6
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())  # greedy
        assert sum(math.exp(value) for value in top.values()) <= 1 + 1e-5


def test_a_seed_repeats_its_text(engine):
    request = {"temperature": 5.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    texts = [complete(engine, seed=seed, **request).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
