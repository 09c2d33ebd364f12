"""Request fields that the server knows and does not support, with the values that change nothing.

Clients send many of these fields at a harmless value, which is accepted. Any other value is an
error that names the field: a field is never ignored if it would have changed the answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from tokasaurus.errors import RequestError
from tokasaurus.untrusted_json import shown

__all__ = ["HARMLESS", "without_harmless"]

_BOTH = (True, False)
_ANY_STRING = str

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    # OpenAI: sampling
    "best_of": (1,),
    "suffix": ("",),
    # OpenAI: the form of the answer
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": _BOTH,  # without tools there is nothing to call
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
    # OpenAI: names and hints, which never change an answer
    "prompt_cache_key": (_ANY_STRING,),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": (_ANY_STRING,),
    "safety_identifier": (_ANY_STRING,),
    "store": (False,),
    # Other engines
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "cache_salt": (),
    "cartridges": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "ebnf": (),
    "extra_key": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "lora_path": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "no_stop_trim": (False,),
    "regex": (),
    "request_id": (),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "rid": (),
    "separate_reasoning": (True,),
    "session_params": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stream_reasoning": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}
"""Null is harmless everywhere, and not listed. A type stands for all its values."""

_REASONS: Mapping[str, str] = {
    "add_generation_prompt": "it is an argument in chat_template_kwargs",
    "best_of": "every sample is returned, none is chosen: ask for n samples",
    "chat_template": "it is an argument in chat_template_kwargs",
    "continue_final_message": "it is an argument in chat_template_kwargs",
    "ebnf": "ask for structured_outputs",
    "json_schema": "ask for structured_outputs or response_format",
    "reasoning_effort": "where a chat template knows it, it is an argument in chat_template_kwargs",
    "regex": "ask for structured_outputs",
    "return_token_ids": "they are in system_fingerprint",
    "store": "this server keeps no completions",
    "suffix": (
        "the text only ever goes on from the prompt: put a fill-in-the-middle prompt together"
        " yourself"
    ),
}


def without_harmless(
    body: Mapping[str, Any],
    supported: Collection[str],
    harmless: Mapping[str, tuple[Any, ...]] = HARMLESS,
    *,
    where: str = "",
) -> dict[str, Any]:
    """The fields of a request without the harmless ones.

    Args:
        body: the request.
        supported: the fields of its schema.
        harmless: other fields, with the values that change nothing; () if only null is harmless.
        where: what stands before a field's name in errors.

    Raises:
        RequestError: a field is unknown, or has a value that is not supported; names it.
    """
    fields = {}
    for name, value in body.items():
        if name in supported:
            fields[name] = value
        elif name not in harmless:
            raise RequestError(_unknown(where + name, name, supported), where + name)
        elif value is not None and not any(_matches(value, each) for each in harmless[name]):
            raise RequestError(where + _unsupported(name, value), where + name)
    return fields


def _matches(value: Any, harmless: Any) -> bool:
    if isinstance(harmless, type):
        return isinstance(value, harmless)
    # True is 1 to Python.
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _unknown(path: str, name: str, supported: Collection[str]) -> str:
    near = difflib.get_close_matches(name, supported, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path} is not a field of this request{hint}"


def _unsupported(name: str, value: Any) -> str:
    reason = f" ({_REASONS[name]})" if name in _REASONS else ""
    return (
        f"{name} is not supported, but for values that change nothing{reason}; it was"
        f" {shown(value)}"
    )
