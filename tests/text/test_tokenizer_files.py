"""What runs is the pipeline of ``tokenizer.json``, whatever the other files say about it."""

from __future__ import annotations

import json
from itertools import product

import pytest
from fake_engine import with_config
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tokasaurus.errors import ModelError
from tokasaurus.text import tokenizer as text_tokenizer

TEXTS = [
    "def f(x):\n\treturn x**2",
    "In 2024, 12345 and 67,890.50",
    "<|user|>\nhi</s>\n<|assistant|>\nyes 12",
    " two  spaces   three\n\n\nnaïve café 日本語 😀 e\u0301",
    "it's I'LL don't\r\n  <tool> x </tool>  ",
    "",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|im_end|>"]


def _bpe(pre_tokenizer, *, normalizer=None, byte_level=True, bos=True) -> Tokenizer:
    """A byte-level BPE that was trained on the texts, so that its merges cross what it can."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ]
        )
    tokenizer.add_tokens([AddedToken("<tool>", special=False, lstrip=True)])
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def _deepseek() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _pieces() -> list[str]:
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    return [*pieces, "▁h", "hi", "▁yes", "ye", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]


def _llama2() -> Tokenizer:
    """SentencePiece BPE: a normalizer writes the spaces, and there is no pre-tokenizer."""
    vocabulary = {piece: i for i, piece in enumerate(_pieces())}
    merges = [("▁", "h"), ("h", "i"), ("y", "e")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = [(piece, -float(i)) for i, piece in enumerate(_pieces())]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


PIPELINES = {
    "llama3": lambda: _bpe(_split(LLAMA3)),
    "qwen2": lambda: _bpe(
        _split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC(), bos=False
    ),
    "gpt2": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), bos=False),
    "prefix-space": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "deepseek": lambda: _bpe(_deepseek()),
    "llama2": _llama2,
    "unigram": _unigram,
}
CLASSES = [
    None,
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "GemmaTokenizer",
    "CohereTokenizerFast",
    "T5Tokenizer",
    "NobodysTokenizer",
]
MODEL_TYPES = [None, "llama", "qwen2", "qwen3", "mistral", "gemma"]


def load(path, **fields) -> text_tokenizer.Tokenizer:
    return text_tokenizer.Tokenizer.load(
        with_config(tokenizer_path=str(path), vocab_size=700, eos_token_ids=(), **fields)
    )


def write(path, *, config=None, model_type=None, **files):
    """Writes the files beside ``tokenizer.json``; None writes none."""
    path.mkdir(exist_ok=True)
    for name in ("tokenizer_config", "config"):
        (path / f"{name}.json").unlink(missing_ok=True)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))


def test_every_pipeline_runs_unchanged_under_every_class_and_model_type(tmp_path):
    wrong = []
    for name, build in PIPELINES.items():
        path = tmp_path / name
        path.mkdir()
        build().save(str(path / "tokenizer.json"))
        oracle = Tokenizer.from_file(str(path / "tokenizer.json"))
        expected = [
            [oracle.encode(text, add_special_tokens=special).ids for text in TEXTS]
            for special in (False, True)
        ]
        for tokenizer_class, model_type in product(CLASSES, MODEL_TYPES):
            config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            if tokenizer_class is not None:
                config["tokenizer_class"] = tokenizer_class
            write(path, config=config, model_type=model_type)
            try:
                loaded = load(path)
            except ModelError as error:
                wrong.append((name, tokenizer_class, model_type, str(error)))
                continue
            found = [
                [loaded.encode(text, add_special_tokens=special) for text in TEXTS]
                for special in (False, True)
            ]
            if found != expected:
                wrong.append((name, tokenizer_class, model_type, found))
            for ids in expected[0]:
                if loaded.decode_prompt(ids) != oracle.decode(ids):
                    wrong.append((name, tokenizer_class, model_type, ids))
    assert wrong == []


def test_flags_of_the_configuration_change_no_pipeline(tmp_path):
    """Each of these made some class of transformers build another pipeline."""
    rows = [
        {"add_prefix_space": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"legacy": False},
        {"legacy": True, "tokenizer_class": "LlamaTokenizer"},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
        {"do_lower_case": True},
        {"fix_mistral_regex": True},
        {"added_tokens_decoder": {"1": {"content": "<s>", "lstrip": True, "special": True}}},
    ]
    wrong = []
    for name, build in PIPELINES.items():
        path = tmp_path / name
        path.mkdir()
        build().save(str(path / "tokenizer.json"))
        oracle = Tokenizer.from_file(str(path / "tokenizer.json"))
        for row in rows:
            write(path, config={"eos_token": "</s>", **row}, model_type="llama")
            loaded = load(path)
            for text in [*TEXTS, "x <s> y"]:
                if loaded.encode(text) != oracle.encode(text).ids:
                    wrong.append((name, row, text))
    assert wrong == []


def test_special_tokens_come_from_the_configuration_files(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    PIPELINES["llama3"]().save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    write(path, config={**config, "chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    loaded = load(path)
    assert {name: loaded.info()[name] for name in config if name != "tokenizer_class"} == {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
    }
    assert loaded.render_chat([{"role": "user", "content": "hi"}]) == loaded.encode("hi")
    # A class's own default is no file's choice.
    write(path, config={"tokenizer_class": "GPT2Tokenizer"}, model_type="qwen2")
    assert load(path).info()["eos_token"] is None
    assert not load(path).special_ids.keys() & {"<|endoftext|>"}


def test_tokens_that_only_the_configuration_has_are_added_behind_the_others(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    PIPELINES["llama3"]().save(str(path / "tokenizer.json"))
    size = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    added = {str(size): {"content": "<new>", "special": False, "normalized": False}}
    write(path, config={"added_tokens_decoder": added, "pad_token": "<pad>"})
    loaded = load(path)
    assert loaded.encode("hi<new><pad>", add_special_tokens=False)[-2:] == [size, size + 1]
    assert loaded.special_ids["<pad>"] == size + 1
    assert loaded.decode([size, size + 1]) == "<new>"


def test_a_directory_without_a_tokenizer_says_what_is_missing(tmp_path):
    for config in (None, {"tokenizer_class": "LlamaTokenizer"}):
        write(tmp_path, config=config, model_type="llama")
        with pytest.raises(ModelError, match=r"no tokenizer\.json.*tokenizer="):
            load(tmp_path)
