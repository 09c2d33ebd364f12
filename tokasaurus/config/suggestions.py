"""What to say about a key that is not the name of a flag.

Owns the search for the nearest name, and the table of other engines' flags. Knows no flags of its
own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["OTHER_ENGINES", "Foreign", "explain_unknown", "nearest"]


@dataclass(frozen=True)
class Foreign:
    """Another engine's flag: our flag for the same purpose, or None, and the difference."""

    ours: str | None
    note: str = ""


def nearest(key: str, names: Iterable[str]) -> str:
    """The name most like the key."""
    return max(names, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())


def explain_unknown(key: str, names: Iterable[str], foreign: Mapping[str, Foreign]) -> str:
    """One line with the key and what to write instead."""
    plain = key.lower().replace("-", "_")
    other = foreign.get(plain) or foreign.get(plain.removeprefix("no_"))
    if other is not None:
        if other.ours is None:
            return f"unknown flag {key!r}: {other.note}"
        note = f" ({other.note})" if other.note else ""
        return f"unknown flag {key!r}: the flag for this is {other.ours!r}{note}"
    near = nearest(plain, names)
    return f"unknown flag {key!r}: the nearest is {near!r}; --help lists all flags"


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

# Flags of vLLM, SGLang and llama.cpp's server, which users bring with them.
OTHER_ENGINES: Mapping[str, Foreign] = {
    "allowed_origins": Foreign("cors_origins", "a list"),
    "attention_backend": Foreign("attention", "auto, compiled, flashinfer, triton or reference"),
    "batch_size": Foreign("max_seqs_per_forward", _RUNNING),
    "block_size": Foreign("page_size", "tokens in a page"),
    "chat_template": Foreign(None, _TEMPLATE),
    "chunked_prefill_size": Foreign("max_tokens_per_forward", _STEP),
    "compilation_config": Foreign("torch_compile_config"),
    "context_length": Foreign("max_num_tokens_per_request", _TOGETHER),
    "ctx_size": Foreign("max_num_tokens_per_request", _TOGETHER),
    "cuda_graph_max_bs": Foreign("cudagraph_max_size", "sequences in a captured batch"),
    "cuda_graph_sizes": Foreign(
        "cudagraph_max_size", "the largest; cudagraph_step is the distance"
    ),
    "data_parallel_size": Foreign("dp_size"),
    "disable_cuda_graph": Foreign("use_cudagraphs", _OPPOSITE),
    "disable_log_requests": Foreign("uvicorn_log_level", "warning hides the line of each request"),
    "disable_radix_cache": Foreign(None, _ALWAYS),
    "download_dir": Foreign(None, "models are cached where the HF_HOME environment variable says"),
    "dp": Foreign("dp_size"),
    "enable_chunked_prefill": Foreign(None, "prompts are always cut to max_tokens_per_forward"),
    "enable_log_requests": Foreign("uvicorn_log_level", "info prints a line for each request"),
    "enable_prefix_caching": Foreign(None, _ALWAYS),
    "enable_torch_compile": Foreign("torch_compile"),
    "enforce_eager": Foreign("use_cudagraphs", _OPPOSITE),
    "gpu_memory_utilization": Foreign("kv_cache_num_tokens", _TOKENS),
    "hf_overrides": Foreign("rope_scaling", _ROPE),
    "json_model_override_args": Foreign("rope_scaling", _ROPE),
    "kv_cache_dtype": Foreign("dtype", "weights and KV cache share one"),
    "kv_cache_memory_bytes": Foreign("kv_cache_num_tokens", "a number of tokens, not of bytes"),
    "log_level_http": Foreign("uvicorn_log_level"),
    "log_requests": Foreign("uvicorn_log_level", "info prints a line for each request"),
    "max_batch_size": Foreign("max_seqs_per_forward", _RUNNING),
    "max_logprobs": Foreign("max_topk_logprobs"),
    "max_model_len": Foreign("max_num_tokens_per_request", _TOGETHER),
    "max_num_batched_tokens": Foreign("max_tokens_per_forward", _STEP),
    "max_num_seqs": Foreign("max_seqs_per_forward", _RUNNING),
    "max_prefill_tokens": Foreign("max_tokens_per_forward", _STEP),
    "max_queued_reqs": Foreign("max_queued_requests", "prompts, running ones too"),
    "max_running_requests": Foreign(
        "max_seqs_per_forward", "sequences: a request with n=8 is eight"
    ),
    "max_seq_len": Foreign("max_num_tokens_per_request", _TOGETHER),
    "max_seq_len_to_capture": Foreign("cudagraph_max_kv_indices_per_seq", "pages, not tokens"),
    "max_total_tokens": Foreign("kv_cache_num_tokens", "tokens in the KV cache"),
    "mem_fraction_static": Foreign("kv_cache_num_tokens", _TOKENS),
    "model_name_or_path": Foreign("model", _LOCAL),
    "model_path": Foreign("model", _LOCAL),
    "n_ctx": Foreign("max_num_tokens_per_request", _TOGETHER),
    "num_gpu_blocks_override": Foreign("kv_cache_num_tokens", "tokens, not blocks"),
    "num_scheduler_steps": Foreign("scheduling_steps_ahead", "an upper bound"),
    "pipeline_parallel_size": Foreign("pp_size"),
    "pp": Foreign("pp_size"),
    "random_seed": Foreign(None, _PER_REQUEST),
    "revision": Foreign(None, "download the revision you want and give its directory as model"),
    "seed": Foreign(None, _PER_REQUEST),
    "swap_space": Foreign(
        None, "the KV cache is never swapped out; preempted sequences are recomputed"
    ),
    "tensor_parallel_size": Foreign("tp_size"),
    "threads": Foreign("cpu_threads"),
    "tokenizer_path": Foreign("tokenizer", _LOCAL),
    "tp": Foreign("tp_size"),
}
