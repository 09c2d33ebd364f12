"""The fields of vLLM's and SGLang's requests, with their defaults there.

As of vLLM 0.33.0 and SGLang 0.5.23, of October 2026, and what earlier versions of that year sent.

Programs that build requests with these servers' own types send every field at its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from field_table import (
    BASE,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    GENERATE,
    RESPONSES,
    SGLANG,
    TOKENIZE,
    USER,
)


@dataclass(frozen=True)
class PeerRequest:
    """One kind of request of a peer.

    Args:
        path: of our route for it.
        base: the fields that a client has to send.
        null: the fields with the default null.
        others: the other fields, with their defaults.
        changing: of these, the fields whose default there is not the default here.
    """

    path: str
    base: Mapping[str, Any]
    null: str
    others: Mapping[str, Any] = field(default_factory=dict)
    changing: frozenset[str] = frozenset()

    @property
    def defaults(self) -> dict[str, Any]:
        return {**dict.fromkeys(self.null.split()), **self.others}


_VLLM_GENERATION = (
    "allowed_token_ids cache_salt ec_transfer_params frequency_penalty kv_transfer_params"
    " logit_bias logprob_token_ids min_p model presence_penalty prompt_logprobs"
    " repetition_detection repetition_penalty response_format return_token_ids"
    " return_tokens_as_token_ids seed session_id stream_interval stream_options"
    " structured_outputs temperature thinking_token_budget top_k top_p truncate_prompt_tokens"
    " truncation_side user vllm_xargs watermarking"
)
_VLLM_GENERATION_OTHERS = {
    "bad_words": [],
    "echo": False,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "mm_payload": "tensors",
    "n": 1,
    "priority": 0,
    "request_id": "mine",
    "return_mm_kwargs": True,
    "return_token_offsets": False,
    "return_weight_versions": False,
    "routed_experts_prompt_start": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "stream": False,
    "use_beam_search": False,
}
_VLLM_POOLING = (
    "cache_salt chat_template chat_template_kwargs dimensions media_io_kwargs mm_processor_kwargs"
    " model normalize padding truncate_prompt_tokens truncation_side use_activation user"
)
_SGLANG_ROUTING = (
    "bootstrap_host bootstrap_port bootstrap_room cache_salt custom_labels custom_logit_processor"
    " custom_params data_parallel_rank disagg_prefill_dp_rank extra_key images_config lora_path"
    " mm_processor_kwargs ngram_corpus_id priority rid routed_dp_rank session_id session_params"
    " watermark"
)
_SGLANG_GENERATION = {
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "min_tokens": 0,
    "model": "default",
    "n": 1,
    "no_stop_trim": False,
    "presence_penalty": 0.0,
    "return_cached_tokens_details": False,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "return_spec_tokens_details": False,
    "return_token_ids": False,
    "routed_experts_start_len": 0,
    "skip_special_tokens": True,
    "stream": False,
}
_RESPONSES = (
    "cache_salt chat_template_kwargs include instructions max_output_tokens max_tool_calls"
    " metadata previous_response_id reasoning repetition_penalty session_id temperature text top_k"
    " top_p user"
)
_RESPONSES_OTHERS = {
    "background": False,
    "parallel_tool_calls": True,
    "priority": 0,
    "request_id": "resp_mine",
    "service_tier": "auto",
    "store": True,
    "stream": False,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
}

PEER_REQUESTS: Mapping[str, PeerRequest] = {
    "vLLM's completions": PeerRequest(
        COMPLETIONS,
        {**BASE[COMPLETIONS], "max_tokens": 16},
        f"{_VLLM_GENERATION} logprobs prompt_embeds suffix",
        {**_VLLM_GENERATION_OTHERS, "add_special_tokens": True, "max_tokens": 16},
    ),
    "vLLM's chat": PeerRequest(
        CHAT,
        BASE[CHAT],
        f"{_VLLM_GENERATION} chat_template chat_template_kwargs documents max_completion_tokens"
        " media_io_kwargs mm_processor_kwargs reasoning_effort return_prompt_text tools",
        {
            **_VLLM_GENERATION_OTHERS,
            "add_generation_prompt": True,
            "add_special_tokens": False,
            "continue_final_message": False,
            "include_reasoning": True,
            "logprobs": False,
            "parallel_tool_calls": True,
            "tool_choice": "none",
            "top_logprobs": 0,
        },
    ),
    "vLLM's responses": PeerRequest(
        RESPONSES,
        BASE[RESPONSES],
        f"{_RESPONSES} ec_transfer_params frequency_penalty kv_transfer_params logit_bias"
        " media_io_kwargs min_p mm_processor_kwargs model presence_penalty previous_input_messages"
        " previous_response prompt prompt_cache_key prompt_cache_options prompt_cache_retention"
        " safety_identifier seed structured_outputs vllm_xargs",
        {
            **_RESPONSES_OTHERS,
            "enable_response_messages": False,
            "ignore_eos": False,
            "include_reasoning": True,
            "include_stop_str_in_output": False,
            "mm_payload": "tensors",
            "return_mm_kwargs": True,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "stop": [],
            "stop_token_ids": [],
            "watermarking": True,
        },
        frozenset({"service_tier"}),
    ),
    "vLLM's embeddings": PeerRequest(
        EMBEDDINGS,
        BASE[EMBEDDINGS],
        _VLLM_POOLING,
        {
            "add_generation_prompt": False,
            "add_special_tokens": True,
            "continue_final_message": False,
            "embed_dtype": "float32",
            "encoding_format": "float",
            "endianness": "native",
            "priority": 0,
            "request_id": "mine",
        },
    ),
    "vLLM's tokenize, of a text": PeerRequest(
        TOKENIZE,
        {"prompt": "the cat"},
        "model",
        {"add_special_tokens": True, "return_token_strs": False},
    ),
    "vLLM's tokenize, of a chat": PeerRequest(
        TOKENIZE,
        {"messages": [USER]},
        "chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs model tools",
        {
            "add_generation_prompt": True,
            "add_special_tokens": False,
            "continue_final_message": False,
            "return_token_strs": False,
        },
    ),
    "vLLM's detokenize": PeerRequest(DETOKENIZE, {"tokens": [70]}, "model"),
    "SGLang's completions": PeerRequest(
        COMPLETIONS,
        {**BASE[COMPLETIONS], "max_tokens": 16},
        f"{_SGLANG_ROUTING} best_of ebnf json_schema logit_bias logprobs regex response_format seed"
        " stop stop_regex stop_token_ids stream_options suffix user",
        {
            **_SGLANG_GENERATION,
            "echo": False,
            "max_tokens": 16,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
        },
    ),
    "SGLang's chat": PeerRequest(
        CHAT,
        BASE[CHAT],
        f"{_SGLANG_ROUTING} chat_template_kwargs ebnf input_ids logit_bias max_completion_tokens"
        " max_dynamic_patch min_dynamic_patch min_p reasoning_effort regex repetition_penalty"
        " response_format sampling_logprobs_mode seed stop stop_regex stop_token_ids"
        " stream_options task temperature thinking tools top_k top_logprobs top_p user"
        " video_config",
        {
            **_SGLANG_GENERATION,
            "continue_final_message": False,
            "logprobs": False,
            "parallel_tool_calls": True,
            "return_flat_raw_output_top_logprobs": False,
            "return_flat_raw_top_logprobs_b64": True,
            "return_input_ids_in_sglext": False,
            "return_meta_info": False,
            "return_output_ids_in_sglext": False,
            "return_prompt_token_ids": False,
            "return_sampling_mask": False,
            "separate_reasoning": True,
            "stream_reasoning": True,
            "tool_choice": "auto",
            "use_audio_in_video": False,
        },
    ),
    "SGLang's responses": PeerRequest(
        RESPONSES,
        BASE[RESPONSES],
        f"{_RESPONSES} bootstrap_host bootstrap_port bootstrap_room data_parallel_rank"
        " disagg_prefill_dp_rank extra_key min_p model ngram_corpus_id routed_dp_rank stop",
        {**_RESPONSES_OTHERS, "frequency_penalty": 0.0, "presence_penalty": 0.0},
        frozenset({"service_tier"}),
    ),
    "SGLang's embeddings": PeerRequest(
        EMBEDDINGS,
        BASE[EMBEDDINGS],
        "dimensions embed_override_token_id embed_overrides lora_path priority rid user",
        {"encoding_format": "float", "model": "default"},
    ),
    "SGLang's tokenize, of a text": PeerRequest(
        TOKENIZE,
        {"prompt": "the cat"},
        "add_generation_prompt chat_template_kwargs messages reasoning_effort tool_choice tools",
        {"add_special_tokens": True, "continue_final_message": False, "model": "default"},
    ),
    "SGLang's tokenize, of a chat": PeerRequest(
        TOKENIZE,
        {"messages": [USER]},
        "add_generation_prompt chat_template_kwargs prompt reasoning_effort tool_choice tools",
        {"continue_final_message": False, "model": "default"},
    ),
    "SGLang's detokenize": PeerRequest(
        DETOKENIZE,
        {"tokens": [70]},
        "",
        {"model": "default", "skip_special_tokens": True},
    ),
    "SGLang's generate": PeerRequest(
        GENERATE,
        SGLANG,
        "audio_data bootstrap_host bootstrap_pair_key bootstrap_port bootstrap_room cache_salt"
        " conversation_id custom_labels custom_logit_processor data_parallel_rank decode_tp_size"
        " disagg_prefill_dp_rank encoder_urls external_trace_header extra_key http_worker_ipc"
        " image_data image_max_dynamic_patch images_config input_embeds input_ids kv_hints"
        " kv_router_hint logprob_start_len lora_id lora_path max_dynamic_patch max_thinking_tokens"
        " min_dynamic_patch mm_content_hashes mm_hashes mm_processor_kwargs modalities"
        " multi_item_delimiter_indices need_wait_for_mm_inputs num_items_assigned"
        " positional_embed_overrides priority received_time return_logprob return_sampling_mask"
        " rid routed_dp_rank routing_key sampling_logprobs_mode session_id session_params"
        " token_ids_logprob token_indices_to_pool top_logprobs_num video_config video_data"
        " video_max_dynamic_patch watermark",
        {
            "background": False,
            "log_metrics": True,
            "no_logs": False,
            "require_reasoning": False,
            "return_bytes": False,
            "return_entropy": False,
            "return_flat_raw_output_top_logprobs": False,
            "return_flat_raw_top_logprobs": False,
            "return_flat_raw_top_logprobs_b64": False,
            "return_hidden_states": False,
            "return_indexer_topk": False,
            "return_prompt_token_ids": False,
            "return_routed_experts": False,
            "return_text_in_logprobs": False,
            "routed_experts_start_len": 0,
            "stream": False,
            "use_audio_in_video": False,
        },
    ),
}

_NULL_SAMPLING = (
    "custom_params ebnf json_schema logit_bias regex stop stop_regex stop_token_ids"
    " stream_interval structural_tag"
)
SGLANG_SAMPLING: Mapping[str, Any] = {
    **dict.fromkeys(_NULL_SAMPLING.split()),
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "n": 1,
    "no_stop_trim": False,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "temperature": 1.0,
    "top_k": 1 << 30,
    "top_p": 1.0,
}
"""The sampling parameters of SGLang's ``/generate``, with their defaults."""
