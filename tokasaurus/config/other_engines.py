"""Flags of other engines, and ours for the same purpose.

Users bring them from vLLM, SGLang and llama.cpp's server. They are not accepted: what they mean
differs, and the error says how.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokasaurus.config.suggestions import Foreign

__all__ = ["OTHER_ENGINES"]

_TOGETHER = "prompt and completion together"
_RUNNING = "running sequences"
_STEP = "prompt and generated tokens of one batch together"
_TOKENS = "a number of tokens, not a share of memory"
_OPPOSITE = "with the opposite meaning: use_cudagraphs=F"
_ALWAYS = "prefix caching is always on"
_PER_REQUEST = "seeds belong to requests; the same request with the same seed draws the same tokens"
_LOCAL = "a directory, or a repository id"
_TEMPLATE = "the chat template comes with the tokenizer; use tokenizer=DIR to take another"
_ROPE = "the model's rope_scaling only, as JSON or by nested keys"
_ADAPTERS = "there are no adapters; cartridges need no flag"
_GRID = "an engine takes dp_size x pp_size x tp_size GPUs"
_METRICS = "/metrics is always there"
_ON_DEVICE = "all layers are on one kind of device"
_ORDER = "requests have priorities, and clients have fair shares, without a flag"
_SPECULATIVE = "there is no speculative decoding"
_TEXT_ONLY = "models read text only"
_VISIBLE = "the environment variable CUDA_VISIBLE_DEVICES chooses GPUs"

_BY_NAME: Mapping[str, Foreign] = {
    "alias": Foreign("served_model_name"),
    "allowed_origins": Foreign("cors_origins", "a list"),
    "api_server_count": Foreign("server_processes"),
    "attention_backend": Foreign("attention", "auto, compiled, flashinfer, triton or reference"),
    "base_gpu_id": Foreign(None, _VISIBLE),
    "batch_size": Foreign("max_tokens_per_forward", _STEP),
    "block_size": Foreign("page_size", "tokens in a page"),
    "cache_type_k": Foreign("kv_cache_dtype", "one for keys and values"),
    "cache_type_v": Foreign("kv_cache_dtype", "one for keys and values"),
    "chat_template": Foreign(None, _TEMPLATE),
    "chunked_prefill": Foreign(None, "prompts are always cut to max_tokens_per_forward"),
    "chunked_prefill_size": Foreign("max_tokens_per_forward", _STEP),
    "compilation_config": Foreign("torch_compile_config"),
    "cont_batching": Foreign(None, "batches are always continuous"),
    "context_length": Foreign("max_num_tokens_per_request", _TOGETHER),
    "cpu_offload_gb": Foreign(None, _ON_DEVICE),
    "ctx_size": Foreign(
        "kv_cache_num_tokens", "of all sequences; max_num_tokens_per_request is of one"
    ),
    "cuda_graph_bs": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "cuda_graph_bs_decode": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "cuda_graph_max_bs": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "cuda_graph_max_bs_decode": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "cuda_graph_max_size": Foreign("cudagraph_max_size"),
    "cuda_graph_sizes": Foreign(
        "cudagraph_max_size", "the largest; cudagraph_step is the distance"
    ),
    "data_parallel_backend": Foreign("launcher", "local or ray"),
    "data_parallel_size": Foreign("dp_size"),
    "decode_log_interval": Foreign("stats_report_seconds", "seconds, not batches"),
    "device_count": Foreign("tp_size", _GRID),
    "disable_cuda_graph": Foreign("use_cudagraphs", _OPPOSITE),
    "disable_decode_cuda_graph": Foreign("use_cudagraphs", _OPPOSITE),
    "disable_log_requests": Foreign("uvicorn_log_level", "warning hides the line of each request"),
    "disable_log_stats": Foreign("stats_report_seconds", "0 turns the line of statistics off"),
    "disable_metrics": Foreign(None, _METRICS),
    "disable_overlap_schedule": Foreign("scheduling_steps_ahead", "1 plans one batch at a time"),
    "disable_radix_cache": Foreign(None, _ALWAYS),
    "distributed_executor_backend": Foreign("launcher", "local or ray"),
    "download_dir": Foreign(None, "models are cached where the HF_HOME environment variable says"),
    "dp": Foreign("dp_size"),
    "enable_auto_tool_choice": Foreign(None, "tools need no flag; tool_call_parser=auto finds how"),
    "enable_chunked_prefill": Foreign(None, "prompts are always cut to max_tokens_per_forward"),
    "enable_deterministic_inference": Foreign("deterministic"),
    "enable_log_requests": Foreign("uvicorn_log_level", "info prints a line for each request"),
    "enable_lora": Foreign(None, _ADAPTERS),
    "enable_metrics": Foreign(None, _METRICS),
    "enable_prefix_caching": Foreign(None, _ALWAYS),
    "enable_sleep_mode": Foreign(None, "/sleep and /wake_up need no flag"),
    "enable_torch_compile": Foreign("torch_compile"),
    "enforce_eager": Foreign("use_cudagraphs", _OPPOSITE),
    "file_storage_path": Foreign("data_dir"),
    "flash_attn": Foreign("attention", "auto, compiled, flashinfer, triton or reference"),
    "generation_config": Foreign(None, "the model's generation_config.json is always read"),
    "gpu_memory_utilization": Foreign("kv_cache_num_tokens", _TOKENS),
    "hf_overrides": Foreign("rope_scaling", _ROPE),
    "hf_repo": Foreign("model", _LOCAL),
    "json_model_override_args": Foreign("rope_scaling", _ROPE),
    "kv_cache_memory_bytes": Foreign("kv_cache_num_tokens", "a number of tokens, not of bytes"),
    "limit_mm_per_prompt": Foreign(None, _TEXT_ONLY),
    "log_jsonl": Foreign("log_format", "json"),
    "log_level_http": Foreign("uvicorn_log_level"),
    "log_requests": Foreign("uvicorn_log_level", "info prints a line for each request"),
    "log_verbosity": Foreign("log_level"),
    "lora_modules": Foreign(None, _ADAPTERS),
    "lora_paths": Foreign(None, _ADAPTERS),
    "max_cudagraph_capture_size": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "max_batch_size": Foreign("max_seqs_per_forward", _RUNNING),
    "max_logprobs": Foreign("max_topk_logprobs"),
    "max_loras": Foreign(None, _ADAPTERS),
    "max_model_len": Foreign("max_num_tokens_per_request", _TOGETHER),
    "max_num_batched_tokens": Foreign("max_tokens_per_forward", _STEP),
    "max_num_queued_reqs": Foreign("max_queued_requests", "prompts, running ones too"),
    "max_num_seqs": Foreign("max_seqs_per_forward", _RUNNING),
    "max_prefill_tokens": Foreign("max_tokens_per_forward", _STEP),
    "max_queued_reqs": Foreign("max_queued_requests", "prompts, running ones too"),
    "max_running_requests": Foreign(
        "max_seqs_per_forward", "sequences: a request with n=8 is eight"
    ),
    "max_seq_len": Foreign("max_num_tokens_per_request", _TOGETHER),
    "max_seq_len_to_capture": Foreign("cudagraph_max_kv_indices_per_seq", "pages, not tokens"),
    "max_tokens": Foreign("max_num_tokens_per_request", _TOGETHER),
    "max_total_tokens": Foreign("kv_cache_num_tokens", "tokens in the KV cache"),
    "mem_fraction_static": Foreign("kv_cache_num_tokens", _TOKENS),
    "model_name_or_path": Foreign("model", _LOCAL),
    "model_path": Foreign("model", _LOCAL),
    "n_ctx": Foreign("max_num_tokens_per_request", _TOGETHER),
    "n_gpu_layers": Foreign("device", f"cpu or cuda: {_ON_DEVICE}"),
    "n_parallel": Foreign("max_seqs_per_forward", _RUNNING),
    "n_predict": Foreign("max_num_tokens_per_request", _TOGETHER),
    "nnodes": Foreign("launcher", "ray; with torchrun, several_machines.md of the documentation"),
    "node_rank": Foreign(
        "launcher", "ray; with torchrun, several_machines.md of the documentation"
    ),
    "num_continuous_decode_steps": Foreign("scheduling_steps_ahead", "an upper bound"),
    "num_gpu_blocks_override": Foreign("kv_cache_num_tokens", "tokens, not blocks"),
    "num_gpus": Foreign("tp_size", _GRID),
    "num_scheduler_steps": Foreign("scheduling_steps_ahead", "an upper bound"),
    "oltp_traces_endpoint": Foreign("otlp_endpoint", "by HTTP"),
    "otlp_traces_endpoint": Foreign("otlp_endpoint", "by HTTP"),
    "parallel": Foreign("max_seqs_per_forward", _RUNNING),
    "pipeline_parallel_size": Foreign("pp_size"),
    "pooling": Foreign("embedding_pooling", "mean or last"),
    "pp": Foreign("pp_size"),
    "random_seed": Foreign(None, _PER_REQUEST),
    "reasoning_format": Foreign("reasoning_parser", "auto, think or none"),
    "revision": Foreign(None, "download the revision you want and give its directory as model"),
    "rope_scale": Foreign("rope_scaling", _ROPE),
    "schedule_conservativeness": Foreign(
        "spec_allocation_target_kv_cache_utilization", "below 1 admits fewer sequences"
    ),
    "schedule_policy": Foreign(None, _ORDER),
    "scheduling_policy": Foreign(None, _ORDER),
    "seed": Foreign(None, _PER_REQUEST),
    "shutdown_timeout": Foreign("shutdown_timeout_s"),
    "skip_tokenizer_init": Foreign(
        None, "requests may send token ids, with or without a tokenizer"
    ),
    "speculative_algorithm": Foreign(None, _SPECULATIVE),
    "speculative_config": Foreign(None, _SPECULATIVE),
    "speculative_model": Foreign(None, _SPECULATIVE),
    "split_mode": Foreign("pp_size", _GRID),
    "ssl_cert_file": Foreign("ssl_certfile"),
    "ssl_key_file": Foreign("ssl_keyfile"),
    "swap_space": Foreign(
        None, "the KV cache is never swapped out; preempted sequences are recomputed"
    ),
    "tensor_parallel_size": Foreign("tp_size"),
    "tensor_split": Foreign("tp_size", _GRID),
    "threads": Foreign("cpu_threads"),
    "threads_batch": Foreign("cpu_threads"),
    "threads_http": Foreign("server_processes"),
    "timeout": Foreign("request_timeout_s", "of a whole request"),
    "tokenizer_mode": Foreign("tokenizer", _LOCAL),
    "tokenizer_path": Foreign("tokenizer", _LOCAL),
    "tokenizer_worker_num": Foreign("server_processes"),
    "tp": Foreign("tp_size"),
    "ubatch_size": Foreign("max_tokens_per_forward", _STEP),
    "watchdog_timeout": Foreign("stall_timeout_s"),
}

# The options of llama.cpp's server that have one dash, and their long names.
_BY_LETTERS = {
    "a": "alias",
    "b": "batch_size",
    "c": "ctx_size",
    "ctk": "cache_type_k",
    "ctv": "cache_type_v",
    "dev": "n_gpu_layers",
    "fa": "flash_attn",
    "hf": "hf_repo",
    "lv": "log_verbosity",
    "m": "model_path",
    "n": "n_predict",
    "ngl": "n_gpu_layers",
    "np": "parallel",
    "sm": "split_mode",
    "t": "threads",
    "tb": "threads_batch",
    "to": "timeout",
    "ts": "tensor_split",
    "ub": "ubatch_size",
}

OTHER_ENGINES: Mapping[str, Foreign] = {
    **_BY_NAME,
    **{letters: _BY_NAME[name] for letters, name in _BY_LETTERS.items()},
}
