"""The bound never exceeds what the library makes of a text, and is good enough to be of use."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from fake_engine import WRAPPED
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tokasaurus.errors import RequestTooLong
from tokasaurus.text import tokenizer as server_tokenizer
from tokasaurus.text.fewest_tokens import FewestTokens

PIECES = (
    *("the cat sat", " ", "  ", " " * 40, "\n", "\t", "word", "def f(x):\n\treturn", "12345"),
    *("e\u0301", "\u00e9", "a\u0323\u0302", "\u1ead", "\u03b1\u0313\u0300\u0345", "\u1f82"),
    *("\u1112\u1161\u11ab", "\ud55c", "\u304b\u3099", "\u304c", "日本語", "\u212b", "\ufb01"),
    *("\u00a0", "\u3000", "\u0378", "\u0301" * 5, "<s>", "<s>\u0338", "<mask>", "😀", "ΑΣ", "İ"),
    *("▁", "\ue000", "\u0b47\u0b3e", "\u0bcb", "ÀÉ"),
)


def random_text(chance: random.Random) -> str:
    pieces = chance.sample(PIECES, chance.randint(1, 6))
    return "".join(chance.choices(pieces, k=chance.randint(1, 300)))


def trained(
    texts: list[str],
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    added: tuple[AddedToken, ...] = (),
) -> Tokenizer:
    """Byte-level BPE that knows these very texts, so that they have as few tokens as can be."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = (
        byte_level
        if pre_tokenizer is None
        else pre_tokenizers.Sequence([pre_tokenizer, byte_level])
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def byte_fallback(texts: list[str]) -> Tokenizer:
    """As Llama 2 and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokenizer.model = models.BPE(
        vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    return tokenizer


def unigram(texts: list[str]) -> Tokenizer:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the▁cat▁sat", "▁▁▁▁"]
    names += sorted({piece.replace(" ", "▁") for piece in PIECES} - set(names))
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


STRIPPING = (
    AddedToken("<s>", lstrip=True, rstrip=True),
    AddedToken("<mask>", lstrip=True, normalized=True),
)
KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "byte-level": trained,
    "nfc": lambda texts: trained(texts, normalizers.NFC()),
    "nfd": lambda texts: trained(texts, normalizers.NFD()),
    "nfkc": lambda texts: trained(texts, normalizers.NFKC()),
    "lowercase": lambda texts: trained(
        texts, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    ),
    "split": lambda texts: trained(
        texts, None, pre_tokenizers.Split(Regex(r"\s+|\w+"), "isolated")
    ),
    "stripping": lambda texts: trained(texts, None, None, STRIPPING),
    "stripping-nfkc": lambda texts: trained(texts, normalizers.NFKC(), None, STRIPPING),
    "byte-fallback": byte_fallback,
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_exceeds_the_number_of_tokens(kind):
    wrong = []
    for seed in range(5):
        chance = random.Random(seed)
        texts = [random_text(chance) for _ in range(10)]
        tokenizer = KINDS[kind](texts)
        bound = FewestTokens(tokenizer)
        for text in texts:
            num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
            found = bound.exceed(text, max(0, num_tokens - 1))
            if found is not None and found > num_tokens:
                wrong.append((seed, text, num_tokens, found))
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_far_too_long_exceeds_the_limit(kind):
    """Whatever it consists of, but whitespace where added tokens take it."""
    chance = random.Random(0)
    tokenizer = KINDS[kind]([random_text(chance) for _ in range(12)])
    bound = FewestTokens(tokenizer)
    free = [piece for piece in PIECES if piece.isspace()] if "stripping" in kind else []
    assert [
        piece
        for piece in PIECES
        if piece not in free and bound.exceed(piece * (600_000 // len(piece)), 100) is None
    ] == []


def test_prose_may_have_a_few_times_fewer_tokens_at_most():
    chance = random.Random(1)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(200)]
    prose = " ".join(chance.choices(words, k=20_000))
    tokenizer = trained([prose, " " * 500], None, pre_tokenizers.Split(Regex(r" ?\w+"), "isolated"))
    num_tokens = len(tokenizer.encode(prose).ids)
    assert FewestTokens(tokenizer).exceed(prose, num_tokens // 6) is not None


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    ],
    ids=["wordpiece", "no bytes", "no fallback"],
)
def test_there_is_no_bound_where_characters_may_vanish(tokenizer):
    assert FewestTokens(tokenizer).exceed("b" * 100_000, 10) is None


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace(Regex("a+"), "a"),
        normalizers.Replace("ab", "c"),
        normalizers.StripAccents(),
        normalizers.BertNormalizer(),
        normalizers.Strip(),
    ],
)
def test_there_is_no_bound_behind_an_unknown_normalizer(normalizer):
    assert FewestTokens(trained(["abab"], normalizer)).exceed("a" * 100_000, 10) is None


def test_a_prompt_that_can_never_fit_is_refused_before_it_is_tokenized(monkeypatch):
    tokenizer = server_tokenizer.Tokenizer(WRAPPED, len(WRAPPED), max_tokens=64)
    monkeypatch.setattr(tokenizer, "_encode", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(RequestTooLong, match="prompt has at least") as e:
        tokenizer.encode("the cat " * 100_000)
    assert e.value.field == "prompt"
    with pytest.raises(RequestTooLong, match="messages have at least") as e:
        tokenizer.render_chat([{"role": "user", "content": "the cat " * 100_000}])
    assert e.value.field == "messages"


def test_a_tokenizer_without_a_limit_refuses_nothing():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained(["abab"]))
    assert server_tokenizer.Tokenizer(tokenizer, 600).encode("abab" * 1000)
