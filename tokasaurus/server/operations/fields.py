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
_NO_OBJECT: tuple[Any, ...] = ({},)

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
    "reasoning": ({},),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # OpenAI: names and hints, which never change an answer
    "prompt_cache_key": (_ANY_STRING,),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": (_ANY_STRING,),
    "safety_identifier": (_ANY_STRING,),
    "store": _BOTH,  # nothing is kept, which an answer says where it has a place for it
    # Other engines: hints about libraries, and names
    "guided_decoding_backend": (_ANY_STRING,),
    "session_id": (_ANY_STRING,),
    "truncation_side": (_ANY_STRING,),  # nothing is truncated
    # Other engines
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bootstrap_pair_key": (),
    "cache_salt": ("",),
    "cartridges": ([],),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "chat_template": (),
    "conversation_id": (_ANY_STRING,),
    "custom_labels": _NO_OBJECT,
    "custom_params": _NO_OBJECT,
    "data_parallel_rank": (),
    "disagg_prefill_dp_rank": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "decode_tp_size": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "enable_response_messages": (False,),
    "ec_transfer_params": _NO_OBJECT,
    "external_trace_header": _NO_OBJECT,
    "extra_key": ("",),
    "guided_whitespace_pattern": (),
    "images_config": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_hints": _NO_OBJECT,
    "kv_router_hint": _NO_OBJECT,
    "kv_transfer_params": _NO_OBJECT,
    "length_penalty": (1,),
    "image_max_dynamic_patch": (),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "lora_path": (),
    "max_dynamic_patch": (),
    "max_thinking_tokens": (),
    "media_io_kwargs": _NO_OBJECT,
    "min_dynamic_patch": (),
    "mm_content_hashes": ([],),
    "mm_hashes": ([],),
    "mm_payload": ("tensors", "none"),  # of images, of which there are none
    "mm_processor_kwargs": _NO_OBJECT,
    "multi_item_delimiter_indices": ([],),
    "no_stop_trim": (False,),
    "ngram_corpus_id": (),
    "positional_embed_overrides": (),
    "previous_input_messages": ([],),
    "prompt_embeds": ([],),
    "repetition_detection": _NO_OBJECT,
    "require_reasoning": (False,),
    "return_cached_tokens_details": (False,),
    "return_entropy": (False,),
    "return_flat_raw_output_top_logprobs": (False,),
    "return_flat_raw_top_logprobs": (False,),
    "return_flat_raw_top_logprobs_b64": _BOTH,  # the form of what the two before it ask for
    "return_hidden_states": (False,),
    "return_indexer_topk": (False,),
    "return_input_ids_in_sglext": (False,),
    "return_meta_info": (False,),
    "return_mm_kwargs": _BOTH,
    "return_output_ids_in_sglext": (False,),
    "return_prompt_text": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_spec_tokens_details": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_weight_versions": (False,),
    "rid": (),
    "routed_dp_rank": (),
    "routed_experts_prompt_start": (0,),
    "routed_experts_start_len": (0,),
    "routing_key": (_ANY_STRING,),  # there is one engine to route to
    "sampling_logprobs_mode": (),
    "separate_reasoning": (True,),
    "session_params": _NO_OBJECT,
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ("", []),
    "stream_interval": (1,),
    "stream_reasoning": (True,),
    "task": (),
    "thinking": (),
    "thinking_token_budget": (-1,),
    "token_indices_to_pool": (),
    "truncate_prompt_tokens": (),
    "use_audio_in_video": (False,),
    "use_beam_search": (False,),
    "video_config": _NO_OBJECT,
    "video_max_dynamic_patch": (),
    "vllm_xargs": _NO_OBJECT,
    "watermark": (),
    "watermarking": (False,),
}
"""Null is harmless everywhere, and not listed. A type stands for all its values.

The newest fields of vLLM's and SGLang's requests are in ``peer_fields`` of the tests.
"""

_REASONS: Mapping[str, str] = {
    "access_programs": "this server runs no programs",
    "add_generation_prompt": "it is an argument of chat templates",
    "audio": "answers are text",
    "background": "a response is answered while its client waits; use a batch",
    "background_options": "a response is answered while its client waits; use a batch",
    "best_of": "every sample is returned; ask for n samples",
    "cache_salt": "the cache of prefixes has no partitions",
    "chat_template": "set it in chat_template_kwargs",
    "context_management": "the conversation is used as it is",
    "continue_final_message": "it is an argument of chat templates",
    "conversation": "this server keeps no conversations",
    "function_call": "it is called tool_choice now",
    "functions": "they are called tools now",
    "guided_whitespace_pattern": "set whitespace_pattern in structured_outputs",
    "image": "answers are text",
    "input_ids": "the token ids of a chat are called ids here",
    "max_tool_calls": "it must be a number",
    "messages": "this request takes texts or token ids in input",
    "modalities": "answers are text",
    "moderation": "this server moderates nothing",
    "prediction": "nothing is predicted from it",
    "previous_input_messages": "send the whole input",
    "previous_response": "send the whole input",
    "previous_response_id": "this server keeps no responses; send the whole input",
    "prompt": "this server keeps no prompts; send instructions and input",
    "prompt_cache_options": "the cache of prefixes needs no options",
    "reasoning": "it is an argument of chat templates",
    "reasoning_effort": "it is an argument of chat templates",
    "prompt_embeds": "prompts are texts or token ids",
    "return_prompt_token_ids": "return_token_ids returns them, too",
    "return_token_ids": "/tokenize tells the ids of a text, and output_ids has those of an answer",
    "return_weight_versions": "it is called return_weights_versions here",
    "rid": "name the request in request_id",
    "store": "it must be true or false",
    "suffix": ("text is only added after the prompt; write a fill-in-the-middle prompt yourself"),
    "thinking": "it is an argument of chat templates",
    "thinking_token_budget": "reasoning has no limit of its own; set max_tokens",
    "truncation": "it must be auto or disabled",
    "verbosity": "ask for it in the prompt",
    "web_search_options": "this server searches nothing",
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
        RequestError: a field is unknown, or has a value that is not supported; names it. An
            unknown field that is null is as good as left out.
    """
    fields = {}
    for name, value in body.items():
        if name in supported:
            fields[name] = value
        elif value is None:
            continue
        elif name not in harmless:
            raise RequestError(_unknown(where + name, name, supported), where + name)
        elif not any(_matches(value, each) for each in harmless[name]):
            raise RequestError(where + _unsupported(name, value), where + name)
    return fields


def _matches(value: Any, harmless: Any) -> bool:
    # True is 1 to Python.
    if isinstance(harmless, type):
        return isinstance(value, harmless) and not isinstance(value, bool)
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _unknown(path: str, name: str, supported: Collection[str]) -> str:
    near = difflib.get_close_matches(name, supported, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path} is not a field of this request{hint}"


def _unsupported(name: str, value: Any) -> str:
    reason = f": {_REASONS[name]}" if name in _REASONS else ""
    return f"{name} is not supported with the value {shown(value)}{reason}"
