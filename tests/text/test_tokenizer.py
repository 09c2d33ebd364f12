"""Every kind of tokenizer that models have, and how prompts and messages are encoded."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import EOS_ID, TOKENIZER, VOCAB_SIZE, WRAPPED, with_config
from rows import each_row
from templates import TEMPLATES, TOOLS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokasaurus.errors import ModelError, RequestError
from tokasaurus.text import tokenizer as server_tokenizer

SPACE = "▁"


def sentencepiece(decoder: decoders.Decoder) -> server_tokenizer.Tokenizer:
    """A unigram vocabulary with byte fallback."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [SPACE, f"{SPACE}the", f"{SPACE}cat", "at", "é", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.Unigram([(name, -float(i)) for i, name in enumerate(names)], 0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return server_tokenizer.Tokenizer(wrapped, len(names))


def wordpiece() -> server_tokenizer.Tokenizer:
    """A tokenizer whose decoder cannot be applied token by token."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "a": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    return server_tokenizer.Tokenizer(wrapped, len(vocabulary))


LLAMA_STYLE = decoders.Sequence(
    [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (TOKENIZER, ["the cat", " the", "日本語 😀 naïve", "a\n\nb", "<think>x"]),
        (sentencepiece(LLAMA_STYLE), ["the cat", "日本語 😀 é", "cat at the"]),
        (sentencepiece(METASPACE), ["the cat", "日本語 😀 é", "cat at the"]),
        (wordpiece(), ["the cats", "a cat"]),
    ],
    ids=["byte-level", "llama", "metaspace", "wordpiece"],
)
def test_encoding_and_decoding_give_the_same_text(tokenizer, texts):
    for text in texts:
        ids = tokenizer._encode(text, add_special_tokens=False)
        assert tokenizer.decode_prompt(ids) == text
        assert tokenizer.decode_prompt(ids) == tokenizer._backend.decode(ids)


def test_a_continuation_keeps_its_first_space():
    tokenizer = sentencepiece(LLAMA_STYLE)
    ids = tokenizer._encode("the cat", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == [" the", " cat"]


def test_byte_level_agrees_with_the_library_on_any_ids():
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(len(WRAPPED)) for _ in range(rng.randrange(12))]
        assert TOKENIZER.decode(ids) == TOKENIZER._backend.decode(ids, skip_special_tokens=True)


def test_ids_beyond_the_tokenizer_are_silent():
    assert TOKENIZER.decode([VOCAB_SIZE - 1]) == ""
    assert TOKENIZER.token_text(VOCAB_SIZE - 1) == ""


def test_token_text_writes_half_characters_as_bytes():
    first, *_ = TOKENIZER._encode("😀", add_special_tokens=False)
    assert TOKENIZER.token_text(first) == "bytes:\\xf0"
    assert TOKENIZER.token_text(EOS_ID) == "</s>"


def test_special_tokens_are_added_once():
    bos = WRAPPED.bos_token_id
    assert TOKENIZER.encode("the") == TOKENIZER.encode("<s>the")
    assert TOKENIZER.encode("the")[0] == bos
    assert TOKENIZER.encode("") == [bos]


def render(messages, **overrides):
    ids = TOKENIZER.render_chat(messages, overrides)
    return WRAPPED.decode(ids)


def test_chat_asks_for_the_next_message():
    said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert render(said) == "<s><|system|>be kind<|end|><|user|>hi<|end|><|assistant|>"


def test_chat_goes_on_with_the_assistants_last_message():
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hel"}]
    assert render(said) == "<s><|user|>hi<|end|><|assistant|>hel"


def test_chat_overrides_pass_through():
    said = [{"role": "user", "content": "hi"}]
    assert render(said, shout=True).endswith("SHOUT<|assistant|>")
    assert render(said, chat_template="{{ messages[0]['content'] }}!") == "hi!"
    assert not render(said, add_generation_prompt=False).endswith("<|assistant|>")
    going_on = [*said, {"role": "assistant", "content": "hel"}]
    assert render(going_on, add_generation_prompt=True).endswith("hel<|end|><|assistant|>")


@each_row("name", ["tokenize", "return_tensors", "conversation"])
def test_chat_overrides_cannot_change_what_comes_back(name):
    with pytest.raises(RequestError, match=name) as error:
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}], {name: True})
    assert error.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    "overrides", [{}, {"chat_template": "{{ nonsense("}, {"chat_template": "{{ 1 / 0 }}"}]
)
def test_a_template_that_fails_names_messages(overrides):
    with pytest.raises(RequestError) as error:
        TOKENIZER.render_chat([{"role": "martian", "content": "hi"}], overrides)
    assert error.value.field == "messages"
    if not overrides:
        assert "Unknown role: martian" in error.value.message


def test_a_tokenizer_without_a_chat_template_refuses_messages():
    with pytest.raises(RequestError, match="no chat template"):
        wordpiece().render_chat([{"role": "user", "content": "a"}])


def test_loading_from_a_directory(tmp_path):
    WRAPPED.save_pretrained(tmp_path)
    config = with_config(tokenizer_path=str(tmp_path))
    loaded = server_tokenizer.Tokenizer.load(config)
    assert loaded.spelled == TOKENIZER.spelled
    assert loaded.encode("the cat") == TOKENIZER.encode("the cat")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=str(tmp_path)):
        server_tokenizer.Tokenizer.load(config)


def test_many_threads_may_tokenize_at_once():
    texts = [f"the cat {i} sat on the mat " * (i % 5 + 1) for i in range(40)]
    alone = [TOKENIZER.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(TOKENIZER.encode, texts * 5)) == alone * 5


def with_template(source: str) -> server_tokenizer.Tokenizer:
    """The tokenizer of tests with another chat template."""
    wrapped = copy.deepcopy(WRAPPED)
    wrapped.chat_template = source
    return server_tokenizer.Tokenizer(wrapped, VOCAB_SIZE, [EOS_ID], trusts_templates=True)


def test_chats_behind_a_cartridge_have_neither_bos_nor_dates():
    """A cartridge has both; whatever else a template writes stays."""
    chat = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "hi"}]
    begun = [*chat, {"role": "assistant", "content": "Well,"}]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    system, user, assistant = map(head.format, ("system", "user", "assistant"))
    plain = f"{system}Be kind.<|eot_id|>{user}hi<|eot_id|>{assistant}"
    for name, messages, arguments, expected in (
        ("llama_3", chat, {}, plain),
        ("llama_3", begun, {}, f"{plain}Well,"),
        ("llama_3", chat, {"add_generation_prompt": False}, plain.removesuffix(assistant)),
        ("llama_3", chat, {"chat_template": "<s>own"}, "own"),
        ("llama_3", chat, {"chat_template": "own<s>"}, "own<s>"),
    ):
        tokenizer = with_template(TEMPLATES[name])
        ids = tokenizer.render_chat(messages, arguments, behind_cartridge=True)
        assert tokenizer.decode_prompt(ids, special=True) == expected, arguments
    for name, source in TEMPLATES.items():
        if name == "llama_3":
            continue
        tokenizer = with_template(source)
        whole = tokenizer.render_chat(chat[1:])
        rest = whole[1:] if whole[0] == WRAPPED.bos_token_id else whole
        assert tokenizer.render_chat(chat[1:], behind_cartridge=True) == rest, name


def test_tools_behind_a_cartridge_are_described_by_the_models_own_template():
    tokenizer = with_template(TEMPLATES["llama_3"])
    chat = [{"role": "user", "content": "hi"}]
    whole = tokenizer.render_chat(chat, None, TOOLS)
    assert tokenizer.render_chat(chat, None, TOOLS, behind_cartridge=True) == whole[1:]
