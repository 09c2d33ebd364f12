"""``/tokenize``, ``/detokenize``, ``/tokenizer_info``: vLLM's shapes, as lm_eval reads them."""

from __future__ import annotations

import jinja2
import pytest
from fake_engine import CHAT_TEMPLATE, CONFIG, EOS, EOS_ID, TOKENIZER, VOCAB_SIZE, ids_of
from rows import each_row

MESSAGES = [{"role": "user", "content": "the cat"}]
OPEN = [*MESSAGES, {"role": "assistant", "content": "sat"}]


@each_row("text", ["the cat sat", "", "élan 🐟", f"a{EOS}b"])
@pytest.mark.parametrize("special", [None, True, False])
def test_tokens_are_those_of_a_completion(server, text, special):
    body = {"prompt": text} if special is None else {"prompt": text, "add_special_tokens": special}
    answer = server.post("/tokenize", body).json
    expected = ids_of(text) if special is False else TOKENIZER.encode(text)
    assert answer == {
        "count": len(expected),
        "max_model_len": CONFIG.max_request_tokens,
        "tokens": expected,
        "token_strs": None,
    }
    if special is False:
        assert server.post("/detokenize", {"tokens": expected}).json == {"prompt": text}


@each_row(
    "fields, end",
    [
        ({}, "<|end|><|assistant|>"),
        ({"add_generation_prompt": False}, "<|end|>"),
        ({"chat_template_kwargs": {"shout": True}}, "<|end|>SHOUT<|assistant|>"),
        ({"chat_template": "{{ messages[0]['content'] }}!"}, "!"),
    ],
)
def test_tokenize_renders_a_conversation_with_the_chat_template(server, fields, end):
    answer = server.post("/tokenize", {"messages": MESSAGES, "return_token_strs": True, **fields})
    tokens, strings = answer.json["tokens"], answer.json["token_strs"]
    assert strings == [TOKENIZER.token_text(token) for token in tokens]
    assert "".join(strings).endswith("the cat" + end)


def test_the_tokens_of_a_chat_are_those_that_the_engine_gets(server):
    for messages in (MESSAGES, OPEN):
        tokens = server.post("/tokenize", {"messages": messages}).json["tokens"]
        server.engine.received.clear()
        assert server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json
        assert server.engine.requests[0].prompt_ids.tolist() == tokens
    left_open = server.post("/tokenize", {"messages": OPEN, "continue_final_message": True}).json
    assert left_open["token_strs"] is None


def test_long_texts_are_tokenized(server):
    text = "the cat sat on the mat " * 2000
    assert server.post("/tokenize", {"prompt": text}).json["tokens"] == TOKENIZER.encode(text)


@each_row(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "alien", "content": ""}]}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        (
            "/tokenize",
            {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
        ),
        ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_wrong_values_are_refused_by_field(server, path, body, param):
    answer = server.post(path, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert param in answer.error["message"]


def test_tokenizer_info_as_lm_eval_reads_it(server):
    """lm_eval gets the end-of-sequence id from ``/tokenize`` and renders chats itself."""
    info = server.get("/tokenizer_info").json
    assert info["eos_token"] == EOS
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert server.post("/tokenize", body).json["tokens"] == [EOS_ID]
    assert info["chat_template"] == CHAT_TEMPLATE
    text = (
        jinja2.Environment()
        .from_string(info["chat_template"])
        .render(messages=MESSAGES, add_generation_prompt=True, bos_token=info["bos_token"])
    )
    body = {"prompt": text, "add_special_tokens": False}
    by_hand = server.post("/tokenize", body).json["tokens"]
    assert by_hand == server.post("/tokenize", {"messages": MESSAGES}).json["tokens"]
    assert info["pad_token"] is None
    assert set(info["special_tokens"]) >= {info["bos_token"], EOS}
