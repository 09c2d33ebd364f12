"""The text of a growing sample, compared with a search of its whole text."""

from __future__ import annotations

import codecs
import random

from fake_engine import EOS, EOS_ID, SPECIAL, TOKENIZER, VOCAB_SIZE, ids_of
from rows import each_row

from tokasaurus.text.stop_strings import StopStrings
from tokasaurus.text.text_stream import TextStream

END_ID = TOKENIZER.special_ids["<|end|>"]


def compiled(*stop: str) -> StopStrings | None:
    return StopStrings.compile(stop, TOKENIZER.special_ids)


def stream(
    ids: list[int], stops: StopStrings | None, rng: random.Random | None = None
) -> tuple[list[str], int, bool]:
    """Feed ids in random portions: (pieces of text, tokens counted, whether it stopped)."""
    text, pieces, position = TextStream(TOKENIZER, stops), [], 0
    while True:
        portion = ids[position : position + (rng.randint(0, 4) if rng else 1)]
        position += len(portion)
        found = text.feed(portion, final=position == len(ids))
        pieces.append(text.take())
        if found or position == len(ids):
            return pieces, text.num_tokens, found


def oracle(ids: list[int], stop: list[str]) -> tuple[str, int, bool]:
    """Search the whole text again after each token: (text, tokens counted, whether it stopped)."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for count, token_id in enumerate(ids, 1):
        text += decoder.decode(TOKENIZER.visible[token_id], count == len(ids))
        begins = [text.find(string) for string in stop if string in text]
        if begins:
            return text[: min(begins)], count, True
    return text, len(ids), False


def random_emoji_ids(rng: random.Random, length: int) -> list[int]:
    """Mostly characters of several bytes, with a token for each byte; sometimes any id."""
    ids: list[int] = []
    while len(ids) < length:
        if rng.random() < 0.2:
            ids.append(rng.randrange(VOCAB_SIZE))
        else:
            ids += ids_of(rng.choice(["😀", "👩‍👩‍👧", "日本", "é", "hello", " the", "\n"]))
    return ids[:length]


@each_row("seed", range(20))
def test_pieces_of_a_stream_join_to_the_whole_text(seed):
    rng = random.Random(seed)
    for length in range(12):
        ids = random_emoji_ids(rng, length)
        whole = TOKENIZER.decode(ids)
        assert whole == TOKENIZER._backend.decode(ids, skip_special_tokens=True)
        for stops in (None, compiled("\x00 never said \x00")):
            pieces, count, found = stream(ids, stops, rng)
            assert "".join(pieces) == whole
            assert (count, found) == (length, False)


def test_no_piece_holds_half_a_character():
    ids = ids_of("a😀b")
    assert len(ids) > 4
    assert [piece for piece in stream(ids, None)[0] if piece] == ["a", "😀", "b"]
    assert stream(ids[:-2], None)[0][-1] == "�"


@each_row("seed", range(40))
def test_stop_strings_are_found_as_in_the_whole_text(seed):
    rng = random.Random(seed)
    alphabet = "ab é�日"
    vocabulary = [i for c in "ab é日" for i in ids_of(c)] + ids_of("the") + [EOS_ID]
    for _ in range(100):
        ids = [rng.choice(vocabulary) for _ in range(rng.randrange(14))]
        stop = list({"".join(rng.choices(alphabet, k=rng.randint(1, 3))) for _ in range(3)})
        pieces, count, found = stream(ids, compiled(*stop), rng)
        if ids:
            assert ("".join(pieces), count, found) == oracle(ids, stop), (ids, stop)


@each_row(
    "said, stop, text",
    [
        ("hello world", ["lo w"], "hel"),  # spans tokens
        ("hello world", ["ell"], "h"),  # inside a token
        ("one\n\nQuestion: two", ["\n\nQ"], "one"),
        ("smile 😀 now", ["😀"], "smile "),  # several tokens a character
        ("smile 😁 now", ["😀"], "smile 😁 now"),  # the same first bytes
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),  # overlaps itself
        ("abcd", ["bcd", "abc"], ""),
        ("abcx", ["abcd", "c"], "ab"),  # the first one begins, the second one ends
        ("hello", ["hello"], ""),
        ("ababa", ["aba"], ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(said, stop, text):
    for ids in (ids_of(said), [i for c in said for i in ids_of(c)]):
        pieces, count, found = stream(ids, compiled(*stop))
        assert "".join(pieces) == text
        assert found == (text != said)
        assert count <= len(ids)


def test_the_stop_string_that_ends_first_wins():
    one_by_one = [i for c in "abcd" for i in ids_of(c)]
    assert "".join(stream(one_by_one, compiled("abcd", "bc"))[0]) == "a"
    hello = ids_of(" world")[:1]  # both end in this token, and the first to begin wins
    word = TOKENIZER.decode(hello)
    assert "".join(stream(hello, compiled(word[1:2], word[:3]))[0]) == ""


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    pieces, _, found = stream(ids_of("x") + ids_of("a") + ids_of("b"), compiled("abc"))
    assert pieces == ["x", "", "ab"]
    assert not found


def test_only_what_may_begin_a_stop_string_is_held_back():
    pieces, _, _ = stream([i for c in "qabqabc" for i in ids_of(c)], compiled("abc"))
    assert pieces == ["q", "", "", "abq", "", "", ""]


def test_special_tokens_are_not_text_but_can_be_stop_strings():
    assert TOKENIZER.decode(ids_of("a<|end|>b</s>")) == "ab"
    assert compiled(EOS).token_ids == (EOS_ID,)
    assert compiled("x", "<|end|>", EOS).token_ids == (END_ID, EOS_ID)
    # Spelled with ordinary tokens, it is text, and still a stop string.
    spelled_out = [i for c in "a<|end|>b" for i in ids_of(c)]
    assert "".join(stream(spelled_out, compiled("<|end|>"))[0]) == "a"


@each_row(
    "said, stop, text",
    [
        ("one\n<|end|>two", "\n<|end|>", "one"),
        ("one<|end|>\ntwo", "<|end|>\n", "one"),
        ("one<|end|><|user|>two", "<|end|><|user|>", "one"),
        ("one<|end|>two", "<|end|>\n", "onetwo"),
        ("one\ntwo<|end|>", "e\nt<|end|>", "one\ntwo"),
        ("on<|end|>e", "one", ""),  # they are adjacent in the text
    ],
)
def test_a_stop_string_may_contain_special_tokens(said, stop, text):
    pieces, _, _ = stream(ids_of(said), compiled(stop))
    assert "".join(pieces) == text
    for piece in pieces:
        assert not any(name in piece for name in SPECIAL)


def test_a_hundred_long_stop_strings_cost_no_more_than_one():
    stop = [f"{'ab' * 200}{number}" for number in range(100)]
    ids = ids_of("ab") * 500
    pieces, _, found = stream(ids, compiled(*stop))
    assert "".join(pieces) == "ab" * 500
    assert not found
