"""Chat templates in requests, which are programs, and arguments of the model's own template."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
from fake_engine import EOS_ID, VOCAB_SIZE, WRAPPED, RunningServer, with_config
from rows import each_row

from tokasaurus.errors import RequestError
from tokasaurus.text.tokenizer import Tokenizer

ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
ONE = "{{ 1 }}"
MESSAGES = [{"role": "user", "content": "the cat"}]
TOOL = {"type": "function", "function": {"name": "f"}}
KWARGS, OVERRIDES = "chat_template_kwargs", "apply_chat_template_overrides"
CHAT, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/responses", "/tokenize"


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    """A server with the default, which is not to trust templates of requests."""
    with RunningServer(with_config(trust_request_chat_template=False)).running() as server:
        yield server


@each_row("path, body, field",
    [
        (CHAT, {"messages": MESSAGES, KWARGS: {"chat_template": ENDLESS}}, KWARGS),
        (CHAT, {"messages": MESSAGES, OVERRIDES: {"chat_template": ENDLESS}}, OVERRIDES),
        (CHAT, {"messages": MESSAGES, "tools": [TOOL], KWARGS: {"chat_template": ONE}}, KWARGS),
        (CHAT, {"messages": MESSAGES, KWARGS: {"chat_template": {}}}, KWARGS),
        (CHAT, {"messages": MESSAGES, "chat_template": ENDLESS}, "chat_template"),
        (RESPONSES, {"input": "the cat", KWARGS: {"chat_template": ENDLESS}}, KWARGS),
        (TOKENIZE, {"messages": MESSAGES, KWARGS: {"chat_template": ENDLESS}}, KWARGS),
        (TOKENIZE, {"messages": MESSAGES, "chat_template": ENDLESS}, "chat_template"),
    ],
)  # fmt: skip
def test_a_template_of_the_request_is_refused(locked, path, body, field):
    answer = locked.post(path, body)
    assert answer.status == 400
    assert answer.error["param"] == field
    assert field in answer.error["message"]
    if path != CHAT or field != "chat_template":
        assert "trust_request_chat_template=T" in answer.error["message"]
        assert "leave it out" in answer.error["message"]


def test_a_template_in_a_synchronous_batch_is_refused(locked):
    line = {"messages": MESSAGES, KWARGS: {"chat_template": ENDLESS}}
    answer = locked.post("/custom/synchronous-batch-completions", {"requests": [line]})
    assert answer.status == 400
    assert "trust_request_chat_template=T" in answer.error["message"]


def test_the_models_own_template_takes_arguments(locked):
    plain, shouting, null = (
        locked.post(TOKENIZE, {"messages": MESSAGES, KWARGS: each}).json["tokens"]
        for each in ({}, {"shout": True}, {"chat_template": None})
    )
    assert plain == null != shouting


def test_one_of_several_templates_of_the_model_may_be_named():
    wrapped = copy.copy(WRAPPED)
    wrapped.chat_template = {"default": "A", "tool_use": "B", "rag": "the cat"}
    tokenizer = Tokenizer(wrapped, VOCAB_SIZE, [EOS_ID])
    for name, text in wrapped.chat_template.items():
        arguments = {"chat_template": name}
        assert wrapped.decode(tokenizer.render_chat(MESSAGES, arguments)) == text
        assert tokenizer.chat_template(arguments) == text
    assert tokenizer.chat_template({}, with_tools=True) == "B"
    with pytest.raises(RequestError, match="trust_request_chat_template"):
        tokenizer.render_chat(MESSAGES, {"chat_template": "C"})


@pytest.mark.parametrize(("num_messages", "num_characters"), [(1, 70_000), (5_000, 20_000)])
def test_arguments_that_a_template_could_multiply_are_refused(locked, num_messages, num_characters):
    arguments = {"eos_token": "x" * num_characters}
    body = {"messages": MESSAGES * num_messages, KWARGS: arguments}
    for path in (TOKENIZE, CHAT):
        error = locked.post(path, body).error
        assert error["param"] == KWARGS
        assert "characters" in error["message"]


@pytest.mark.parametrize("size", [10, 10_000])
def test_large_conversations_are_written_away_from_the_event_loop(server, monkeypatch, size):
    """On every route, whichever field makes them large."""
    threads = []
    render = Tokenizer.render_chat

    def noted(*arguments, **named):
        threads.append(threading.current_thread().name)
        return render(*arguments, **named)

    monkeypatch.setattr(Tokenizer, "render_chat", noted)
    text = "a" * size
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": text}}}
    large: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": "assistant", "reasoning_content": text, "content": ""}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}, *MESSAGES]},
        {"messages": [{"role": "user", "content": ""}] * (size // 10)},
        {"messages": [{"role": text, "content": ""}]},
        {"messages": MESSAGES, KWARGS: {"x": text}},
    ]
    for body in large:
        for path in (TOKENIZE, CHAT):
            server.post(path, body)
    server.post(RESPONSES, {"input": text})
    server.post(RESPONSES, {"input": "a", "instructions": text})
    server.post(RESPONSES, {"input": "a", KWARGS: {"x": text}})
    assert len(threads) == 15
    assert {name.startswith("asyncio_") for name in threads} == {size > 4_000}
