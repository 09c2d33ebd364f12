"""Chat templates write what transformers makes of them, and a bounded amount of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pydantic
import pytest
from fake_engine import WRAPPED
from rows import each_row
from templates import CONVERSATIONS, DOCUMENTS, TEMPLATES, TOOLS
from transformers import PreTrainedTokenizerFast

from tokasaurus.errors import RequestError
from tokasaurus.text.chat_templates import ChatTemplate
from tokasaurus.text.template_meter import TemplateLimit
from tokasaurus.text.tokenizer import Tokenizer

# Other versions leave some values as they are, which these templates show.
IS_ORACLE = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23)

ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"add_generation_prompt": True},
    {"continue_final_message": True},
    {"continue_final_message": "reasoning_content"},
    {"tools": TOOLS},
    {"tools": TOOLS, "add_generation_prompt": True, "enable_thinking": False},
    {"tools": TOOLS, "tools_in_user_message": False},
    {"documents": DOCUMENTS, "bos_token": "<other>"},
)
SAID = [{"role": "user", "content": "hi"}]


def outcome(write: Callable[[], str]) -> str:
    """The text, or the kind of error."""
    try:
        return write()
    except Exception as error:
        return type(error).__name__


@pytest.mark.skipif(not IS_ORACLE, reason="this version of transformers writes other texts")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(name):
    ours, different, num_texts = ChatTemplate(TEMPLATES[name]), [], 0
    for title, messages in CONVERSATIONS.items():
        for arguments in ARGUMENTS:
            expected = outcome(
                lambda messages=messages, arguments=arguments: WRAPPED.apply_chat_template(
                    list(messages), chat_template=TEMPLATES[name], tokenize=False, **arguments
                )
            )
            variables = {**WRAPPED.special_tokens_map, **arguments}
            found = outcome(
                lambda messages=messages, variables=variables: ours.render(messages, **variables)
            )
            num_texts += len(found) > 40
            if found != expected:
                different.append((title, sorted(arguments), expected, found))
    assert different == []
    assert num_texts > 20


class Color(enum.Enum):
    RED = 1


class Name(str, enum.Enum):
    ANNE = "Anne"


@dataclasses.dataclass
class Point:
    x: int


class Model(pydantic.BaseModel):
    y: float = 0.5


@pytest.mark.skipif(not IS_ORACLE, reason="this version of transformers writes other texts")
def test_python_objects_are_reduced_to_plain_values():
    template = "{% for value in values %}{{ value }}|{% endfor %}"
    values = [1, True, None, 0.25, "a", (1, [2]), {"a": {"b": None}}, Color.RED, Name.ANNE]
    values += [np.float32(0.5), np.zeros(2), Point(3), Model(), object(), b"bytes"]
    expected = WRAPPED.apply_chat_template(
        SAID, chat_template=template, tokenize=False, values=values
    )
    assert ChatTemplate(template).render(SAID, values=values) == expected


def test_a_conversation_is_not_changed():
    said = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "ho"}], "name": None})
    before = repr(said)
    ChatTemplate(TEMPLATES["gemma"]).render(said, bos_token="", continue_final_message=True)
    assert repr(said) == before


DOUBLED = (
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = GROWN %}{% endfor %}"
)
LISTS = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = GROWN %}{% endfor %}"


@each_row(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**1000000000 }}",
        "{{ 'x'|center(10**10) }}",
        "{{ 'x'|indent(10**10, true) }}",
        "{{ ('\n' * 100)|indent('y' * 10**6, true) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%.10000000000f' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '%10000000000d'.encode() % 1 }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**10}) }}",
        "{{ ('{0}' * 1000).format('x' * 10**6) }}",
        "{{ ('%s' * 1000) % (('x' * 10**6,) * 1000) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'|attr('zfill')(10**10) }}",
        "{{ ('\t' * 1000).expandtabs(10**9) }}",
        "{{ 'aaaa'.replace('a', 'b' * 10**6).replace('b', 'c' * 1000) }}",
        "{{ 'aaaa'|replace('a', 'b' * 10**6)|replace('b', 'c' * 1000) }}",
        "{% filter replace('a', 'b' * 10**6) %}aaaaaaaaaaa{% endfilter %}",
        "{{ 'a'.translate({97: 'x' * 10**6}) }}",
        "{{ ('b' * 10**6).join(['a'] * 1000) }}",
        "{{ (['a'] * 1000)|join('b' * 10**6) }}",
        "{{ (['a'] * 1000)|map('upper')|join('b' * 10**6) }}",
        "{{ ('a b ' * 1000)|wordwrap(1, wrapstring='b' * 10**6) }}",
        "{{ [1]|batch(10**9, 'x')|list }}",
        "{{ [1]|slice(10**9)|list }}",
        "{{ 2.5|round(10**9) }}",
        "{{ [[1] * 1000] * 1000|int }}{{ ([[1] * 1000] * 1000)|tojson(indent=1000) }}",
        DOUBLED.replace("GROWN", "ns.s ~ ns.s"),
        DOUBLED.replace("GROWN", "ns.s + ns.s"),
        LISTS.replace("GROWN", "ns.s + ns.s"),
        LISTS.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s }}",
        LISTS.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s|tojson }}",
        LISTS.replace("GROWN", "{'a': ns.s, 'b': ns.s}") + "{{ ns.s ~ '' }}",
        "{% set x %}{% for i in range(100000) %}LITERAL{% endfor %}{% endset %}",
        "{% macro m() %}LITERAL{% endmacro %}{% for i in range(100000) %}{{ m() }}{% endfor %}",
    ],
)
def test_a_template_that_writes_too_much_is_stopped(template):
    """Long before it has written 10 MB, or a list of lists of that size."""
    template = template.replace("LITERAL", "x" * 1000)
    with pytest.raises(TemplateLimit):
        ChatTemplate(template, max_chars=10**7).render(SAID)


@each_row(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ range(100000)|sum }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% for x in [30] recursive %}{% if x %}{{ loop([x - 1, x - 1]) }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_runs_too_long_is_stopped(template):
    with pytest.raises(TemplateLimit, match=r"takes more than 0\.05 seconds"):
        ChatTemplate(template, max_seconds=0.05).render(SAID)


@each_row("template", ["{{ 'x'.__class__ }}", "{{ messages.append(1) }}", "{{ lipsum() }}"])
def test_the_sandbox_holds(template):
    assert outcome(lambda: ChatTemplate(template + "{{ 1 / 0 }}").render(SAID)) in (
        "SecurityError",
        "UndefinedError",
        "ZeroDivisionError",
    )
    assert "class 'str'" not in outcome(lambda: ChatTemplate(template).render(SAID))


def test_a_stopped_template_leaves_the_next_one_alone():
    template = ChatTemplate("{{ 'x' * n }}", max_chars=1000)
    for _ in range(3):
        with pytest.raises(TemplateLimit):
            template.render(SAID, n=2000)
        assert len(template.render(SAID, n=400)) == 400


def test_a_tokenizer_notes_that_its_template_takes_long(monkeypatch):
    clock = iter(range(1000))
    tokenizer = Tokenizer(WRAPPED, len(WRAPPED))
    assert tokenizer.render_chat(SAID)
    assert not tokenizer.chats_take_long
    monkeypatch.setattr("time.thread_time", lambda: next(clock))
    assert tokenizer.render_chat(SAID)
    assert tokenizer.chats_take_long


class Writer(PreTrainedTokenizerFast):
    def apply_chat_template(self, conversation: list[dict[str, str]], **_: object) -> str:
        return "the cat" * len(conversation)


def test_a_class_with_its_own_code_for_conversations_is_used():
    wrapped = Writer(tokenizer_object=WRAPPED.backend_tokenizer, chat_template="{{ 1 / 0 }}")
    tokenizer = Tokenizer(wrapped, len(wrapped))
    assert tokenizer.render_chat(SAID * 2) == tokenizer.encode_fragment("the catthe cat")


def test_a_models_template_without_end_refuses_its_requests():
    tokenizer = Tokenizer(WRAPPED, len(WRAPPED), trusts_templates=True)
    with pytest.raises(RequestError, match="it writes more than 268435456 characters") as error:
        tokenizer.render_chat(SAID, {"chat_template": "{{ 'x' * 10**10 }}"})
    assert error.value.field == "messages"
