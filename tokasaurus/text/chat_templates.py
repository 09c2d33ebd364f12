"""Chat templates: programs in the Jinja language that write a conversation as one text.

The text is the one that ``apply_chat_template`` of transformers 5.23 writes, in every version of
transformers. But a template comes with a model, and nothing bounds what it does there. Here it runs
in a ``Sandbox`` with limits.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from tokasaurus.text.template_meter import Meter
from tokasaurus.text.template_sandbox import Sandbox

__all__ = ["WITHOUT_DATES", "ChatTemplate", "writes_dates"]

MAX_CHARS = 1 << 28
"""The characters that a template may make, texts on the way to its output included."""

MAX_SECONDS = 10.0
"""The processor time that it may take."""

WITHOUT_DATES = (
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Writes what a template of Llama 3 writes, without its block of dates."""

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# The names of one field. The first is the one that most templates read.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def writes_dates(source: str) -> bool:
    """Whether a template is one of Llama 3 that puts a block of dates before a conversation."""
    return "<|start_header_id|>" in source and "Cutting Knowledge Date" in source


class ChatTemplate:
    """One chat template, for one thread at a time.

    Args:
        source: the program.
        max_chars: what it may write.
        max_seconds: of processor time.

    Raises:
        TemplateError: the program is wrong.
    """

    def __init__(
        self, source: str, max_chars: int = MAX_CHARS, max_seconds: float = MAX_SECONDS
    ) -> None:
        self._source = source
        self._meter = Meter(max_chars, max_seconds)
        self._template = Sandbox(source, _FILTERS, _VARIABLES, self._meter).template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: of the conversation, at least one. Values of None count as missing.
            tools: that the model may call.
            documents: that it may use.
            add_generation_prompt: the text ends where the assistant's next message begins.
            continue_final_message: the text ends where the last message does; a name says which
                field of the message that is.
            variables: what else the template reads.

        Raises:
            TemplateLimit: it writes too much or takes too long.
            Exception: whatever the template raises.
        """
        if not messages:
            raise ValueError("a conversation has at least one message")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        chat = [_message(each) for each in messages]
        continued = ""
        if continue_final_message:
            name = continue_final_message if isinstance(continue_final_message, str) else "content"
            continued = self._tag_end(chat[-1], name)
        self._meter.start()
        text = self._template.render(
            messages=chat,
            tools=_plain(tools),
            documents=_plain(documents),
            add_generation_prompt=add_generation_prompt,
            **_plain(variables),
        )
        return _cut_at_tag(text, continued) if continue_final_message else text

    def _tag_end(self, message: dict[str, Any], name: str) -> str:
        """Puts a mark behind the text that is to be continued, and returns the text."""
        said = message.get(name)
        if said is None:
            raise ValueError(f"the last message has no {name} to continue")
        fields = [name]
        if name in _REASONING_FIELDS:
            fields = [each for each in _REASONING_FIELDS if message.get(each) == said]
        if not any(field in self._source for field in fields):
            raise ValueError(f"the chat template does not read {name}, which is to be continued")
        if isinstance(said, (list, tuple)):
            for part in reversed(said):
                if "text" in part:
                    text = part["text"]
                    part["text"] = text + _TAG
                    return str(text)
            raise ValueError("the last message has no text to continue")
        for field in fields:
            message[field] = message[field] + _TAG
        return str(said)


def _cut_at_tag(text: str, continued: str) -> str:
    if continued.strip() not in text or _TAG.strip() not in text:
        raise ValueError(
            "the chat template leaves out parts of the message that is to be continued"
        )
    end = text.rindex(_TAG.strip())
    before = text[:end]
    # Where the template strips messages, the mark has lost its space.
    return before if text[end : end + len(_TAG)] == _TAG else before.rstrip()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    given = (plain[name] for name in _REASONING_FIELDS if name in plain)
    reasoning = next(given, None)
    if reasoning is not None:
        return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """A copy that consists of JSON's types. Others have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    # Enumerations and the like are reduced to their values.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


# --- what templates may call ----------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes what has a meaning in HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Dict:
    """``dict`` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that namespace(self=...) is possible
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have {name!r}, which begins with an underscore")


_FILTERS = {"tojson": _tojson}
_VARIABLES = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "dict": _Dict(),
    "namespace": _Namespace,
}
