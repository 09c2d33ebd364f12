"""Records what an engine answers, and compares two records.

Two records tell whether two versions of the engine answer alike. The script starts `toka` with its
demo model and sends it a fixed list of requests. It writes down each answer: the status, the
headers, the body. It masks what differs between any two runs: ids, times, counters. Then it asks a
second engine, with other flags, a few requests more.

    python tests/recorded_answers.py record OUT.json [--toka PATH]
    python tests/recorded_answers.py compare A.json B.json [--tolerance 1e-6]

The first command records any version: it needs the engine's packages, and no code of this project.
`PATH` is the `toka` to start; without it, the one beside this Python. The second command prints
every difference and exits with 1 if there is one.

Requests run one after the other, since others in the same batch change how logprobs are rounded. A
few requests make company of their own: lists of prompts, batches, and a crowd that asks at the same
time. Where such company changes from run to run, the record has texts and no logprobs.

A stream is put together again before it is written down: the pieces of each choice become one. How
many tokens a piece brings depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

START_S = 180.0  # that an engine may take to be ready
ANSWER_S = 120.0  # that one answer may take
CROWD = 32
KEY = "a-key-for-tests"

# A fixed size of the cache and of the pool of threads: by default both follow the machine.
FLAGS = (
    "uvicorn_log_level=warning",
    "kv_cache_num_tokens=32768",
    "cpu_threads=1",
    "stats_report_seconds=0",
    "max_request_priority=1000000",
)
MAIN_FLAGS = (*FLAGS, "trust_request_chat_template=T")
OTHER_FLAGS = (
    *FLAGS,
    f"api_key={KEY}",
    "served_model_name=other",
    "tool_call_parser=llama3",
    "reasoning_parser=think",
    "embedding_pooling=last",
    "unsafe_pickle_responses=T",
    "cors_origins=https://example.org",
    "logprobs_mode=processed",
    "max_n=4",
    "max_topk_logprobs=2",
    "max_body_bytes=20000",
    "max_num_tokens_per_request=256",
    "max_stored_bytes=2000",
    # Long prompts come in pieces, and prefixes are shared.
    "page_size=8",
    "max_tokens_per_forward=32",
    "max_seqs_per_forward=8",
    "scheduling_steps_ahead=2",
    "use_hydragen=T",
    "hydragen_min_group_size=2",
    "hydragen_min_prefix_len=8",
)


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request.

    Args:
        name: its own among all.
        path: of the route, with what follows a question mark.
        body: bytes are sent as they are, None is no body, anything else is sent as JSON.
        method: of HTTP.
        headers: instead of, and besides, the usual ones.
        hidden: fields of the answer that depend on the moment, wherever they stand in it.
    """

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()


COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
GENERATE, EMBEDDINGS = "/generate", "/v1/embeddings"
SYNCHRONOUS, FILES, BATCHES = "/custom/synchronous-batch-completions", "/v1/files", "/v1/batches"
GENERATING = (COMPLETIONS, CHAT, RESPONSES, GENERATE, EMBEDDINGS)

PATTERN = "A B C D A B C D A B"
JOKE = {"role": "user", "content": "tell me a joke"}
JOKE_IDS = [0, 5, 817, 1580, 1491, 1789, 2, 6]  # as the demo model's chat template writes it
FACT = {"role": "user", "content": "Is a Tyrannosaurus big?"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"type": "integer"}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
LARK = 'start: ANIMAL " " ANIMAL\nANIMAL: "cat" | "dog" | "bird"'
GBNF = 'root ::= "yes" | "no" [.!]'
GREEDY: Mapping[str, Any] = {"temperature": 0, "max_tokens": 10}
# All samples are as long: where one ends earlier, the moment decides what runs beside the others.
DRAWN: Mapping[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 10, "ignore_eos": True}

# Templates of requests: the demo model's own has neither tools nor reasoning.
SHOWN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}{% endfor %}"
)
TURN = "{{ bos_token }}" + SHOWN + "<|assistant|>"
HERMES = {
    "chat_template": "{% if tools %}{{ tools[0].function.name }}{% endif %}{# <tool_call> #}" + TURN
}
LLAMA3 = {"chat_template": "{# {{ tools }} <|python_tag|> #}{% if tools %}{% endif %}" + TURN}
THINKS = {"chat_template": "{# <think> </think> #}" + TURN}
THINKING = {"chat_template": TURN + "<think>"}
ALL_SHOWN = {"chat_template": "{{ messages }}{{ tools }}<tool_call>"}

WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "description": "The time."}
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
FLAT_TOOLS = [{"type": "function", **each} for each in (WEATHER, CLOCK)]
CALLED = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def forcing(pieces: Sequence[str], tokens: Mapping[str, tuple[int, int]]) -> Record:
    """Fields that make the model say these pieces, one after the other.

    No other token comes near them, and a wrong one among them is a bad word after what precedes it.

    Args:
        pieces: each a token's text.
        tokens: the id of each, and what is added to its logit.
    """
    words = set()
    for end in range(1, len(pieces)):
        before = _unique_end(pieces[:end], pieces)
        right = _following(before, pieces)
        words |= {"".join([*before, other]) for other in tokens if other not in right}
    bias = {str(token_id): added for token_id, added in tokens.values()}
    return {"bad_words": sorted(words), "logit_bias": bias, "temperature": 0}


def _unique_end(begun: Sequence[str], pieces: Sequence[str]) -> Sequence[str]:
    """The shortest end of what has begun that goes on in one way only; else all of it."""
    ends = (begun[start:] for start in range(len(begun) - 1, -1, -1))
    return next((end for end in ends if len(_following(end, pieces)) == 1), begun)


def _following(before: Sequence[str], pieces: Sequence[str]) -> set[str]:
    """What comes after these pieces, wherever they stand."""
    length = len(before)
    places = range(len(pieces) - length)
    return {pieces[each + length] for each in places if pieces[each : each + length] == before}


# The demo model's tokens of a closing mark, and of a call as Llama 3 writes it.
MARK = {"th": (313, 100), "ink": (466, 50), ">": (36, 50), "<": (34, 50), "/": (21, 50)}
CLOSING_MARK = forcing([*MARK, "th"], MARK)
CALL_START, CALL_END = ["{", '"', "name", '"', ":", '"', "q", '"', ",", '"'], ['"', ":", *"{}}"]
CALL = [*CALL_START, "par", "ame", "ter", "s", *CALL_END]
CALL_TOKENS = {
    "{": (97, 100),
    '"': (8, 80),
    ":": (32, 80),
    ",": (18, 80),
    "}": (99, 40),
    "name": (362, 50),
    "par": (704, 50),
    "ame": (1296, 50),
    "ter": (404, 50),
    "s": (89, 30),
    "q": (87, 30),
}


def variants(prefix: str, path: str, base: Record, table: Mapping[str, Record]) -> list[Ask]:
    """The same request with different fields."""
    return [Ask(f"{prefix}: {name}", path, {**base, **more}) for name, more in table.items()]


def completions() -> list[Ask]:
    base = {"prompt": PATTERN, **GREEDY}
    drawn = {"prompt": "The cat", **DRAWN}
    return [
        *variants("completions", COMPLETIONS, base, GREEDY_COMPLETIONS),
        *variants("completions", COMPLETIONS, base, PROMPTS),
        *variants("completions drawn", COMPLETIONS, drawn, SAMPLED),
        *variants("completions form", COMPLETIONS, {**base, "max_tokens": 40}, FORMS),
        *variants("completions stream", COMPLETIONS, {**base, "stream": True}, COMPLETION_STREAMS),
        Ask("completions: defaults", COMPLETIONS, {"prompt": "The cat", "seed": 1}),
        Ask("completions: harmless fields", COMPLETIONS, {**base, **HARMLESS}),
        Ask("completions: null fields", COMPLETIONS, {**base, **dict.fromkeys(NULLS)}),
        *first_of_three(),
    ]


LONGER = {"prompt": "The cat", "max_tokens": 20}  # long enough to change its mind
GREEDY_COMPLETIONS: Mapping[str, Record] = {
    "plain": {},
    "again": {},
    "another model's name": {"model": "whatever"},
    "n": {"n": 3},
    "one token": {"max_tokens": 1},
    "to the end": {"prompt": JOKE_IDS, "max_tokens": 60},
    "past the end": {"prompt": JOKE_IDS, "max_tokens": 40, "ignore_eos": True},
    "stop": {"stop": " D"},
    "stop list": {"stop": ["zebra", "B C", " D A"]},
    "stop within a token": {"prompt": "one two three one two", "stop": "rt"},
    "stop that does not come": {"stop": "zebra"},
    "stop token": {"stop_token_ids": [1515]},
    "stop token with logprobs": {"stop_token_ids": [1515], "logprobs": 1},
    "min_tokens": {"stop": " D", "min_tokens": 6},
    "min_tokens at the end": {"prompt": JOKE_IDS, "min_tokens": 30, "max_tokens": 40},
    "frequency_penalty": {**LONGER, "frequency_penalty": 2},
    "presence_penalty": {**LONGER, "presence_penalty": -2},
    "repetition_penalty": {**LONGER, "repetition_penalty": 3.0},
    "low repetition_penalty": {**LONGER, "repetition_penalty": 0.5},
    "logit_bias": {"logit_bias": {"1515": -100, "1562": 2.5}},
    "bad_words": {"bad_words": ["C", " D A"]},
    "logprobs 0": {"logprobs": 0},
    "logprobs 1": {"logprobs": 1},
    "logprobs 2": {"logprobs": 2},
    "logprobs 3": {"logprobs": 3},
    "logprobs 4": {"logprobs": 4},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20, "max_tokens": 2},
    "prompt_logprobs 0": {"prompt_logprobs": 0, "max_tokens": 1},
    "prompt_logprobs 2": {"prompt_logprobs": 2, "logprobs": 1},
    "prompt_logprobs 5": {"prompt_logprobs": 5, "n": 2},
    "echo": {"echo": True},
    "echo with n": {"echo": True, "n": 2},
    "echo with logprobs 0": {"echo": True, "logprobs": 0},
    "echo with logprobs 2": {"echo": True, "logprobs": 2},
    "echo with both logprobs": {"echo": True, "logprobs": 1, "prompt_logprobs": 3},
    "token ids": {"return_token_ids": True, "n": 2},
    "packed logprobs": {"logprobs_in_fingerprint": True},
    "packed logprobs 2": {"logprobs_in_fingerprint": True, "logprobs": 2},
    "adjusted logprobs": {"logprobs": 2, "repetition_penalty": 2, "logprobs_mode": "processed"},
    "user": {"user": "somebody"},
    "metadata": {"metadata": {"run": "7", "by": "hand"}},
    "tier auto": {"service_tier": "auto"},
    "tier flex": {"service_tier": "flex"},
    "tier priority": {"service_tier": "priority"},
    "priority": {"priority": -5},
}
SAMPLED: Mapping[str, Record] = {
    "plain": {},
    "another seed": {"seed": (1 << 63) - 1},
    "the model's temperature": {"temperature": None},
    "hot": {"temperature": 5},
    "cold": {"temperature": 0.00001},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.2},
    "all filters": {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "n": {"n": 3},
    "n with logprobs": {"n": 3, "logprobs": 2},
    "n with penalties": {"n": 2, "frequency_penalty": 1, "presence_penalty": 1, "logprobs": 1},
    "raw logprobs": {"logprobs": 2, "logprobs_mode": "raw"},
    "raw logprobs by the old name": {"logprobs": 2, "logprobs_ignore_temperature": True},
    "logprobs of the temperature": {"logprobs": 2, "logprobs_mode": "temperature"},
    "processed logprobs": {"logprobs": 5, "logprobs_mode": "processed", "top_k": 3, "min_p": 0.1},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs_mode": "processed", "top_k": 2},
    "packed logprobs": {"logprobs": 2, "logprobs_in_fingerprint": True, "n": 2},
    "with an end": {"prompt": JOKE_IDS, "ignore_eos": False, "max_tokens": 60},
}
PROMPTS: Mapping[str, Record] = {
    "two prompts": {"prompt": [PATTERN, "The cat sat on"]},
    "two prompts, n": {"prompt": [PATTERN, "The cat sat on"], "n": 2},
    "two prompts, echo": {"prompt": [PATTERN, "The cat"], "echo": True},
    "prompt of ids": {"prompt": [0, 39, 1504, 1544, 1515, 1562, 1504]},
    "prompt of ids, echo": {"prompt": [0, 39, 1504, 1544], "echo": True, "logprobs": 1},
    "prompts of ids": {"prompt": [[0, 39, 1504], [0, 282, 1592]]},
    "list of one prompt": {"prompt": [PATTERN], "logprobs": 1},
    "empty prompt": {"prompt": ""},
    "long prompt": {"prompt": PATTERN + " C D A B" * 120, "logprobs": 1},
    "long prompt with its logprobs": {"prompt": "the cat " * 150, "prompt_logprobs": 1},
    "long prompt from the cache": {"prompt": PATTERN + " C D A B" * 120, "logprobs": 1},
    "strange prompt": {
        "prompt": "naïve élan \U0001d538\u200b \x00 <|end|>",
        "logprobs": 3,
        "echo": True,
    },
}
FORMS: Mapping[str, Record] = {
    "response_format text": {"response_format": {"type": "text"}, "max_tokens": 10},
    "response_format json_object": {"response_format": {"type": "json_object"}},
    "response_format json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True},
        }
    },
    "json": {"structured_outputs": {"json": SCHEMA}},
    "json as text": {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    "json without whitespace": {
        "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}
    },
    "json_object": {"structured_outputs": {"json_object": True, "whitespace_pattern": " ?"}},
    "regex": {"structured_outputs": {"regex": "[a-z]{3,8} [0-9]{2}"}},
    "choice": {"structured_outputs": {"choice": ["cat", "dog", "catfish"]}},
    "lark": {"structured_outputs": {"grammar": LARK}},
    "gbnf": {"structured_outputs": {"grammar": GBNF}},
    "guided_json": {"guided_json": SCHEMA},
    "guided_regex": {"guided_regex": "(a|b){4}", "logprobs": 2, "logprobs_mode": "processed"},
    "guided_choice": {"guided_choice": ["yes", "no"], "logprobs": 2},
    "guided_grammar": {"guided_grammar": LARK},
    "cut": {"guided_regex": "[a-z]{50}", "max_tokens": 5},
    "drawn": {"guided_regex": "[a-z]{4,6}", "temperature": 1, "seed": 3, "n": 2},
}
COMPLETION_STREAMS: Mapping[str, Record] = {
    "plain": {},
    "n": {"n": 2},
    "drawn": {**DRAWN, "prompt": "The cat", "n": 2, "logprobs": 1},
    "stop": {"stop": " D"},
    "stop with logprobs": {"stop": " D", "logprobs": 2},
    "logprobs": {"logprobs": 2},
    "echo with logprobs": {"echo": True, "logprobs": 1},
    "usage": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"continuous_usage_stats": True}},
    "both usages": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "packed logprobs": {"logprobs_in_fingerprint": True, "logprobs": 2},
    "metadata": {"metadata": {"run": "7"}, "service_tier": "flex"},
    "token ids": {"prompt": [PATTERN, "The cat"], "return_token_ids": True, "n": 2},
    "two prompts": {"prompt": [PATTERN, "The cat"], "stream_options": {"include_usage": True}},
    "choice": {"guided_choice": ["yes", "no"]},
}
HARMLESS: Mapping[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "store": False,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "skip_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1,
    "echo": False,
}
NULLS = ("n", "top_p", "seed", "stop", "logprobs", "echo", "stream", "metadata", "user", "best_of")


def first_of_three() -> list[Ask]:
    """When the others are cancelled depends on the moment, and so does the usage."""
    base = {"prompt": "The cat", **DRAWN, "ignore_eos": False, "n": 3, "stop": "e"}
    return [
        Ask("completions: first_k", COMPLETIONS, {**base, "first_k": 1}, hidden=("usage",)),
        Ask("completions: first_k is all", COMPLETIONS, {**base, "first_k": 3}),
    ]


def chats() -> list[Ask]:
    base = {"messages": [JOKE], "temperature": 0, "max_tokens": 12}
    return [
        *variants("chat", CHAT, base, CONVERSATIONS),
        *variants("chat", CHAT, base, CHAT_FIELDS),
        *variants("chat stream", CHAT, {**base, "stream": True}, CHAT_STREAMS),
        Ask("chat: ids", CHAT, {"ids": [0, 5, 71, 2, 6], **GREEDY}),
        Ask("chat: ids in a stream", CHAT, {"ids": [0, 5, 71, 2, 6], **GREEDY, "stream": True}),
        Ask("chat: without a limit", CHAT, {"messages": [JOKE], "seed": 5}),
        *tools(),
        *reasoning(),
    ]


CONVERSATIONS: Mapping[str, Record] = {
    "plain": {},
    "token ids": {"return_token_ids": True, "n": 2},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, JOKE]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, JOKE]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "tell me "},
                    {"type": "text", "text": "a joke"},
                ],
            }
        ]
    },
    "turns": {"messages": [JOKE, {"role": "assistant", "content": "No."}, FACT]},
    "empty fields of an answer": {
        "messages": [
            JOKE,
            {"role": "assistant", "content": "No.", "refusal": None, "tool_calls": []},
            FACT,
        ]
    },
    "to be continued": {
        "messages": [JOKE, {"role": "assistant", "content": "Why did the"}],
        "chat_template_kwargs": {"continue_final_message": True, "add_generation_prompt": False},
    },
    "without the prompt of an answer": {
        "apply_chat_template_overrides": {"add_generation_prompt": False}
    },
    "all shown": {
        "messages": [
            {"role": "user", "content": "hi", "name": "Ann"},
            {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "It is noon.", "reasoning_content": "hm"},
            {"role": "user", "content": "thanks"},
        ],
        "prompt_logprobs": 0,
        "chat_template_kwargs": ALL_SHOWN,
    },
    "argument of a template": {
        "prompt_logprobs": 0,
        "chat_template_kwargs": {"chat_template": "{{ shout }}" + TURN, "shout": "hey"},
    },
}
CHAT_FIELDS: Mapping[str, Record] = {
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 5},
    "n": {"n": 2},
    "drawn": {**DRAWN, "n": 3},
    "drawn with logprobs": {**DRAWN, "n": 2, "logprobs": True, "top_logprobs": 2},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "packed logprobs": {"logprobs_in_fingerprint": True},
    "stop": {"stop": ["the", "up"], "max_tokens": 40},
    "penalties": {"frequency_penalty": 1, "presence_penalty": 1, "repetition_penalty": 1.2},
    "min_tokens": {"messages": [FACT], "min_tokens": 30, "max_tokens": 40},
    "bad_words": {"bad_words": ["Why", "did"]},
    "logit_bias": {"logit_bias": {"937": -100}},
    "metadata": {"metadata": {"run": "7"}, "service_tier": "priority", "model": "m"},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 30},
    "schema": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 40},
    "choice": {"messages": [FACT], "guided_choice": ["yes", "no"]},
}
CHAT_STREAMS: Mapping[str, Record] = {
    "plain": {},
    "n": {"n": 2, "stream_options": {"include_usage": True}},
    "drawn": {**DRAWN, "n": 2},
    "token ids": {"return_token_ids": True, "n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "packed logprobs": {"logprobs_in_fingerprint": True},
    "stop": {"stop": ["the", "up"], "max_tokens": 40},
    "usage all along": {"stream_options": {"continuous_usage_stats": True}},
    "schema": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 40},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, JOKE]},
}


# Of these two the demo model would write nothing else where a grammar allows both.
NO_SPACES = {"logit_bias": {"205": -100, "227": -100}}


def tools() -> list[Ask]:
    base = {"messages": [FACT], "tools": TOOLS, "temperature": 0, "max_tokens": 60, **NO_SPACES}
    named = {"type": "function", "function": {"name": "clock"}}
    hermes = {**base, "chat_template_kwargs": HERMES}
    llama3 = {**base, "chat_template_kwargs": LLAMA3}
    table: dict[str, Record] = {
        "auto": hermes,
        "none": {**hermes, "tool_choice": "none"},
        "required": {**hermes, "tool_choice": "required"},
        "required once": {**hermes, "tool_choice": "required", "parallel_tool_calls": False},
        "named": {**hermes, "tool_choice": named},
        "cut": {**hermes, "tool_choice": "required", "max_tokens": 20},
        "drawn": {**hermes, "tool_choice": "required", "temperature": 1, "seed": 1, "n": 2},
        "llama3 required": {**llama3, "tool_choice": "required"},
        "llama3 named": {**llama3, "tool_choice": named},
        "llama3 call": {**llama3, **calling()},
    }
    streams = {f"{name} in a stream": {**body, "stream": True} for name, body in table.items()}
    return variants("tools", CHAT, {}, {**table, **streams})


def calling() -> Record:
    """Makes the model call q by itself."""
    function = {"type": "function", "function": {"name": "q"}}
    return {"tools": [function], "max_tokens": len(CALL), **forcing(CALL, CALL_TOKENS)}


def reasoning() -> list[Ask]:
    base = {"messages": [JOKE], "temperature": 0, "max_tokens": 12}
    table: dict[str, Record] = {
        "none comes": {**base, "chat_template_kwargs": THINKS},
        "no end": {**base, "chat_template_kwargs": THINKING},
        "an end": {**base, **CLOSING_MARK, "chat_template_kwargs": THINKING},
        "n": {**base, **DRAWN, "n": 2, "chat_template_kwargs": THINKING},
        "form": {**base, "guided_choice": ["a", "b"], "chat_template_kwargs": THINKING},
    }
    streams = {
        f"{name} in a stream": {**body, "stream": True, "stream_options": {"include_usage": True}}
        for name, body in table.items()
    }
    return variants("reasoning", CHAT, {}, {**table, **streams})


def responses() -> list[Ask]:
    base = {"input": "tell me a joke", "temperature": 0, "max_output_tokens": 12}
    streams = {name: {**more, "stream": True} for name, more in RESPONSE_FIELDS.items()}
    return [
        *variants("responses", RESPONSES, base, RESPONSE_FIELDS),
        *variants("responses stream", RESPONSES, base, streams),
    ]


RESPONSE_FIELDS: Mapping[str, Record] = {
    "plain": {},
    "complete": {"max_output_tokens": 100},
    "without a limit": {"max_output_tokens": None},
    "instructions": {"instructions": "Be brief."},
    "drawn": {"temperature": 1, "seed": 4, "top_p": 0.9, "top_k": 20},
    "stop": {"stop": ["the", "up"]},
    "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "chosen logprobs": {"include": ["message.output_text.logprobs"]},
    "metadata": {"metadata": {"run": "7"}, "service_tier": "flex", "user": "u", "model": "m"},
    "text": {"text": {"format": {"type": "text"}}},
    "json": {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 30},
    "schema": {
        "text": {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA}},
        "max_output_tokens": 40,
    },
    "items": {
        "input": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello."}],
            },
            {"role": "user", "content": "tell me a joke"},
        ]
    },
    "calls": {
        "tools": FLAT_TOOLS,
        "tool_choice": "required",
        "max_output_tokens": 60,
        "chat_template_kwargs": HERMES,
        **NO_SPACES,
    },
    "named call": {
        "tools": FLAT_TOOLS,
        "tool_choice": {"type": "function", "name": "clock"},
        "max_output_tokens": 60,
        "chat_template_kwargs": HERMES,
        **NO_SPACES,
    },
    "no call": {"tools": FLAT_TOOLS, "tool_choice": "none", "chat_template_kwargs": HERMES},
    "results of calls": {
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
        ],
        "tools": FLAT_TOOLS,
        "chat_template_kwargs": ALL_SHOWN,
    },
    "call of its own": {
        "tools": [{"type": "function", "name": "q"}],
        "max_output_tokens": len(CALL),
        "chat_template_kwargs": LLAMA3,
        **forcing(CALL, CALL_TOKENS),
    },
    "thinking": {"chat_template_kwargs": THINKING},
    "an end": {**CLOSING_MARK, "chat_template_kwargs": THINKING},
}


def generate() -> list[Ask]:
    native = {"prompt": "tell me a joke", **GREEDY}
    sglang_greedy = {"temperature": 0, "max_new_tokens": 10}
    return [
        *variants("generate", GENERATE, native, NATIVE),
        *variants("generate stream", GENERATE, {**native, "stream": True}, NATIVE_STREAMS),
        *variants("sglang", GENERATE, {"sampling_params": sglang_greedy}, SGLANG),
        *variants("sglang params", GENERATE, {"text": "The cat"}, SGLANG_PARAMS),
        *variants(
            "sglang stream",
            GENERATE,
            {"sampling_params": sglang_greedy, "stream": True},
            SGLANG_STREAMS,
        ),
    ]


NATIVE: Mapping[str, Record] = {
    "plain": {},
    "system": {"system": "Be brief."},
    "ids": {"prompt": [0, 39, 1504, 1544]},
    "logprobs 0": {"logprobs": 0},
    "logprobs 3": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 1},
    "n": {**DRAWN, "n": 3},
    "choice": {"guided_choice": ["yes", "no"]},
    "stop": {"stop": "the", "max_tokens": 40},
    "echoed": {"metadata": {"a": "b"}, "service_tier": "flex", "model": "m"},
}
NATIVE_STREAMS: Mapping[str, Record] = {
    "plain": {},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "n": {**DRAWN, "n": 2},
}
SGLANG: Mapping[str, Record] = {
    "text": {"text": PATTERN},
    "texts": {"text": [PATTERN, "The cat"]},
    "list of one text": {"text": [PATTERN]},
    "ids": {"input_ids": [0, 39, 1504, 1544]},
    "lists of ids": {"input_ids": [[0, 39, 1504], [0, 282, 1592]]},
    "logprobs": {"text": PATTERN, "return_logprob": True},
    "top logprobs": {"text": PATTERN, "return_logprob": True, "top_logprobs_num": 2},
    "logprobs of the prompt": {
        "text": PATTERN,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
        "return_text_in_logprobs": True,
    },
    "logprobs of the prompt's end": {
        "text": PATTERN,
        "return_logprob": True,
        "logprob_start_len": 6,
    },
    "names": {"text": [PATTERN, "The cat"], "rid": ["one", "two"]},
    "name": {"text": PATTERN, "rid": "one", "user": "somebody"},
    "lists of parameters": {
        "text": [PATTERN, "The cat"],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": 6},
            {"temperature": 1, "sampling_seed": 2, "max_new_tokens": 6, "ignore_eos": True},
        ],
    },
}
SGLANG_SAMPLING: Mapping[str, Record] = {
    "n": {"n": 2, "temperature": 1, "sampling_seed": 3, "ignore_eos": True},
    "stop": {"stop": ["zebra", "u."]},
    "stop token": {"stop_token_ids": [20]},
    "min_new_tokens": {"stop": "x", "min_new_tokens": 8},
    "filters": {"temperature": 1, "sampling_seed": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"frequency_penalty": 1, "presence_penalty": 1, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {"227": -100}},
    "json_schema": {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 40},
    "regex": {"regex": "[a-z]{3,8}"},
    "ebnf": {"ebnf": GBNF},
}
SGLANG_PARAMS: Mapping[str, Record] = {
    name: {"sampling_params": {"temperature": 0, "max_new_tokens": 20, **more}}
    for name, more in SGLANG_SAMPLING.items()
}
SGLANG_STREAMS: Mapping[str, Record] = {
    "text": {"text": PATTERN},
    "texts": {"text": [PATTERN, "The cat"]},
    "logprobs": {"text": PATTERN, "return_logprob": True, "top_logprobs_num": 1},
}


def embeddings() -> list[Ask]:
    table: dict[str, Record] = {
        "text": {},
        "texts": {"input": ["the cat", "a dog"]},
        "ids": {"input": [0, 39, 1504]},
        "lists of ids": {"input": [[0, 39, 1504], [0, 282]]},
        "base64": {"encoding_format": "base64"},
        "dimensions": {"dimensions": 8},
        "last": {"pooling": "last", "dimensions": 16},
        "mean": {"pooling": "mean", "model": "m", "user": "u", "priority": 3},
        "long text": {"input": "the cat " * 200, "encoding_format": "base64"},
    }
    return variants("embeddings", EMBEDDINGS, {"input": "the cat"}, table)


def tokens() -> list[Ask]:
    chat = {"messages": [JOKE]}
    table: dict[str, Record] = {
        "text": {"prompt": "naïve cat <|end|>"},
        "spelled": {"prompt": "naïve \U0001d538 cat", "return_token_strs": True},
        "without special tokens": {"prompt": "the cat", "add_special_tokens": False},
        "chat": {**chat, "return_token_strs": True},
        "chat without prompt": {**chat, "add_generation_prompt": False},
        "chat to be continued": {**chat, "continue_final_message": True},
        "chat with a template": {**chat, "chat_template": "{{ messages }}{{ x }}"},
        "chat with arguments": {**chat, "chat_template_kwargs": {"chat_template": "{{ 7 }}"}},
        "empty": {"prompt": ""},
        "both": {**chat, "prompt": "x"},
        "neither": {},
        "special tokens of a chat": {**chat, "add_special_tokens": True},
        "prompt with a template": {"prompt": "x", "chat_template": "y"},
        "unknown field": {"prompt": "x", "promt": "y"},
        "broken template": {**chat, "chat_template": "{% for %}"},
    }
    ids: dict[str, Record] = {
        "ids": {"tokens": [0, 39, 1504, 2]},
        "none": {"tokens": []},
        "out of range": {"tokens": [2048]},
        "negative": {"tokens": [-1]},
        "no numbers": {"tokens": ["a"]},
        "missing": {},
    }
    return [
        *variants("tokenize", "/tokenize", {}, table),
        *variants("detokenize", "/detokenize", {}, ids),
        Ask("tokenizer_info", "/tokenizer_info", method="GET"),
    ]


def engine_routes() -> list[Ask]:
    got = ["/ping", "/health", "/version", "/v1/models", "/v1/models/tokasaurus-demo"]
    got += ["/v1/models/nobody", "/v1/models/a/b", "/openapi.json", "/docs", "/redoc"]
    got += ["/model_info", "/server_info", "/metrics"]
    return [
        *(Ask(f"get {path}", path, method="GET") for path in got),
        *(Ask(f"head {path}", path, method="HEAD") for path in ("/ping", "/health", "/v1/models")),
        *(Ask(f"options {path}", path, method="OPTIONS") for path in ("/ping", COMPLETIONS)),
        Ask("flush", "/flush_cache"),
        Ask("reset", "/reset_prefix_cache"),
    ]


# --- what is refused ------------------------------------------------------------------------------

# By field: values for completions. A few of them pass.
WRONG_VALUES: Mapping[str, Sequence[Any]] = {
    "n": (0, "2", 1.5, True, 70000),
    "temperature": (-1, "1", 1000, [], 1e-9),
    "top_p": (0, 1.5, "x"),
    "top_k": (-2, 0.5),
    "min_p": (-0.1, 2),
    "seed": (-1, 1 << 63, "s"),
    "max_tokens": (0, -5, 5000, "5"),
    "min_tokens": (-1, 11),
    "stop": ("", [1], ["x"] * 129, ["x" * 1025], {}),
    "stop_token_ids": ([-1], [2048], "7", ["7"], [1] * 129),
    "frequency_penalty": (3, "1"),
    "presence_penalty": (-2.5,),
    "repetition_penalty": (0, 1001),
    "logit_bias": ({"x": 1}, {"5": 101}, {"99999": 1}, [], {"1": 1, "01": 1}),
    "bad_words": ("x", [""], ["x" * 257], ["ab " * 40]),
    "prompt_logprobs": (-1, 21),
    "logprobs_mode": ("loud", 3),
    "priority": (1_000_001, 0.5),
    "first_k": (0, 2),
    "stream": ("yes", 1),
    "stream_options": ({"include_usage": 1}, {"x": True}, []),
    "user": ("u" * 513, 5),
    "metadata": ({"a": 1}, {"k" * 65: "v"}, {str(n): "v" for n in range(17)}),
    "service_tier": ("fast", 5),
    "model": (5,),
    "best_of": (2,),
    "suffix": ("x",),
    "store": (True,),
    "response_format": ("json", {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "x": 1}),
    "structured_outputs": ({}, {"json": {}, "regex": "a"}, {"regex": "("}, {"choice": []}, "x"),
    "guided_json": ({"type": "nothing"}, 5),
    "guided_regex": ("[", "a{99999}", 5),
    "guided_choice": ([], "a"),
    "guided_grammar": ("start:", 'start: "a" nothing', 5),
    "temprature": (1,),
    "skip_special_tokens": (False,),
    "return_token_ids": ("yes", 1),
    "reasoning_effort": ("low",),
    "chat_template": ("x",),
    "regex": ("x",),
}
WRONG_COMPLETIONS: Mapping[str, Record] = {
    "no prompt": {"prompt": None},
    "prompt of nothing": {"prompt": []},
    "mixed prompts": {"prompt": ["a", 1]},
    "prompt of wrong ids": {"prompt": [0, 2048]},
    "prompt of truths": {"prompt": [True, False]},
    "empty prompt of ids": {"prompt": [[0], []]},
    "prompt too long": {"prompt": "cat dog " * 2000},
    "prompt and answer too long": {"prompt": "cat " * 500, "max_tokens": 1800},
    "logprobs": {"logprobs": 21},
    "logprobs of a word": {"logprobs": "all"},
    "echo of packed logprobs": {"echo": True, "logprobs_in_fingerprint": True},
    "streamed logprobs of the prompt": {"stream": True, "prompt_logprobs": 1},
    "two forms": {"guided_regex": "a", "guided_choice": ["b"]},
    "form without an end": {"guided_regex": "a", "ignore_eos": True},
    "tier and priority": {"service_tier": "flex", "priority": 1},
    "two modes": {"logprobs_ignore_temperature": True, "logprobs_mode": "processed"},
    "too many samples": {"prompt": ["a"] * 3, "n": 40000},
    "null in a list": {"prompt": [None]},
    "messages": {"messages": [JOKE]},
}
WRONG_CHATS: Mapping[str, Record] = {
    "no messages": {"messages": None},
    "empty messages": {"messages": []},
    "messages and ids": {"ids": [0]},
    "a text for messages": {"messages": "hi"},
    "role": {"messages": [{"role": "king", "content": "x"}]},
    "no role": {"messages": [{"content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
    "unknown field of a message": {"messages": [{**JOKE, "mood": "glad"}]},
    "arguments": {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": "["}}],
            }
        ]
    },
    "logprobs of a number": {"logprobs": 2},
    "top_logprobs alone": {"top_logprobs": 2},
    "too many top_logprobs": {"logprobs": True, "top_logprobs": 21},
    "two limits": {"max_completion_tokens": 4},
    "two names of arguments": {
        "chat_template_kwargs": {"a": 1},
        "apply_chat_template_overrides": {"a": 1},
    },
    "tools without a template": {"tools": TOOLS},
    "tools without a format": {
        "tools": TOOLS,
        "chat_template_kwargs": {"chat_template": "{{ tools }}"},
    },
    "no tool required": {"tool_choice": "required"},
    "unknown tool": {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "h"}},
        "chat_template_kwargs": HERMES,
    },
    "tool twice": {"tools": [TOOLS[1], TOOLS[1]], "chat_template_kwargs": HERMES},
    "name of a tool": {
        "tools": [{"type": "function", "function": {"name": "a b"}}],
        "chat_template_kwargs": HERMES,
    },
    "kind of tool": {"tools": [{"type": "custom", "function": {"name": "f"}}]},
    "tools and a form": {
        "tools": TOOLS,
        "guided_regex": "a",
        "chat_template_kwargs": HERMES,
    },
    "broken template": {"chat_template_kwargs": {"chat_template": "{% for %}"}},
    "failing template": {"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}},
    "reserved argument": {"chat_template_kwargs": {"tokenize": True}},
    "prompt": {"prompt": "x"},
}
WRONG_RESPONSES: Mapping[str, Record] = {
    "no input": {"input": None},
    "empty input": {"input": []},
    "item": {"input": [{"type": "web_search_call", "id": "x"}]},
    "n": {"n": 2},
    "max_tokens": {"max_tokens": 5},
    "response_format": {"response_format": {"type": "json_object"}},
    "stream_options": {"stream_options": {"include_usage": True}},
    "store": {"store": True},
    "background": {"background": True},
    "earlier response": {"previous_response_id": "resp_1"},
    "reasoning": {"reasoning": {"effort": "low"}},
    "truncation": {"truncation": "auto"},
    "top_logprobs": {"top_logprobs": 2},
    "include": {"include": ["everything"]},
    "limit": {"max_output_tokens": 0},
    "schema": {"text": {"format": {"type": "json_schema"}}},
    "verbosity": {"text": {"verbosity": "low"}},
    "tool": {"tools": [{"type": "web_search", "name": "x"}]},
    "logprobs of thoughts": {
        "include": ["message.output_text.logprobs"],
        "chat_template_kwargs": THINKING,
    },
}
WRONG_GENERATE: Mapping[str, Record] = {
    "nothing": {},
    "prompt and text": {"prompt": "a", "text": "b"},
    "prompt": {"prompt": 5},
    "prompts": {"prompt": ["a", "b"]},
    "system of ids": {"prompt": [0], "system": "x"},
    "stream_options": {"prompt": "a", "stream_options": {}},
    "packed logprobs": {"prompt": "a", "logprobs_in_fingerprint": True},
    "text and ids": {"text": "a", "input_ids": [1]},
    "texts for ids": {"input_ids": ["a"]},
    "ids for texts": {"text": [1]},
    "parameter": {"text": "a", "sampling_params": {"max_tokens": 5}},
    "parameter's range": {"text": "a", "sampling_params": {"temperature": -1}},
    "two forms": {"text": "a", "sampling_params": {"regex": "a", "ebnf": GBNF}},
    "schema": {"text": "a", "sampling_params": {"json_schema": "{"}},
    "entries": {"text": ["a", "b"], "sampling_params": [{}]},
    "names": {"text": ["a", "b"], "rid": ["one"]},
    "start": {"text": "a", "return_logprob": True, "logprob_start_len": 9},
    "start alone": {"text": "a", "logprob_start_len": 0},
    "top alone": {"text": "a", "top_logprobs_num": 2},
    "unknown field": {"text": "a", "priority": 5},
}
WRONG_EMBEDDINGS: Mapping[str, Record] = {
    "no input": {"input": None},
    "empty input": {"input": []},
    "format": {"encoding_format": "hex"},
    "dimensions": {"dimensions": 0},
    "too many dimensions": {"dimensions": 1000},
    "pooling": {"pooling": "max"},
    "too long": {"input": "cat dog " * 2000},
    "temperature": {"temperature": 0},
    "priority": {"priority": 1_000_001},
}


def refusals() -> list[Ask]:
    completion, chat = {"prompt": "The cat", **GREEDY}, {"messages": [JOKE], **GREEDY}
    return [
        *wrong_values("completions", COMPLETIONS, completion),
        *variants("wrong completions", COMPLETIONS, completion, WRONG_COMPLETIONS),
        *variants("wrong chat", CHAT, {**chat, "max_tokens": 5}, WRONG_CHATS),
        *variants("wrong responses", RESPONSES, {"input": "hi"}, WRONG_RESPONSES),
        *variants("wrong generate", GENERATE, {}, WRONG_GENERATE),
        *variants("wrong embeddings", EMBEDDINGS, {"input": "hi"}, WRONG_EMBEDDINGS),
        *wrong_batches(),
    ]


def wrong_values(prefix: str, path: str, base: Record) -> list[Ask]:
    """A request for each value. Those that pass must go on to pass."""
    return [
        Ask(f"wrong {prefix}: {name} #{number}", path, {**base, name: value})
        for name, values in WRONG_VALUES.items()
        for number, value in enumerate(values)
    ]


def wrong_batches() -> list[Ask]:
    chat = {"messages": [JOKE], **GREEDY}
    table: dict[str, Record] = {
        "nothing": {},
        "no list": {"requests": chat},
        "empty": {"requests": []},
        "unknown field": {"requests": [chat], "n": 2},
        "second one": {"requests": [chat, {**chat, "top_p": 5}]},
        "stream": {"requests": [{**chat, "stream": True}]},
        "no object": {"requests": [5]},
        "too many samples": {"requests": [{**chat, "n": 40000}] * 2},
    }
    batch = {"input_file_id": "file-1", "endpoint": COMPLETIONS}
    batches: dict[str, Record] = {
        "no file": batch,
        "endpoint": {**batch, "endpoint": "/v1/nothing"},
        "window": {**batch, "completion_window": "soon"},
        "lifetime": {**batch, "output_expires_after": {"anchor": "now", "seconds": 5}},
        "metadata": {**batch, "metadata": {"a": 1}},
        "unknown field": {**batch, "priority": 5},
        "nothing": {},
    }
    paths = ["/v1/files?limit=0", "/v1/files?order=up", "/v1/files?x=1", "/v1/files?after=file-1"]
    paths += ["/v1/files?limit=1&limit=2", "/v1/files/file-1", "/v1/files/file-1/content"]
    paths += ["/v1/batches/batch_1", "/v1/batches?limit=101", "/v1/batches?after=batch_1"]
    return [
        *variants("wrong synchronous batch", SYNCHRONOUS, {}, table),
        *variants("wrong batch", BATCHES, {}, batches),
        *(Ask(f"get {path}", path, method="GET") for path in paths),
        Ask("delete no file", "/v1/files/file-1", method="DELETE"),
        Ask("cancel no batch", "/v1/batches/batch_1/cancel"),
    ]


def transport() -> list[Ask]:
    """Whatever is wrong before a body is understood."""
    good = json.dumps({"prompt": "The cat", **GREEDY}).encode()
    raw: dict[str, bytes] = {
        "empty": b"",
        "half": good[:-5],
        "list": b"[1, 2]",
        "text": b'"hi"',
        "number that is none": b'{"prompt": NaN}',
        "no UTF-8": b'{"prompt": "\xff\xfe"}',
        "half a surrogate": b'{"prompt": "\\ud800", "max_tokens": 1, "temperature": 0}',
        "name twice": b'{"prompt": "a", "prompt": "The cat", "max_tokens": 1, "temperature": 0}',
        "huge number": b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
        "huge exponent": b'{"prompt": "a", "temperature": 1e999}',
        "deep": b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
        "very deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "trailing comma": b'{"prompt": "a",}',
        "more behind": good + b"x",
    }
    types = ["text/plain", "application/x-www-form-urlencoded", "", "application/problem+json"]
    types += ["Application/JSON; charset=utf-8"]
    return [
        *(Ask(f"body: {name}", COMPLETIONS, body) for name, body in raw.items()),
        *(
            Ask(f"type: {each}", COMPLETIONS, good, headers={"Content-Type": each})
            for each in types
        ),
        *(
            Ask(f"compressed: {each}", COMPLETIONS, body, headers={"Content-Encoding": each})
            for each, body in (("gzip", gzip.compress(good, mtime=0)), ("identity", good))
        ),
        *wrong_methods(),
        *request_ids(),
    ]


def wrong_methods() -> list[Ask]:
    got = (*GENERATING, SYNCHRONOUS, "/tokenize", "/nothing", "/v1", "/", "/v1/completions/")
    posted = ("/ping", "/v1/models", "/version", "/nothing", "/v1/files/x/content", "/metrics")
    return [
        *(Ask(f"get {path}", path, method="GET") for path in got),
        *(Ask(f"post {path}", path, {}) for path in posted),
        *(Ask(f"{method} {COMPLETIONS}", COMPLETIONS, {}, method) for method in ("PUT", "DELETE")),
        Ask("head of a route that generates", COMPLETIONS, method="HEAD"),
        Ask("form for a file", FILES, {"purpose": "batch"}),
    ]


def request_ids() -> list[Ask]:
    named = {"X-Request-Id": "mine-7"}
    body = {"prompt": "The cat", **GREEDY}
    return [
        Ask("request id", COMPLETIONS, body, headers=named),
        Ask("request id of a stream", COMPLETIONS, {**body, "stream": True}, headers=named),
        Ask("request id of an error", COMPLETIONS, {}, headers=named),
        Ask("request id of no route", "/nothing", method="GET", headers=named),
        Ask("request id that is too long", "/ping", None, "GET", {"X-Request-Id": "x" * 129}),
        Ask("request id with a space", "/ping", None, "GET", {"X-Request-Id": "a b"}),
    ]


# --- several at a time: no logprobs, and not what the cache held ----------------------------------

CACHED = ("cached_tokens",)


def synchronous() -> list[Ask]:
    drawn = {"messages": [JOKE], "temperature": 1, "max_tokens": 12}
    chats = [{"messages": [each], **GREEDY} for each in (JOKE, FACT)]
    chats += [{**drawn, "seed": 1, "n": 2}, {**drawn, "seed": 2, "guided_choice": ["a", "b"]}]
    accepts = ("", "application/msgpack", "application/msgpack;q=0.1, application/json")
    return [
        Ask(
            f"synchronous batch {accept}",
            SYNCHRONOUS,
            {"requests": chats},
            headers={"Accept": accept} if accept else {},
            hidden=CACHED,
        )
        for accept in accepts
    ]


def crowd() -> list[Ask]:
    """Half are chats, half go on with a pattern; each has its own number."""
    asks = []
    for number in range(CROWD):
        name = f"crowd {number:02}"
        if number % 2:
            word = ("cat", "dog", "bird", "fish")[number // 2 % 4]
            message = {"role": "user", "content": f"Say {word} {number}."}
            asks.append(Ask(name, CHAT, {"messages": [message], **GREEDY}))
        else:
            text = " ".join(str((number + step) % 3) for step in range(9))
            asks.append(Ask(name, COMPLETIONS, {"prompt": text, **GREEDY, "max_tokens": 24}))
    return asks


# --- the other engine -----------------------------------------------------------------------------


def other_asks() -> list[Ask]:
    """With other flags: those that say who may ask, how much, and how models write."""
    key = {"Authorization": f"Bearer {KEY}"}
    page = {"Origin": "https://example.org"}
    completion = {"prompt": PATTERN, **GREEDY}
    table: dict[str, Record] = {
        "plain": {},
        "logprobs": {"logprobs": 2},
        "processed logprobs": {**DRAWN, "prompt": "The cat", "top_k": 3, "logprobs": 2},
        "too many logprobs": {"logprobs": 3},
        "too many samples": {"n": 5},
        "samples": {**DRAWN, "prompt": "The cat", "n": 4, "logprobs": 1},
        "long prompt": {"prompt": "A B C D " * 25, "prompt_logprobs": 1},
        "long prompt again": {"prompt": "A B C D " * 25, "logprobs": 1},
        "too long": {"prompt": "A B C D " * 80},
        "too long together": {"max_tokens": 250},
        "large body": {"prompt": "x" * 21_000},
    }
    asks = [
        *variants("other completions", COMPLETIONS, completion, table),
        Ask("other flush", "/flush_cache"),
        *variants("other chat", CHAT, {"temperature": 0, "max_tokens": 40}, OTHER_CHATS),
        *variants("other embeddings", EMBEDDINGS, {"input": "the cat"}, {"last": {}}),
        *(Ask(f"other {path}", path, method="GET") for path in ("/v1/models", "/server_info")),
        Ask("other synchronous batch", SYNCHRONOUS, SOME_CHATS, hidden=CACHED),
        Ask("other page", COMPLETIONS, completion, headers=page),
        Ask("other upload that is too large", FILES, *form({"purpose": "batch"}, b"x" * 3000)),
    ]
    with_key = [
        Ask(each.name, each.path, each.body, each.method, {**key, **each.headers}, each.hidden)
        for each in asks
    ]
    return [*with_key, *strangers(completion)]


CALLING = {"messages": [FACT], "tools": TOOLS, "tool_choice": "required", **NO_SPACES}
OTHER_CHATS: Mapping[str, Record] = {
    "reasoning": {"messages": [JOKE]},
    "reasoning stream": {"messages": [JOKE], "stream": True},
    "tools": CALLING,
    "tools stream": {**CALLING, "stream": True},
    "template": {"messages": [JOKE], "chat_template_kwargs": {"chat_template": "x"}},
}
SOME_CHATS = {"requests": [{"messages": [JOKE], **GREEDY}, {"messages": [FACT], **GREEDY}]}


def strangers(body: Record) -> list[Ask]:
    """Without the key, or from a web page."""
    wrong = {"Authorization": "Bearer no"}
    asking = {"Access-Control-Request-Method": "POST"}
    ours, theirs = {"Origin": "https://example.org"}, {"Origin": "https://example.com"}
    return [
        Ask("no key", COMPLETIONS, body),
        Ask("wrong key", COMPLETIONS, body, headers=wrong),
        Ask("wrong scheme", COMPLETIONS, body, headers={"Authorization": f"Basic {KEY}"}),
        Ask("wrong key from a page", COMPLETIONS, body, headers={**wrong, **ours}),
        Ask("no key for ping", "/ping", method="GET"),
        Ask("no key for models", "/v1/models", method="GET"),
        Ask("page asks", COMPLETIONS, method="OPTIONS", headers={**asking, **ours}),
        Ask("other page asks", COMPLETIONS, method="OPTIONS", headers={**asking, **theirs}),
    ]


# --- files and batches: each step needs what the one before it said -------------------------------

BOUNDARY = "a-boundary-that-no-part-has"
DONE_STATUSES = ("completed", "failed", "expired", "cancelled")


def form(fields: Mapping[str, str], file: bytes) -> tuple[bytes, str, dict[str, str]]:
    """The body, the method and the headers of an upload."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    )
    body = "".join(parts).encode() + head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    return body, "POST", {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def batch_lines() -> list[Any]:
    """Of every route that generates, and some that cannot run."""
    greedy = {"temperature": 0, "max_tokens": 8}
    bodies: list[tuple[str, str, Any]] = [
        ("pattern", COMPLETIONS, {"prompt": PATTERN, **greedy}),
        (
            "samples",
            COMPLETIONS,
            {"prompt": "The cat", **greedy, "temperature": 1, "seed": 3, "n": 2},
        ),
        ("form", COMPLETIONS, {"prompt": "The cat", **greedy, "guided_choice": ["yes", "no"]}),
        ("wrong", COMPLETIONS, {"prompt": "The cat", "top_p": 5}),
        ("stream", COMPLETIONS, {"prompt": "The cat", **greedy, "stream": True}),
        ("elsewhere", CHAT, {"messages": [JOKE], **greedy}),
    ]
    lines: list[Any] = [
        {"custom_id": name, "method": "POST", "url": url, "body": body}
        for name, url, body in bodies
    ]
    return [*lines, lines[0], {"method": "POST"}, "no line"]


def one_line(custom_id: str, url: str, body: Record) -> list[Any]:
    return [{"custom_id": custom_id, "method": "POST", "url": url, "body": body}]


def as_lines(lines: Sequence[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Batches:
    """Uploads, runs, and fetches what comes out.

    Args:
        engine: to ask.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._records: list[Record] = []

    def records(self) -> list[Record]:
        self._mixed()
        self._one("chat", CHAT, {"messages": [JOKE], **GREEDY})
        self._one("responses", RESPONSES, {"input": "hi", "temperature": 0, "max_output_tokens": 5})
        self._one("embeddings", EMBEDDINGS, {"input": "the cat", "dimensions": 4})
        self._one("generate", GENERATE, {"prompt": "hi", **GREEDY})
        self._failing()
        self._cancelled()
        self._lists()
        return self._records

    def _mixed(self) -> None:
        file_id = self._upload("mixed", as_lines(batch_lines()))
        self._ask("file", f"{FILES}/{file_id}", method="GET")
        self._ask("file's content", f"{FILES}/{file_id}/content", method="GET")
        more = {"metadata": {"run": "7"}, "completion_window": "2h"}
        more |= {"output_expires_after": {"anchor": "created_at", "seconds": 5000}}
        batch = self._run("mixed", file_id, COMPLETIONS, more)
        self._outputs("mixed", batch)
        self._ask("cancel what has ended", f"{BATCHES}/{batch['id']}/cancel")
        self._ask("delete", f"{FILES}/{file_id}", method="DELETE")
        self._ask("delete again", f"{FILES}/{file_id}", method="DELETE")

    def _one(self, name: str, url: str, body: Record) -> None:
        file_id = self._upload(name, as_lines(one_line(name, url, body)))
        self._outputs(name, self._run(name, file_id, url, {}))

    def _failing(self) -> None:
        for name, content in (("empty", b""), ("without a request", b"no line\n")):
            self._run(name, self._upload(name, content), COMPLETIONS, {})
        for name, fields in (
            ("purpose", {"purpose": "fine-tune"}),
            ("no purpose", {}),
            ("unknown field", {"purpose": "batch", "x": "y"}),
            ("lifetime", {"purpose": "batch", "expires_after[anchor]": "created_at"}),
        ):
            self._ask(f"upload, wrong {name}", FILES, *form(fields, b"x"))

    def _cancelled(self) -> None:
        """Long enough to be cancelled while it runs; how far it came depends on the moment."""
        body = {"prompt": "The cat", "seed": 1, "n": 8, "max_tokens": 1500, "ignore_eos": True}
        file_id = self._upload("long", as_lines(one_line("long", COMPLETIONS, body)))
        asked = {"input_file_id": file_id, "endpoint": COMPLETIONS}
        batch_id = self._ask("begin long", BATCHES, asked)["id"]
        self._until(("in_progress",), batch_id)
        self._ask("delete what is read", f"{FILES}/{file_id}", method="DELETE")
        self._ask(
            "cancel long", f"{BATCHES}/{batch_id}/cancel", hidden=("status", "request_counts")
        )
        self._wait("long", batch_id)

    def _lists(self) -> None:
        files = self._ask("files", f"{FILES}?limit=3&order=asc", method="GET")
        after = f"{FILES}?limit=1&order=asc&after={files['last_id']}"
        self._ask("files after these", after, method="GET")
        self._ask("files for batches", f"{FILES}?purpose=batch", method="GET")
        self._ask("batches", f"{BATCHES}?limit=2", method="GET")

    def _upload(self, name: str, content: bytes) -> str:
        fields = {"purpose": "batch", "expires_after[anchor]": "created_at"}
        fields["expires_after[seconds]"] = "3600"
        file_id: str = self._ask(f"upload {name}", FILES, *form(fields, content))["id"]
        return file_id

    def _run(self, name: str, file_id: str, url: str, more: Record) -> Record:
        asked = {"input_file_id": file_id, "endpoint": url, **more}
        return self._wait(name, self._ask(f"begin {name}", BATCHES, asked)["id"])

    def _wait(self, name: str, batch_id: str) -> Record:
        """The batch when it has ended; only that is recorded."""
        batch = self._until(DONE_STATUSES, batch_id)
        self._ask(f"end of {name}", f"{BATCHES}/{batch_id}", method="GET")
        return batch

    def _until(self, statuses: Collection[str], batch_id: str) -> Record:
        """The batch, once it has one of these statuses."""
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            body = self._engine.send(Ask("", f"{BATCHES}/{batch_id}", method="GET")).json()
            if body["status"] in statuses:
                return dict(body)
            time.sleep(0.05)
        raise SystemExit(f"{batch_id} does not come to {statuses}: {body}")

    def _outputs(self, name: str, batch: Record) -> None:
        for kind in ("output_file_id", "error_file_id"):
            if batch[kind] is not None:
                self._ask(f"{name}'s {kind}", f"{FILES}/{batch[kind]}/content", method="GET")

    def _ask(
        self,
        name: str,
        path: str,
        body: Any = None,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        hidden: tuple[str, ...] = (),
    ) -> Any:
        """What the engine says, unmasked."""
        ask = Ask(f"batches: {name}", path, body, method, headers or {}, (*hidden, *CACHED))
        answer = self._engine.send(ask)
        self._records.append(written(ask, answer))
        return answer.json() if answer.type == "application/json" else None


# --- an engine ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP.
        headers: by their names in lower case.
        body: as it came.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    def json(self) -> Any:
        return json.loads(self.body)


class Engine:
    """A `toka` that runs.

    Args:
        toka: the program.
        flags: for it.
        directory: of its own, for its log and its files.
    """

    def __init__(self, toka: Path, flags: Sequence[str], directory: Path) -> None:
        self.port = free_port()
        self._log = directory / "toka.log"
        command = [str(toka), f"port={self.port}", f"data_dir={directory / 'data'}", *flags]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TOKASAURUS_")
        }
        environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait leave the processors alone
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"the engine does not start:\n{self._log.read_text()}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        return self.send(Ask("", "/health", method="GET")).status == 200

    def send(self, ask: Ask) -> Answer:
        """Asks, and reads the whole answer. Status 0 is none: the connection breaks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        headers = dict(ask.headers)
        body = ask.body
        if body is not None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        try:
            connection.request(ask.method, ask.path, body, headers)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, {}, type(error).__name__.encode())
        finally:
            connection.close()

    def stop(self) -> int:
        """Its exit status after a SIGTERM."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- what is written down -------------------------------------------------------------------------

DROPPED_HEADERS = frozenset({"date", "server", "content-length", "etag", "last-modified"})
"""Of every answer: times, and lengths that follow from the rest."""

IDS = re.compile(r"(?<![0-9a-f])([0-9a-f]{32}|[0-9a-f]{24})(?![0-9a-f])")
"""The part of an id that was drawn."""

TIMES = ["created", "created_at", "completed_at", "expires_at", "in_progress_at", "finalizing_at"]
TIMES += ["cancelling_at", "cancelled_at", "failed_at", "expired_at"]
MEASURED = ("e2e_latency", "uptime_s", "port", "model_path", "tokenizer_path", "root")
SAMPLE = re.compile(r"^(\w+(?:\{.*\})?) \S+$", re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d.eE+-]*")
MAX_BODY_CHARS = 300


class Masks:
    """Masks one answer. An id that comes twice gets the same mask twice.

    Args:
        hidden: fields to leave out of the record.
    """

    def __init__(self, hidden: Sequence[str] = ()) -> None:
        self._hidden = hidden
        self._numbers: dict[str, int] = {}

    def mask(self, value: Any, key: str = "") -> Any:
        if key in self._hidden or (key in MEASURED and isinstance(value, (str, int, float))):
            return f"<{key}>"
        if isinstance(value, dict):
            if key == "internal_states":
                return dict.fromkeys(value, "<number>")
            return {self.text(name): self._entry(value, name) for name in value}
        if isinstance(value, list):
            return [self.mask(each, key) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def _entry(self, fields: Record, name: str) -> Any:
        value = fields[name]
        if name in TIMES and isinstance(value, int):
            begun = fields.get("created_at")
            if name == "expires_at" and isinstance(begun, int):
                return f"<created_at + {value - begun}>"
            return "<time>"
        return self.mask(value, name)

    def text(self, text: str) -> str:
        return IDS.sub(self._numbered, text)

    def _numbered(self, found: re.Match[str]) -> str:
        number = self._numbers.setdefault(found[0], len(self._numbers) + 1)
        return f"<{len(found[0])} digits, #{number}>"


def written(ask: Ask, answer: Answer) -> Record:
    """The record of one request."""
    masks = Masks(ask.hidden)
    headers = {
        name: masks.text(value)
        for name, value in answer.headers.items()
        if name not in DROPPED_HEADERS
    }
    return {
        "name": ask.name,
        "method": ask.method,
        "path": masks.text(ask.path),
        "body": shown_body(ask.body, masks),
        "status": answer.status,
        "headers": headers,
        "compact": is_compact(answer),
        "answer": masks.mask(understood(ask, answer)),
    }


def is_compact(answer: Answer) -> bool | None:
    """Whether JSON is written without white space and escapes; None of anything else."""
    if answer.type != "application/json" or not answer.body:
        return None
    written_anew = json.dumps(answer.json(), separators=(",", ":"), ensure_ascii=False)
    return NUMBER.sub("0", answer.body.decode()) == NUMBER.sub("0", written_anew)


def shown_body(body: Any, masks: Masks) -> Any:
    """JSON as it is; long and raw ones by their beginning and their digest."""
    text = body.decode("latin-1") if isinstance(body, bytes) else json.dumps(body)
    if len(text) > MAX_BODY_CHARS * 10:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{text[:MAX_BODY_CHARS]}... sha256 {digest}"
    return masks.text(text) if isinstance(body, bytes) else masks.mask(body)


def understood(ask: Ask, answer: Answer) -> Any:
    """The body as something that can be compared piece by piece."""
    if not answer.body:
        return None
    if answer.type == "application/json":
        return answer.json()
    if answer.type == "text/event-stream":
        return put_together(events(answer.body.decode()))
    if answer.type == "application/msgpack":
        import msgspec  # the engine needs it, too

        return msgspec.msgpack.decode(answer.body)
    if answer.type == "application/x-pickle":
        import pickle

        return [each.model_dump() for each in pickle.loads(answer.body)]  # of our own engine
    text = answer.body.decode(errors="backslashreplace")
    if ask.path == "/metrics":
        return metric_names(text)
    if answer.type == "application/octet-stream":
        return [json_or_text(line) for line in text.split("\n")]
    return text.splitlines()


def json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def metric_names(text: str) -> list[str]:
    """Without the numbers; and without the polls, which may have been refused or not."""
    lines = (line for line in text.splitlines() if 'path="/health",status="503"' not in line)
    return [SAMPLE.sub(r"\1 <number>", line) for line in lines]


# --- streams --------------------------------------------------------------------------------------

JOINED = ("text", "output", "content", "reasoning_content", "arguments", "delta")
"""Fields whose pieces are pieces of one text."""

PROMPTS_OWN = ("prompt_ids", "prompt_logprobs")
"""Fields that only the first event of a stream has, whichever choice it is about."""

SHARED = ("usage", *PROMPTS_OWN)
"""Fields that say something of all choices; the last event that has one is right."""


def events(text: str) -> list[Any]:
    """The events of a stream: their data, beside their name where they have one."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        fields = [line.partition(": ") for line in block.split("\n") if line]
        said = {name: value for name, _, value in fields}
        if not said:
            continue
        data = json_or_text(said.get("data", ""))
        found.append(data if [*said] == ["data"] else {"fields": [*said], **said, "data": data})
    return found


def put_together(stream: Sequence[Any]) -> Any:
    """Choice by choice, or item by item, what all events say together."""
    if any(isinstance(each, dict) and "fields" in each for each in stream):
        return joined_deltas(stream)
    groups: dict[str, Any] = {}
    shared: Record = {}
    for event in (each for each in stream if isinstance(each, dict)):
        shared |= {name: event[name] for name in SHARED if event.get(name) is not None}
        name, said = group_name(event), opened(event)
        if "meta_info" in said:  # each event of SGLang's says everything so far
            groups[name] = said
        else:
            groups[name] = together(groups.get(name), said)
    others = [each for each in stream if not isinstance(each, dict)]
    return {**dict(sorted(groups.items())), "shared": shared, "others": others}


def group_name(event: Record) -> str:
    """Of the choice that an event is about."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return f"choice {choices[0]['index']}" if choices else "no choice"
    return f"sample {event.get('index')}" if "error" not in event else "error"


def opened(event: Record) -> Record:
    """An event with its fingerprint read, and without what belongs to no choice alone."""
    said = {
        name: "<shared>" if name == "usage" and value else value for name, value in event.items()
    }
    for name in PROMPTS_OWN:
        said.pop(name, None)
    packed = said.get("system_fingerprint")
    if isinstance(packed, str):
        said["system_fingerprint"] = {
            name: unpacked(value) for name, value in json.loads(packed).items()
        }
    return said


def unpacked(value: Any) -> Any:
    """Base64 as a list of bytes, which can be continued."""
    if isinstance(value, list):
        return [unpacked(each) for each in value]
    return list(base64.b64decode(value)) if isinstance(value, str) else value


def together(before: Any, after: Any, key: str = "") -> Any:
    """Two pieces of an answer as one."""
    if before is None or after is None:
        return after if before is None else before
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        return {name: together(before.get(name), after.get(name), name) for name in names}
    if isinstance(before, list) and isinstance(after, list):
        return joined_lists(before, after, key)
    if isinstance(before, str) and isinstance(after, str) and key in JOINED:
        return before + after
    return after


def joined_lists(before: list[Any], after: list[Any], key: str) -> list[Any]:
    """Choices and calls have an index; of a fingerprint's lists, each is of the same choice."""
    if key in ("choices", "tool_calls"):
        entries = {each["index"]: each for each in before}
        for each in after:
            entries[each["index"]] = together(entries.get(each["index"]), each)
        return [*entries.values()]
    if key.startswith("packed_") or key == "completion_ids":
        return [one + other for one, other in zip(before, after, strict=True)]
    return before + after


def joined_deltas(stream: Sequence[Any]) -> list[Any]:
    """Typed events in their order, neighbouring deltas of the same kind as one.

    Their numbers go, as long as they are 0, 1, 2, ...
    """
    found: list[Any] = []
    for number, each in enumerate(stream):
        data = dict(each["data"])
        if data.get("sequence_number") == number:
            del data["sequence_number"]
        event = {**each, "data": data}
        last = found[-1]["data"] if found else {}
        if "delta" in data and _same_delta(last, data):
            found[-1] = {**event, "data": together(last, data)}
        else:
            found.append(event)
    return found


def _same_delta(before: Record, after: Record) -> bool:
    parts = ("type", "item_id", "output_index", "content_index")
    return "delta" in before and all(before.get(each) == after.get(each) for each in parts)


# --- recording ------------------------------------------------------------------------------------


def main_asks() -> list[Ask]:
    return [
        *engine_routes(),
        *completions(),
        *chats(),
        *responses(),
        *generate(),
        *embeddings(),
        *tokens(),
        *refusals(),
        *transport(),
        *synchronous(),
    ]


def record(toka: Path) -> list[Record]:
    """What both engines answer. The second one starts while the first is asked."""
    with tempfile.TemporaryDirectory() as name:
        directories = [Path(name) / each for each in ("main", "other", "tokenizer")]
        for each in directories:
            each.mkdir()
        engine = Engine(toka, MAIN_FLAGS, directories[0])
        other: Engine | None = None
        try:
            engine.wait_ready()
            told = f"tokenizer={tokenizer_with_tools(engine, directories[2])}"
            other = Engine(toka, (*OTHER_FLAGS, told), directories[1])
            records = asked(engine, main_asks())
            records += Batches(engine).records()
            records += asked_together(engine, crowd())
            other.wait_ready()
            records += asked(other, other_asks())
        finally:
            ends = [each.stop() for each in (engine, other) if each is not None]
        return [*records, {"name": "exit", "status": ends, "log": troubles(engine, other)}]


def tokenizer_with_tools(engine: Engine, directory: Path) -> Path:
    """The demo model's tokenizer with a chat template that takes tools and thinks."""
    info = engine.send(Ask("", "/model_info", method="GET")).json()
    source = Path(info["tokenizer_path"])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + TURN
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return directory


def asked(engine: Engine, asks: Sequence[Ask]) -> list[Record]:
    return [written(each, engine.send(each)) for each in asks]


def asked_together(engine: Engine, asks: Sequence[Ask]) -> list[Record]:
    """The texts only: what runs beside each other changes from run to run."""
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = [*pool.map(engine.send, asks)]
    records = []
    for ask, answer in zip(asks, answers, strict=True):
        choice = answer.json()["choices"][0]
        said = choice["text"] if "text" in choice else choice["message"]["content"]
        records.append({**written(ask, answer), "answer": said})
    return records


def troubles(*engines: Engine | None) -> list[str]:
    """Warnings and errors of the logs, without their times."""
    lines = [line for each in engines if each is not None for line in each.log.splitlines()]
    return [line[9:] for line in lines if re.match(r"[\d:]{8} (?!INFO)", line)]


# --- comparing ------------------------------------------------------------------------------------


def differences(
    one: Any, other: Any, tolerance: float, place: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two records differ, and what each says there."""
    if isinstance(one, dict) and isinstance(other, dict):
        yield from _of_objects(one, other, tolerance, place)
    elif isinstance(one, list) and isinstance(other, list):
        for number, (each, its) in enumerate(zip(one, other, strict=False)):
            yield from differences(each, its, tolerance, f"{place}[{number}]")
        if len(one) != len(other):
            yield f"{place} length", len(one), len(other)
    elif not _same(one, other, tolerance):
        yield place, one, other


def _of_objects(
    one: Record, other: Record, tolerance: float, place: str
) -> Iterator[tuple[str, Any, Any]]:
    missing = "<nothing>"
    for name in dict.fromkeys([*one, *other]):
        each, its = one.get(name, missing), other.get(name, missing)
        yield from differences(each, its, tolerance, f"{place}.{name}")
    if one.keys() == other.keys() and [*one] != [*other]:
        yield f"{place} order of fields", [*one], [*other]


def _same(one: Any, other: Any, tolerance: float) -> bool:
    """1 is neither 1.0 nor true: clients in other languages see the difference."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and tolerance:
        return math.isclose(one, other, rel_tol=0, abs_tol=tolerance)
    return bool(one == other)


def compare(one: Sequence[Record], other: Sequence[Record], tolerance: float) -> int:
    """Prints what differs; returns how many requests do."""
    before = {each["name"]: each for each in one}
    after = {each["name"]: each for each in other}
    num_different = 0
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            print(f"{name}: only in the {'second' if name in after else 'first'} record")
            num_different += 1
            continue
        found = [*differences(before[name], after[name], tolerance)]
        num_different += bool(found)
        for place, each, its in found:
            print(f"{name}: {place.lstrip('.')}\n    {_short(each)}\n    {_short(its)}")
    return num_different


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_BODY_CHARS else text[:MAX_BODY_CHARS] + "..."


# --- the two commands -----------------------------------------------------------------------------


def run_record(options: argparse.Namespace) -> int:
    started = time.monotonic()
    records = record(options.toka)
    names = [each["name"] for each in records]
    twice = {each for each in names if names.count(each) > 1}
    if twice:
        raise SystemExit(f"names that come twice: {sorted(twice)}")
    options.out.write_text(json.dumps({"requests": records}, indent=1) + "\n")
    print(f"{len(records)} requests in {time.monotonic() - started:.1f} s: {options.out}")
    return 0


def run_compare(options: argparse.Namespace) -> int:
    one, other = (json.loads(each.read_text())["requests"] for each in (options.a, options.b))
    num_different = compare(one, other, options.tolerance)
    if num_different:
        print(f"{num_different} requests differ")
        return 1
    print(f"{len(one)} requests were identical")
    return 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Records an engine's answers, compares records.")
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="ask an engine, and write its answers down")
    recording.add_argument("out", type=Path)
    recording.add_argument("--toka", type=Path, default=Path(sys.executable).with_name("toka"))
    recording.set_defaults(run=run_record)
    comparing = commands.add_parser("compare", help="say what differs between two records")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--tolerance", type=float, default=0.0, help="of floats")
    comparing.set_defaults(run=run_compare)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
