"""Resolves a user's choices into the slice of each room: defaults that adapt, and conflicts.

``resolve`` is a pure function. It is told about the model and the machine, and asks neither.

A limit that the user did not set (None) adapts to the other limits, to the model and to the
memory. So flags conflict only if the user set both, or set one that the model or the machine cannot
satisfy.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from tokasaurus.cartridges.specification import ModelShape
from tokasaurus.config.determinism import check_determinism, plan_determinism
from tokasaurus.config.devices import choose_device, device_index
from tokasaurus.config.dtype import choose_dtype
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.graphs import check_graphs, graph_sizes
from tokasaurus.config.idle_flags import idle_flags
from tokasaurus.config.limits import Limits, plan_limits, plan_memory
from tokasaurus.config.memory import Memory
from tokasaurus.config.slices import (
    AdmissionConfig,
    CartridgeConfig,
    EngineSlices,
    ManagerConfig,
    ModelFacts,
    ReplicaSlices,
    ServerConfig,
    WorkerConfig,
)
from tokasaurus.errors import ConfigError
from tokasaurus.observability.tracing import traces_url
from tokasaurus.protocol.messages import MAX_PRIORITY, LogprobsMode, Pooling
from tokasaurus.protocol.role import Kind
from tokasaurus.rounding import round_up

__all__ = ["BUNDLED_MODEL_NAME", "data_dir_of", "resolve"]

BUNDLED_MODEL_NAME = "tokasaurus-demo"

STATSD_PORT = 8125
STOP_LAG = 16  # tokens

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
_KEY_PRIORITY = re.compile(r"max_request_priority=([0-9]{1,7})")
_HOST_NAME = re.compile(r"(\*\.)?[^\s/:?#@*\[\]]+|\[[0-9a-fA-F:.]+\]")

# Users may name the worker by its room.
_KINDS: Mapping[str, Kind] = {
    "server": "server",
    "manager": "manager",
    "worker": "worker",
    "model": "worker",
}
_LOGPROBS_MODES = {
    "temperature": LogprobsMode.TEMPERATURE,
    "raw": LogprobsMode.RAW,
    "processed": LogprobsMode.PROCESSED,
}


def resolve(
    config: EngineConfig,
    facts: ModelFacts,
    *,
    num_cuda_devices: int,
    memory_bytes: int | None,
    bfloat16_instructions: str | None = None,
) -> EngineSlices:
    """Decides everything that the user left open, for this model on this machine.

    Args:
        config: the user's choices; ``tokenizer``, if set, is a path that the text core can load.
        facts: about the model that ``config.model`` names.
        num_cuda_devices: the CUDA devices that work and are visible.
        memory_bytes: free memory of the device that the model will run on, the least of several;
            None if unknown.
        bfloat16_instructions: the instruction set of the processor's kernels, if it multiplies
            bf16; otherwise None.

    Raises:
        ConfigError: one line for every conflict, naming the flags and the remedy.
    """
    problems: list[str] = []
    device = choose_device(config, num_cuda_devices, problems)
    dtype = choose_dtype(config.dtype, device, facts.dtype, bfloat16_instructions)
    _check_quantization(config, device, dtype.name, problems)
    _check_kv_cache_dtype(config, problems)
    memory = Memory(
        device,
        memory_bytes,
        dtype.name,
        facts,
        config.quantization,
        # All workers on the CPU have one memory.
        config.dp_size * config.pp_size * config.tp_size if device == "cpu" else 1,
        config.pp_size,
        config.tp_size,
        keeps_e4m3=config.kv_cache_dtype != "auto",
        graph_rows=max(graph_sizes(config, device, config.cudagraph_max_size), default=0),
    )
    if not memory.has_room_for_weights:
        problems.append(
            f"model={config.model or BUNDLED_MODEL_NAME}: {memory.weights_do_not_fit()}"
        )
    limits = plan_limits(config, facts.max_position_embeddings, memory, problems)
    obstacle = check_determinism(config, device)
    if config.deterministic and obstacle is not None:
        problems.append(f"deterministic=T: {obstacle}, or leave deterministic out")
    _check_stages(config, facts, problems)
    _check_shares(config, facts, problems)
    _check_access(config, problems)
    check_graphs(config, device, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return EngineSlices(
        server=_server(config, facts, limits),
        replicas=tuple(
            ReplicaSlices(
                manager=_manager(config, limits, device),
                workers=tuple(
                    _worker(config, facts, limits, device, dtype.name, replica, rank)
                    for rank in range(config.pp_size * config.tp_size)
                ),
            )
            for replica in range(config.dp_size)
        ),
        dtype_plan=dtype.reason,
        idle_flags=idle_flags(config, device),
        memory_plan=plan_memory(memory, limits),
        determinism_plan=plan_determinism(config, obstacle),
        stall_timeout_s=config.stall_timeout_s,
        replica_restarts=config.replica_restarts,
        profile_path=f"{data_dir_of(config)}/profile.json" if config.profile else None,
        profile_num_batches=config.profile_num_batches,
        log_level=config.log_level,
        log_format=config.log_format,
        log_procs=None
        if config.log_procs is None
        else tuple(_KINDS[name] for name in config.log_procs),
        local_proc_name=_KINDS[config.local_proc_name],
        server_processes=config.server_processes,
    )


def _check_quantization(config: EngineConfig, device: str, dtype: str, problems: list[str]) -> None:
    if config.quantization is None:
        return
    flag = f"quantization={config.quantization}"
    if config.quantization == "fp8":
        if device == "cuda" and dtype != "bfloat16":
            problems.append(
                f"{flag}: on cuda its results are in bfloat16, and dtype is {dtype}; set"
                " dtype=bfloat16, or leave one of them out"
            )
        return
    if device != "cpu":
        problems.append(
            f"{flag}: only device=cpu has kernels for it, and device={config.device} runs on"
            f" {device}; leave it out, or set device=cpu"
        )
    if dtype == "float16":
        problems.append(
            f"{flag}: its kernels are for activations in float32 and bfloat16; set dtype to one of"
            " them, or leave it out"
        )
    if config.linear == "plain":
        problems.append(
            f"{flag}: linear=plain multiplies by weights in dtype; leave one of them out"
        )


def _check_kv_cache_dtype(config: EngineConfig, problems: list[str]) -> None:
    if config.kv_cache_dtype != "auto" and config.attention == "compiled":
        problems.append(
            f"kv_cache_dtype={config.kv_cache_dtype}: attention=compiled has no kernels for it;"
            " leave one of them out"
        )


def _check_stages(config: EngineConfig, facts: ModelFacts, problems: list[str]) -> None:
    if config.pp_size > facts.num_layers:
        problems.append(
            f"pp_size={config.pp_size}: the model has {facts.num_layers} layers, and each stage"
            " needs one; lower it"
        )


def _check_shares(config: EngineConfig, facts: ModelFacts, problems: list[str]) -> None:
    """Whether each layer can be dealt to tp_size workers, in whole heads."""
    if config.async_tp_threshold is not None and config.tp_size == 1:
        problems.append(
            f"async_tp_threshold={config.async_tp_threshold} is for devices that share layers, and"
            " tp_size is 1; leave it out, or raise tp_size"
        )
    size, heads, kv_heads = config.tp_size, facts.num_heads, facts.num_kv_heads

    def works(size: int) -> bool:
        whole = heads % size == facts.intermediate_size % size == 0
        return whole and (kv_heads % size == 0 or size % kv_heads == 0)

    if works(size):
        return
    working = [str(each) for each in range(1, heads + 1) if works(each)]
    reason = f"num_attention_heads={heads}"
    if heads % size == 0:
        reason = f"intermediate_size={facts.intermediate_size}"
    if heads % size == facts.intermediate_size % size == 0:
        reason = f"num_key_value_heads={kv_heads}, nor is it a multiple of them"
    problems.append(
        f"tp_size={size} does not divide the model's {reason}; these do: {', '.join(working)}"
    )


def _check_access(config: EngineConfig, problems: list[str]) -> None:
    _check_keys("api_key", [entry.partition(" ")[0] for entry in config.api_key or ()], problems)
    for number, entry in enumerate(config.api_key or (), 1):
        if " " in entry and _priority_of_key(entry) is None:
            problems.append(
                f"api_key: what follows key number {number} must be max_request_priority=N, with N"
                f" from 0 to {MAX_PRIORITY}"
            )
    _check_keys("admin_api_key", config.admin_api_key or (), problems)
    if (config.ssl_certfile is None) != (config.ssl_keyfile is None):
        given, missing = "ssl_certfile", "ssl_keyfile"
        if config.ssl_certfile is None:
            given, missing = missing, given
        problems.append(f"{given} is set and {missing} is not; HTTPS needs both")
    for origin in config.cors_origins or ():
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            problems.append(
                f"cors_origins: {origin!r} is not an origin; expected one such as"
                " https://example.org, without a path, or *"
            )
    for name in config.allowed_hosts or ():
        if name != "*" and not _HOST_NAME.fullmatch(name):
            problems.append(
                f"allowed_hosts: {name!r} is not the name of a host; expected one such as"
                " gpu.example.org, without a scheme, port or path, or *"
            )

    for name in config.cartridge_hosts or ():
        if not _HOST_NAME.fullmatch(name):
            problems.append(
                f"cartridge_hosts: {name!r} is not the name of a host; expected one such as"
                " files.example.org, without a scheme, port or path"
            )

    if config.otlp_endpoint is not None and traces_url(config.otlp_endpoint) is None:
        problems.append(
            f"otlp_endpoint={config.otlp_endpoint}: expected the URL of a collector, such as"
            " http://127.0.0.1:4318"
        )
    url = config.statsd_server_url
    if url is not None and _statsd_address(url) is None:
        problems.append(f"statsd_server_url={url}: expected HOST:PORT, such as 127.0.0.1:8125")


def _priority_of_key(entry: str) -> int | None:
    """By how much requests with this key may outrank others; None if the entry does not say."""
    found = _KEY_PRIORITY.fullmatch(entry.partition(" ")[2].strip())
    value = None if found is None else int(found[1])
    return value if value is not None and value <= MAX_PRIORITY else None


def _key_priorities(config: EngineConfig) -> dict[str, int]:
    priorities = dict.fromkeys(config.admin_api_key or (), MAX_PRIORITY)
    for entry in config.api_key or ():
        priority = _priority_of_key(entry)
        if priority is not None:
            priorities.setdefault(entry.partition(" ")[0], priority)
    return {_digest(key): priority for key, priority in priorities.items()}


def _check_keys(flag: str, keys: Sequence[str], problems: list[str]) -> None:
    for number, key in enumerate(keys, 1):
        if not key or not all("!" <= character <= "~" for character in key):
            problems.append(
                f"{flag}: key number {number} is empty, or has a character that no HTTP header"
                " carries; keys consist of visible ASCII characters"
            )


def _statsd_address(url: str | None) -> tuple[str, int] | None:
    """Host and port; None if that cannot be read."""
    try:
        parts = urlsplit(url if "://" in (url or "") else f"udp://{url}")
        port = parts.port or STATSD_PORT
    except ValueError:
        return None
    more = parts.path or parts.query or parts.fragment or parts.username
    if url is None or parts.scheme not in ("udp", "statsd") or not parts.hostname or more:
        return None
    return parts.hostname, port


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _digests(keys: tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_digest(key.partition(" ")[0]) for key in keys or ()))


def _server(config: EngineConfig, facts: ModelFacts, limits: Limits) -> ServerConfig:
    return ServerConfig(
        host=config.host,
        port=config.port,
        api_key_digests=_digests(config.api_key),
        admin_key_digests=_digests(config.admin_api_key),
        max_request_priority=config.max_request_priority,
        key_priorities=_key_priorities(config),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        cors_origins=config.cors_origins or (),
        allowed_hosts=config.allowed_hosts or (),
        max_queued_requests=config.max_queued_requests,
        request_timeout_s=config.request_timeout_s,
        request_read_timeout_s=config.request_read_timeout_s,
        max_body_bytes=config.max_body_bytes,
        max_n=config.max_n,
        max_stored_bytes=config.max_stored_bytes,
        stats_report_s=config.stats_report_seconds,
        statsd_address=_statsd_address(config.statsd_server_url),
        model_name=config.served_model_name or config.model or BUNDLED_MODEL_NAME,
        model_root=config.model or facts.path,
        tokenizer_path=config.tokenizer or facts.path,
        trust_remote_code=config.trust_remote_code,
        uvicorn_log_level=config.uvicorn_log_level,
        otlp_endpoint=config.otlp_endpoint,
        log_level=config.log_level,
        shutdown_timeout_s=config.shutdown_timeout_s,
        restart_timeout_s=config.restart_timeout_s,
        data_dir=data_dir_of(config),
        cartridges=_cartridges(config, limits),
        trust_request_chat_template=config.trust_request_chat_template,
        unsafe_pickle_responses=config.unsafe_pickle_responses,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        max_request_tokens=limits.max_request_tokens,
        max_seqs_per_forward=config.dp_size * limits.max_seqs,
        num_replicas=config.dp_size,
        num_workers=config.tp_size * config.pp_size,
        max_topk_logprobs=_max_topk(config, facts),
        logprobs_mode=_LOGPROBS_MODES[config.logprobs_mode],
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        embedding_pooling=Pooling[config.embedding_pooling.upper()],
        cartridge_tags=config.cartridge_tags,
        cartridge_shape=_cartridge_shape(config, facts),
        sampling_defaults=facts.sampling_defaults,
    )


def _cartridge_shape(config: EngineConfig, facts: ModelFacts) -> ModelShape:
    """What a cartridge must have in common with the model."""
    per_head = 2 * facts.num_layers * facts.num_kv_heads
    return ModelShape(
        num_layers=facts.num_layers,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.kv_elements_per_token // per_head,
        name=config.model or BUNDLED_MODEL_NAME,
        rope=facts.rope,
    )


def data_dir_of(config: EngineConfig) -> str:
    """The directory of files and batches."""
    return config.data_dir or f"~/.local/share/tokasaurus/port-{config.port}"


def _cartridges(config: EngineConfig, limits: Limits) -> CartridgeConfig:
    return CartridgeConfig(
        directory=config.cartridge_dir,
        sources=config.cartridge_sources,
        roots=config.cartridge_roots or (config.cartridge_dir,),
        temporary_root=config.cartridge_roots is None and _is_loopback(config.host),
        hosts=tuple(name.lower() for name in config.cartridge_hosts or ()),
        max_bytes=config.max_cartridge_bytes,
        max_tokens=limits.max_request_tokens,
        max_stored_bytes=config.max_stored_cartridge_bytes,
        max_host_bytes=config.cartridge_host_bytes,
        timeout_s=config.cartridge_timeout_s,
    )


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Of names, only localhost counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _num_lanes(config: EngineConfig, device: str) -> int:
    if config.pp_size == 1:
        return 1
    buffers = config.pp_num_buffer_stages
    if buffers is None:
        buffers = 0 if device == "cpu" else 1
    return config.pp_size + buffers


def _manager(config: EngineConfig, limits: Limits, device: str) -> ManagerConfig:
    min_group_size, min_prefix_len = _group_limits(config)
    return ManagerConfig(
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        num_slots=_num_slots(limits),
        max_seqs_per_forward=limits.max_seqs,
        max_tokens_per_forward=limits.max_tokens,
        max_request_tokens=limits.max_request_tokens,
        num_lanes=_num_lanes(config, device),
        scheduling_steps_ahead=config.scheduling_steps_ahead,
        adapt_steps_ahead=True,
        stop_lag=STOP_LAG,
        admission=_admission(config),
        use_groups=config.use_hydragen is not False,
        min_group_size=min_group_size,
        min_prefix_len=min_prefix_len,
        share_wait_s=config.fair_share_wait_s,
        check_invariants=config.allocator_sanity_checks,
        force_preemption=config.bump_city_population_me,
    )


def _group_limits(config: EngineConfig) -> tuple[int, int]:
    """The sequences and the tokens of a prefix that a group must have.

    Where the kernel takes the groups that save time, the limits only spare the manager those that
    hardly can.
    """
    num_sequences, num_tokens = config.hydragen_min_group_size, config.hydragen_min_prefix_len
    is_auto = config.use_hydragen is None
    if num_sequences is None:
        num_sequences = 4 if is_auto else 32
    if num_tokens is None:
        num_tokens = 64 if is_auto else 256
    return num_sequences, num_tokens


def _admission(config: EngineConfig) -> AdmissionConfig:
    std = config.early_stopping_init_std
    return AdmissionConfig(
        predict_lengths=config.use_spec_allocation,
        learn_lengths=config.track_early_stopping,
        length_memory=config.early_stopping_buffer_size,
        num_length_buckets=config.early_stopping_num_prediction_buckets,
        num_lengths_awaited=config.early_stopping_initial_wait,
        prior_mean=config.early_stopping_init_mean,
        prior_std=0.0 if std is None else std,
        std_scale=config.spec_allocation_std_buffer_scale,
        target_utilization=config.spec_allocation_target_kv_cache_utilization,
        greedy_prefill=config.greedy_prefill,
        prefill_round_up_multiple=config.prefill_round_up_multiple,
    )


def _worker(
    config: EngineConfig,
    facts: ModelFacts,
    limits: Limits,
    device: str,
    dtype: str,
    replica: int,
    rank: int,
) -> WorkerConfig:
    scaling, compiling = config.rope_scaling, config.torch_compile_config
    return WorkerConfig(
        rank=rank,
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        model_path=facts.path,
        trust_remote_code=config.trust_remote_code,
        rope_scaling=None if scaling is None else json.dumps(scaling, sort_keys=True),
        device=device,
        device_index=device_index(config, device, replica, rank),
        dtype=dtype,
        attention=config.attention,
        instruction_set=config.instruction_set,
        use_groups=config.use_hydragen,
        linear=config.linear,
        quantization=config.quantization,
        kv_cache_dtype="auto" if config.kv_cache_dtype == "auto" else "fp8_e4m3",
        deterministic=config.deterministic,
        load_format=config.load_format,
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        least_pages=limits.least_pages,
        most_pages=limits.most_pages,
        num_slots=_num_slots(limits),
        max_seqs_per_forward=limits.max_seqs,
        max_tokens_per_forward=limits.max_tokens,
        max_request_tokens=limits.max_request_tokens,
        max_topk_logprobs=_max_topk(config, facts),
        torch_compile=config.torch_compile,
        torch_compile_config=None if compiling is None else json.dumps(compiling, sort_keys=True),
        cudagraph_sizes=graph_sizes(config, device, limits.max_seqs),
        # A backend may keep room for the pages of each row of a graph: no sequence has more.
        cudagraph_max_tokens=min(
            config.cudagraph_max_kv_indices_per_seq * limits.page_size,
            round_up(limits.max_request_tokens, limits.page_size),
        ),
        async_tp_threshold=config.async_tp_threshold,
        num_threads=config.cpu_threads,
    )


def _num_slots(limits: Limits) -> int:
    # The slot of a finished sequence stays unused until its last batch is absorbed.
    return 2 * limits.max_seqs


def _max_topk(config: EngineConfig, facts: ModelFacts) -> int:
    return min(config.max_topk_logprobs or 0, facts.vocab_size)
