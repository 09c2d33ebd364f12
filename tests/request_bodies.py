"""Bodies of requests for fuzzing: valid ones, and the same after tampering.

Valid bodies are as clients send them. Tampering

- drops and doubles fields, changes types, inserts numbers that no machine has, and nests deeply;
- then breaks the JSON itself: NaN, halves of surrogate pairs, invalid UTF-8, repeated names.

The results are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["BODIES", "batch_files", "bodies", "tampered"]


@dataclass(frozen=True)
class Raw:
    """A text that is its own JSON."""

    text: str


TEXTS = st.one_of(
    st.sampled_from(
        ["the cat", "", " ", "naïve élan", "<s><|end|>", "\x00", "{{ x }}", "\U0001d538\u200b"]
    ),
    st.text(max_size=20),
    st.builds(
        lambda piece, count: piece * count, st.sampled_from(["a", "cat ", "é"]), st.integers(1, 300)
    ),
)
TOKEN_IDS = st.lists(st.integers(0, 290), min_size=1, max_size=12)
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {},
            {"type": "string"},
            {"type": "integer", "minimum": 3, "maximum": 1},
            {"type": "string", "pattern": "^(a|b{2,})+$"},
            {"enum": ["a", 1, None]},
            {"const": {}},
            {"$ref": "#"},
            {"$ref": "#/nowhere"},
            {"not": {}},
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.text(max_size=3), inner, max_size=3),
            }
        ),
    ),
    max_leaves=4,
)
PATTERNS = st.one_of(
    st.sampled_from(
        ["[a-z]+", "(", "a{9999}", "(a|a)*b", "\\d{3}", "(?=a)", "[^\\W]", "(?P<x>a)", "(" * 60, ""]
    ),
    st.text(max_size=8),
)
GRAMMARS = st.one_of(
    st.sampled_from(
        [
            'start: "a"',
            'root ::= "a" root | "b"',
            "start: start",
            "start: nothing",
            "start:",
            "%import x",
        ]
    ),
    st.text(max_size=20),
)
CHOICES = st.lists(st.text(max_size=5), max_size=3)
STRUCTURED = st.one_of(
    st.fixed_dictionaries({"json": st.one_of(SCHEMAS, SCHEMAS.map(json.dumps))}),
    st.fixed_dictionaries({"regex": PATTERNS}),
    st.fixed_dictionaries({"choice": CHOICES}),
    st.fixed_dictionaries({"grammar": GRAMMARS}),
    st.just({"json_object": True}),
)
RESPONSE_FORMATS = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.builds(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        SCHEMAS,
    ),
)
FORMS = st.sampled_from(
    [
        "",
        "",
        "",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ]
)

SAMPLING: dict[str, SearchStrategy[Any]] = {
    "model": st.sampled_from(["m", ""]),
    "n": st.integers(1, 4),
    "temperature": st.sampled_from([0, 0.5, 1, 2.0]),
    "top_p": st.sampled_from([0.1, 1]),
    "top_k": st.sampled_from([-1, 0, 5]),
    "min_p": st.sampled_from([0, 0.5]),
    "seed": st.integers(0, (1 << 63) - 1),
    "stop": st.one_of(
        st.text(min_size=1, max_size=3), st.lists(st.text(min_size=1, max_size=3), max_size=4)
    ),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, 290), max_size=3),
    "min_tokens": st.integers(0, 4),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 290).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.sampled_from(["cat", "é", " dog"]), max_size=3),
    "max_tokens": st.integers(4, 20),
    "prompt_logprobs": st.integers(0, 3),
    "logprobs_mode": st.sampled_from(["raw", "temperature", "processed"]),
    "logprobs_ignore_temperature": st.booleans(),
    "logprobs_in_fingerprint": st.booleans(),
    "priority": st.integers(-9, 9),
    "first_k": st.just(1),
    "return_weights_versions": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([{"include_usage": True}, {"continuous_usage_stats": True}]),
    "user": st.sampled_from(["u", ""]),
    "metadata": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    "service_tier": st.sampled_from(["auto", "default", "flex", "priority"]),
    "best_of": st.just(1),
}
TOOL = st.builds(
    lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
    st.sampled_from(["f", "get_weather", "a-b"]),
    SCHEMAS,
)
CALL = st.builds(
    lambda name, arguments: {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["f", ""]),
    st.sampled_from(["{}", '{"a": 1}', "", "[", "null"]),
)
CONTENTS = st.one_of(
    TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(
            lambda role, content: {"role": role, "content": content},
            st.sampled_from(["user", "system", "assistant"]),
            CONTENTS,
        ),
        st.builds(
            lambda calls: {"role": "assistant", "content": None, "tool_calls": calls},
            st.lists(CALL, max_size=2),
        ),
        st.builds(
            lambda content: {"role": "assistant", "reasoning_content": "x", "content": content},
            CONTENTS,
        ),
    ),
    min_size=1,
    max_size=4,
)
PROMPTS = st.one_of(
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=3),
    TOKEN_IDS,
    st.lists(TOKEN_IDS, min_size=1, max_size=3),
)


@st.composite
def _object(
    draw: Callable[..., Any], required: dict[str, Any], optional: dict[str, Any], form: bool = False
) -> dict[str, Any]:
    """The required fields and few of the others, so that requests seldom contradict themselves."""
    names = (
        draw(st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True))
        if optional
        else []
    )
    body = {name: draw(each) for name, each in required.items()}
    body |= {name: draw(optional[name]) for name in names}
    kind = draw(FORMS) if form else ""
    if kind:
        values = {
            "response_format": RESPONSE_FORMATS,
            "structured_outputs": STRUCTURED,
            "guided_json": SCHEMAS,
            "guided_regex": PATTERNS,
            "guided_choice": CHOICES,
            "guided_grammar": GRAMMARS,
        }
        body[kind] = draw(values[kind])
    return body


def _without(*names: str) -> dict[str, SearchStrategy[Any]]:
    return {name: each for name, each in SAMPLING.items() if name not in names}


CHAT_FIELDS = {
    **SAMPLING,
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "tools": st.lists(TOOL, max_size=2),
    "tool_choice": st.sampled_from(
        ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": st.sampled_from(
        [
            {"shout": True},
            {"enable_thinking": False},
            {"tools": 3},
            {"messages": []},
            {"chat_template": "{{ 1 / 0 }}"},
            {"chat_template": "{%"},
            {"tokenize": True},
            {"padding": 7},
            {"return_dict": True},
        ]
    ),
    "max_completion_tokens": st.integers(1, 20),
}
TOOLS_TEMPLATE = "{{ tools }}<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
CHATS = st.one_of(
    _object({"messages": MESSAGES}, CHAT_FIELDS, form=True),
    _object(
        {
            "messages": MESSAGES,
            "tools": st.lists(TOOL, min_size=1, max_size=2),
            "chat_template_kwargs": st.just({"chat_template": TOOLS_TEMPLATE}),
        },
        CHAT_FIELDS,
    ),
    _object({"ids": TOKEN_IDS}, SAMPLING),
)
FLAT_TOOL = st.builds(
    lambda tool, strict: {"type": "function", **tool["function"], "strict": strict},
    TOOL,
    st.sampled_from([None, True, False]),
)
INPUT_PARTS = st.lists(TEXTS.map(lambda text: {"type": "input_text", "text": text}), max_size=2)
INPUT_ITEMS = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "developer", "assistant"]),
        st.one_of(TEXTS, INPUT_PARTS),
    ),
    st.builds(
        lambda called: {"type": "function_call", "call_id": "call_1", **called["function"]}, CALL
    ),
    st.builds(
        lambda output: {"type": "function_call_output", "call_id": "call_1", "output": output},
        st.one_of(TEXTS, INPUT_PARTS),
    ),
    TEXTS.map(
        lambda text: {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}
    ),
)
INPUTS = st.one_of(TEXTS, st.lists(INPUT_ITEMS, max_size=4))
RESPONSE_FIELDS = {
    **_without(
        "n",
        "first_k",
        "return_weights_versions",
        "max_tokens",
        "logprobs_in_fingerprint",
        "prompt_logprobs",
        "stream_options",
        "best_of",
    ),
    "max_output_tokens": st.integers(1, 20),
    "instructions": TEXTS,
    "top_logprobs": st.integers(0, 3),
    "include": st.just(["message.output_text.logprobs"]),
    "text": st.builds(
        lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}},
        SCHEMAS,
    ),
    "tools": st.lists(FLAT_TOOL, max_size=2, unique_by=lambda tool: tool["name"]),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "name": "f"}]),
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": CHAT_FIELDS["chat_template_kwargs"],
}
RESPONSES = st.one_of(
    _object({"input": INPUTS}, RESPONSE_FIELDS),
    _object(
        {
            "input": INPUTS,
            "tools": st.lists(
                FLAT_TOOL, min_size=1, max_size=2, unique_by=lambda tool: tool["name"]
            ),
            "chat_template_kwargs": st.just({"chat_template": TOOLS_TEMPLATE}),
        },
        RESPONSE_FIELDS,
    ),
)
SGLANG_SAMPLING = _object(
    {},
    {
        "n": st.integers(1, 3),
        "max_new_tokens": st.integers(0, 20),
        "temperature": st.floats(0, 2),
        "top_k": st.integers(-1, 5),
        "stop": st.lists(st.text(max_size=3), max_size=2),
        "sampling_seed": st.integers(0, 99),
        "json_schema": SCHEMAS.map(json.dumps),
        "regex": PATTERNS,
        "ebnf": GRAMMARS,
        "logit_bias": SAMPLING["logit_bias"],
    },
)
_FLAG = st.one_of(st.booleans(), st.lists(st.booleans(), max_size=3))
_COUNT = st.one_of(st.integers(-1, 3), st.lists(st.integers(-1, 3), max_size=3))
SGLANG_FIELDS = {
    "sampling_params": st.one_of(SGLANG_SAMPLING, st.lists(SGLANG_SAMPLING, max_size=3)),
    "return_logprob": _FLAG,
    "logprob_start_len": _COUNT,
    "top_logprobs_num": _COUNT,
    "return_text_in_logprobs": st.booleans(),
    "stream": st.booleans(),
    "rid": st.one_of(st.just("r"), st.lists(st.just("r"), max_size=3)),
}

BODIES: dict[str, SearchStrategy[Any]] = {
    "/v1/completions": _object(
        {"prompt": PROMPTS},
        {**SAMPLING, "logprobs": st.integers(0, 3), "echo": st.booleans()},
        form=True,
    ),
    "/v1/chat/completions": CHATS,
    "/v1/responses": RESPONSES,
    "/v1/embeddings": _object(
        {"input": PROMPTS},
        {
            "encoding_format": st.sampled_from(["float", "base64"]),
            "dimensions": st.integers(1, 9),
            "pooling": st.sampled_from(["mean", "last"]),
            "priority": st.integers(-9, 9),
        },
    ),
    "/generate": st.one_of(
        _object(
            {"prompt": st.one_of(TEXTS, TOKEN_IDS)},
            {
                **_without("stream_options", "logprobs_in_fingerprint"),
                "logprobs": st.integers(0, 3),
                "system": TEXTS,
            },
            form=True,
        ),
        _object({"text": st.one_of(TEXTS, st.lists(TEXTS, max_size=3))}, SGLANG_FIELDS),
        _object(
            {"input_ids": st.one_of(TOKEN_IDS, st.lists(TOKEN_IDS, max_size=3))}, SGLANG_FIELDS
        ),
    ),
    "/custom/synchronous-batch-completions": st.fixed_dictionaries(
        {"requests": st.lists(CHATS, max_size=3)}
    ),
    "/tokenize": st.one_of(
        _object(
            {"prompt": TEXTS},
            {"add_special_tokens": st.booleans(), "return_token_strs": st.booleans()},
        ),
        _object(
            {"messages": MESSAGES},
            {
                "add_generation_prompt": st.booleans(),
                "continue_final_message": st.booleans(),
                "chat_template_kwargs": CHAT_FIELDS["chat_template_kwargs"],
            },
        ),
    ),
    "/detokenize": _object({"tokens": st.lists(st.integers(0, 290), max_size=9)}, {}),
    "/v1/batches": st.fixed_dictionaries(
        {
            "input_file_id": st.sampled_from(["file-1", "", "../x", "\x00"]),
            "endpoint": st.sampled_from(["/v1/completions", "/v1/nothing"]),
            "completion_window": st.sampled_from(["24h", "1s", "x"]),
        },
        optional={
            "metadata": SAMPLING["metadata"],
            "output_expires_after": st.just({"anchor": "created_at", "seconds": 9}),
        },
    ),
}
"""Requests as clients send them, by path. Most are valid."""

NUMBERS = [
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-0",
    "0.1e-400",
    "1" * 400,
    "-" + "9" * 5000,
    "1" + "0" * 20,
    "9223372036854775808",
    "-1",
    "0",
    "4294967296",
    "65537",
    "1.0",
    "1e2",
    "0.5",
]
STRANGE = st.one_of(
    st.sampled_from(NUMBERS).map(Raw),
    st.sampled_from(
        [None, True, False, "", [], {}, [[]], {"": None}, "1", "auto", [None], [""], [{}]]
    ),
    st.sampled_from(
        [
            '"\\ud800"',
            '"\\udc00\\ud800"',
            '"\\u0000"',
            '"\\ud83d\\ude00"',
            "'a'",
            "undefined",
            "{,}",
            '{"a":1,"a":2}',
        ]
    ).map(Raw),
    st.sampled_from([100, 300, 450, 700, 900, 960, 975, 985, 990, 995, 2_000, 100_000]).flatmap(
        lambda depth: st.sampled_from(
            [
                Raw("[" * depth + "]" * depth),
                Raw('{"a":' * depth + "1" + "}" * depth),
                Raw('{"items":' * depth + "{}" + "}" * depth),
            ]
        )
    ),
    st.sampled_from(["x", "é", "\\", "(", "\x00"]).map(lambda piece: piece * 100_000),
    st.sampled_from([[0] * 3_000, ["a"] * 70_000, [[1]] * 70_000]),
    st.text(max_size=5),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "",
            "(",
            "[",
            "\\",
            "\\1",
            "a.b",
            "__class__",
            "n\n",
            "*",
            "stream_",
            "Prompt",
            "\x00",
            "é",
        ]
    ),
    st.sampled_from(
        sorted(
            {
                *CHAT_FIELDS,
                *RESPONSE_FIELDS,
                *SGLANG_FIELDS,
                "functions",
                "suffix",
                "store",
                "tools",
                "echo",
                "ids",
            }
        )
    ),
    st.text(max_size=6),
)


@st.composite
def tampered(draw: Callable[..., Any], valid: SearchStrategy[Any]) -> Any:
    """A request with up to three places changed; half of the requests are unchanged."""
    body = draw(valid)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3]))):
        body = _change(draw, body)
    return body


def _change(draw: Callable[..., Any], node: Any) -> Any:
    """Descend to a random place, and change what is there."""
    if isinstance(node, dict) and node and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(node)))
        if draw(st.integers(0, 4)) == 0:
            return {each: value for each, value in node.items() if each != name}
        return {**node, name: _change(draw, node[name])}
    if isinstance(node, dict) and draw(st.integers(0, 2)):
        return {**node, draw(NAMES): draw(STRANGE)}
    if isinstance(node, list) and node and draw(st.booleans()):
        position = draw(st.integers(0, len(node) - 1))
        return [*node[:position], _change(draw, node[position]), *node[position + 1 :]]
    if isinstance(node, list) and draw(st.booleans()):
        return [*node, draw(STRANGE)]
    return draw(STRANGE)


def _encoded(node: Any, ascii_only: bool) -> str:
    if isinstance(node, Raw):
        return node.text
    if isinstance(node, dict):
        pairs = (
            f"{_encoded(name, ascii_only)}:{_encoded(value, ascii_only)}"
            for name, value in node.items()
        )
        return "{" + ",".join(pairs) + "}"
    if isinstance(node, list):
        return "[" + ",".join(_encoded(each, ascii_only) for each in node) + "]"
    return json.dumps(node, ensure_ascii=ascii_only)


@st.composite
def bodies(draw: Callable[..., Any], path: str) -> bytes:
    """Bodies for a path."""
    node = draw(tampered(BODIES[path]))
    data = _encoded(node, draw(st.booleans())).encode(errors="surrogatepass")
    match draw(st.sampled_from([None] * 12 + [0, 1, 2])):
        case 0:
            position = draw(st.integers(0, len(data)))
            piece = draw(
                st.sampled_from(
                    [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\n", b",", b"}", b'"']
                )
            )
            data = data[:position] + piece + data[position:]
        case 1:
            data = data[: draw(st.integers(0, len(data)))]
        case 2 if data.startswith(b"{") and len(data) > 2:
            data = data[:-1] + b"," + data[1:]  # every name twice
    return data


@st.composite
def batch_files(draw: Callable[..., Any]) -> bytes:
    """Input files of batches: lines with requests, and other lines."""
    lines = []
    for number in range(draw(st.integers(0, 5))):
        url = draw(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]))
        line = st.fixed_dictionaries(
            {
                "custom_id": st.sampled_from([f"line {number}", "same"]),
                "method": st.just("POST"),
                "url": st.just(url),
                "body": BODIES[url],
            }
        )
        text = _encoded(draw(tampered(line)), True).encode(errors="surrogatepass")
        match draw(st.sampled_from([None] * 8 + [0, 1])):
            case 0:
                text = draw(st.binary(max_size=20))
            case 1:
                text = text[: draw(st.integers(0, len(text)))]
        lines.append(text)
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines) + draw(
        st.sampled_from([b"", b"\n"])
    )
