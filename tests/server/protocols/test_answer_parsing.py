"""Calls and reasoning in an answer's text, cut at every position."""

from __future__ import annotations

import json
import random

from rows import each_row

from tokasaurus.server.protocols.tools.answer import AnswerDeltas
from tokasaurus.server.protocols.tools.call_reader import CallReader, _ValueEnd
from tokasaurus.server.protocols.tools.parsing import AnswerParser, HermesParser, Llama3Parser
from tokasaurus.server.protocols.tools.reasoning import ReasoningParser

BYTES = [bytes([value]) for value in range(256)]  # each is a token
ARGUMENTS = [
    '{"city": "Paris", "days": [1, {"a": "}]"}]}',
    "{}",
    '{"q": "say \\"<tool_call>\\" \\\\"}',
]


def hermes(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name, arguments):
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def parser(kind, *, reasons=False, inside=False, max_calls=None):
    tools = {"hermes": HermesParser, "llama3": lambda: Llama3Parser(["f", "g"]), None: lambda: None}
    reasoning = ReasoningParser(inside, BYTES) if reasons else None
    return AnswerParser(tools[kind](), reasoning, max_calls)


def read(kind, pieces, **options):
    """Add up a stream as a client does: (content, reasoning, [(name, arguments)])."""
    answer = AnswerDeltas(parser(kind, **options))
    content, reasoning, calls = "", "", []
    for number, piece in enumerate(pieces):
        delta = answer.delta(piece, piece.encode(), final=number == len(pieces) - 1)
        content += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["type"] == "function"
                calls.append([call["function"]["name"], ""])
            assert call["index"] == len(calls) - 1  # calls do not overlap
            calls[-1][1] += call["function"]["arguments"]
    return content, reasoning, [tuple(call) for call in calls]


A, B, C = ARGUMENTS
CASES = [
    # kind, text, content, calls
    ("hermes", "plain text", "plain text", []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "trailing \n", "trailing \n", []),
    ("hermes", "a \n<tool_call>b</tool_call>\n", "a \n<tool_call>b</tool_call>\n", []),
    ("hermes", "a \n<tool_call>b", "a \n<tool_call>b", []),
    ("hermes", hermes("f", A), "", [("f", A)]),
    ("hermes", hermes("f", C), "", [("f", C)]),
    (
        "hermes",
        f"Let me see.\n{hermes('f', A)}\n{hermes('g', B)}\n",
        "Let me see.",
        [("f", A), ("g", B)],
    ),
    ("hermes", f"{hermes('f', B)}\nDone.", "Done.", [("f", B)]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"id": 7, "name":"f","arguments":null }</tool_call>',
        "",
        [("f", "null")],
    ),
    # Cut off by the limit of tokens.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "<tool_call>", "<tool_call>", []),
    # No calls.
    ("hermes", "<tool_call>nonsense</tool_call> x", "<tool_call>nonsense</tool_call> x", []),
    ("hermes", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    # Calls that break in the middle, or are followed by something.
    ("hermes", f"<tool_call>{llama('f', B)}}}</tool_call> so", "} so", [("f", B)]),
    ("hermes", f"<tool_call>{llama('f', A)} or\n not </tool_call>\nB", "or\n not\nB", [("f", A)]),
    ("hermes", '<tool_call>{"name": "f", "why" not}</tool_call> x', '"why" not} x', [("f", "")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> x',
        "x",
        [("f", '{"a": 1')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1<tool_call> x',
        "<tool_call> x",
        [("f", '{"a": 1')],
    ),
    (
        "hermes",
        f"<tool_call>{llama('f', B)} I forgot to close it.",
        "I forgot to close it.",
        [("f", B)],
    ),
    ("hermes", f"<tool_call>{llama('f', B)}\n</tool_cal", "", [("f", B)]),
    ("hermes", f"<tool_call>a{hermes('f', B)}", "<tool_call>a", [("f", B)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1', "", [("f", '"{\\"a\\": 1')]),
    ("llama3", '{"name": "f", "parameters": {}, not}; x', "not}; x", [("f", "{}")]),
    ("llama3", '{"name": "f", "parameters": {"a": <1>}} x', "<1>}} x", [("f", '{"a": ')]),
    ("llama3", f"{llama('f', B)}; <|python", "<|python", [("f", B)]),
    ("llama3", f'{llama("f", B)}; {{"answer": 1}}', '{"answer": 1}', [("f", B)]),
    # The closing mark was forgotten.
    (
        "hermes",
        f"<tool_call>{llama('f', A)}\n{hermes('g', B)}",
        "",
        [("f", A), ("g", B)],
    ),
    ("llama3", "plain {text}", "plain {text}", []),
    ("llama3", llama("f", A), "", [("f", A)]),
    ("llama3", f"\n<|python_tag|>{llama('f', A)}; {llama('g', C)}", "", [("f", A), ("g", C)]),
    ("llama3", f"{llama('f', B)}\n{llama('g', B)}\n", "", [("f", B), ("g", B)]),
    ("llama3", f"{llama('f', B)} and more", "and more", [("f", B)]),
    ("llama3", llama("unknown", A), llama("unknown", A), []),
    ("llama3", '{"answer": [1, 2]} ', '{"answer": [1, 2]} ', []),
    ("llama3", '{"answer": 1', '{"answer": 1', []),
    ("llama3", '{"name": "f", "parameters": {"a": "x', "", [("f", '{"a": "x')]),
    ("llama3", "", "", []),
]


def cuts(text, rng):
    """Pieces of a text: whole, single characters, cut in two everywhere, and random cuts."""
    yield [text]
    yield [*text, ""]
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    for _ in range(20):
        places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 6)))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@each_row("kind, text, content, calls", CASES)
def test_calls_are_found_however_the_text_is_cut(kind, text, content, calls):
    for pieces in cuts(text, random.Random(0)):
        assert read(kind, pieces) == (content, "", calls), pieces


REASONING = [
    # text, inside, reasoning, content
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
    ("\n<think>a < b</thin</think>c", False, "a < b</thin", "c"),
    ("Hm.\n</think>\n\nYes. </think>", True, "Hm.", "Yes. </think>"),
    ("Hm, ", True, "Hm,", ""),
    ("<think>cut off </th", False, "cut off </th", ""),
    ("No <think>thoughts</think>", False, "", "No <think>thoughts</think>"),
    ("<thin", False, "", "<thin"),
    (" x", False, "", " x"),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
]


@each_row("text, inside, reasoning, content", REASONING)
def test_reasoning_is_found_however_the_text_is_cut(text, inside, reasoning, content):
    for pieces in cuts(text, random.Random(1)):
        assert read(None, pieces, reasons=True, inside=inside) == (content, reasoning, []), pieces


def test_reasoning_before_calls():
    text = f"<think>I call <tool_call> now</think>\n\n{hermes('f', A)}"
    for pieces in cuts(text, random.Random(2)):
        found = read("hermes", pieces, reasons=True)
        assert found == ("", "I call <tool_call> now", [("f", A)]), pieces


def test_calls_beyond_max_calls_are_dropped():
    text = f"{hermes('f', A)}\n{hermes('g', C)}"
    for pieces in cuts(text, random.Random(3)):
        assert read("hermes", pieces, max_calls=1) == ("", "", [("f", A)]), pieces


def test_a_whole_message_holds_content_reasoning_and_calls():
    answer = AnswerDeltas(parser("hermes", reasons=True))
    message = answer.message(f"<think>so</think>{hermes('f', A)}{hermes('g', B)}", [])
    assert (message["content"], message["reasoning_content"]) == (None, "so")
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [
        json.loads(A),
        {},
    ]
    assert {call["id"][:5] for call in message["tool_calls"]} == {"call_"}
    assert answer.finish_reason("stop") == "tool_calls"
    assert answer.finish_reason("length") == "length"
    empty = AnswerDeltas(parser("hermes"))
    assert empty.message("", []) == {"role": "assistant", "content": ""}
    assert empty.finish_reason("stop") == "stop"


@each_row("seed", range(200))
def test_texts_without_calls_come_out_unchanged(seed):
    """Texts of random fragments; all cuts of a text give the same answer."""
    rng = random.Random(seed)
    fragments = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        ":",
        '"f"',
        ",",
        " ",
        "\n",
        "x",
        "[",
        '"',
    ]
    text = "".join(rng.choice(fragments) for _ in range(rng.randrange(1, 14)))
    for kind in ("hermes", "llama3"):
        whole = read(kind, [text])
        for pieces in cuts(text, rng):
            assert read(kind, pieces) == whole, (kind, pieces)
        if not whole[2] and kind == "llama3":
            assert whole[0] == text.lstrip() or whole[0] == text
        if not whole[2] and kind == "hermes":
            assert whole[0] == text


@each_row("seed", range(300))
def test_every_word_of_a_model_arrives_once(seed):
    """Words stand between and inside the parts of calls, which are whole, broken or cut off."""
    rng = random.Random(seed)
    syntax = [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool_call>{",
            "}</tool_call>",
            "; ",
            "\n",
            "<|python_tag|>",
        ),
        *('{"name": "f", ', '"arguments": {', '"parameters": {"a": "', '"}}', "}", "}}", ", "),
        *(hermes("f", A), llama("g", B), '{"name": "f", "arguments": {}} '),
    ]
    number, pieces = 0, []
    for _ in range(rng.randrange(1, 12)):
        if rng.random() < 0.5:
            pieces.append(f"w{number}w")
            number += 1
        else:
            pieces.append(rng.choice(syntax))
    text = "".join(pieces)
    for kind in ("hermes", "llama3"):
        whole = content, _, calls = read(kind, [text])
        for pieces in cuts(text, rng):
            assert read(kind, pieces) == whole, (kind, pieces)
        said = content + "".join(arguments for _, arguments in calls)
        assert [said.count(f"w{each}w") for each in range(number)] == [1] * number, (kind, text)


@each_row(
    "text, content, calls",
    [
        (hermes("\\ud800", A), hermes("\\ud800", A), []),
        (hermes("f", '"\\ud800"'), "", [("f", '"\\ud800"')]),
        (hermes("f", '{"a": "\\ud800"}'), "", [("f", '{"a": "\\ud800"}')]),
    ],
)
def test_halves_of_surrogate_pairs_stay_escaped(text, content, calls):
    """JSON can escape them, but no answer could encode them."""
    assert read("hermes", [text]) == (content, "", calls)
    assert read("hermes", list(text)) == (content, "", calls)


def test_each_character_of_a_key_is_read_once(monkeypatch):
    """The number of pieces does not matter: a key may be as long as the context."""
    num_read = 0
    find = _ValueEnd.find

    def counted(self, text, start):
        nonlocal num_read
        num_read += len(text) - start
        return find(self, text, start)

    monkeypatch.setattr(_ValueEnd, "find", counted)
    reader = CallReader()
    for piece in ["{", '"', *["ab"] * 500, '": 1']:
        reader.feed(piece)
    assert num_read < 2000
    assert not reader.is_broken
