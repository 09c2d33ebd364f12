"""The slice of the configuration that each room gets: resolved and frozen, without defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokasaurus.cartridges.specification import ModelShape
from tokasaurus.protocol.messages import LogprobsMode, Pooling
from tokasaurus.protocol.role import Kind

__all__ = [
    "AdmissionConfig",
    "CartridgeConfig",
    "EngineSlices",
    "ManagerConfig",
    "MemoryItem",
    "MemoryPlan",
    "ModelFacts",
    "ReplicaSlices",
    "ServerConfig",
    "WorkerConfig",
]


@dataclass(frozen=True)
class ModelFacts:
    """What resolution needs to know about a model; the launch room reads it from its files."""

    path: str  # local directory
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    # After the RoPE scaling, the user's if there is one.
    max_position_embeddings: int
    kv_elements_per_token: int  # 2 * layers * kv heads * head size
    # Numbers in all weights. A head that shares the embedding's weight does not count.
    num_parameters: int
    # Those of products, which quantization makes smaller; and the rows that have them.
    num_product_parameters: int
    num_product_rows: int
    # Numbers that the layers hold at a time for each token of a batch, at most.
    activation_elements_per_token: int
    eos_token_ids: tuple[int, ...]
    # Of most weights in the files: "float32", "bfloat16" or "float16"; None if unknown.
    dtype: str | None = None
    rope: str = ""  # a digest of the parameters of the rotary embedding
    # Numbers of ``Sampling`` that generation_config.json sets.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CartridgeConfig:
    """What the store of cartridges may read, and how much it keeps."""

    directory: str  # of names; the store's own files are in .store
    sources: tuple[str, ...]  # that requests may name
    roots: tuple[str, ...]  # directories of local files
    temporary_root: bool  # whether the directory for temporary files is one, too
    hosts: tuple[str, ...]  # of http; *.NAME for all below a name
    max_bytes: int  # of one file
    max_tokens: int  # of one cartridge
    max_stored_bytes: int | None  # of all cartridges; None for a tenth of the disk
    max_host_bytes: int  # of cartridges in the memory of the host
    timeout_s: float  # of one download


@dataclass(frozen=True)
class ServerConfig:
    """The server room's slice."""

    host: str
    port: int
    api_key_digests: tuple[str, ...]  # SHA-256 of each key, in hexadecimal; () if none is needed
    admin_key_digests: tuple[str, ...]  # the same, of the keys that may control the engine
    # By how much requests may outrank the default priority; by digest, the keys that differ.
    max_request_priority: int
    key_priorities: Mapping[str, int]
    ssl_certfile: str | None
    ssl_keyfile: str | None
    cors_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]  # besides those of loopback and host
    max_queued_requests: int  # prompts in flight
    request_timeout_s: float | None
    request_read_timeout_s: float
    max_body_bytes: int
    max_n: int  # samples of one prompt
    max_stored_bytes: int | None  # of the files of batches
    stats_report_s: float  # 0: no line of statistics
    statsd_address: tuple[str, int] | None
    model_name: str  # the id that /v1/models reports
    model_root: str  # the source of the model, as the user wrote it
    tokenizer_path: str
    trust_remote_code: bool
    trust_request_chat_template: bool
    uvicorn_log_level: str
    otlp_endpoint: str | None  # where traces go; None for no traces
    log_level: str
    shutdown_timeout_s: float  # how long a drain may take
    restart_timeout_s: float  # how long each half of a restart may take
    data_dir: str  # of files and batches
    cartridges: CartridgeConfig
    unsafe_pickle_responses: bool
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_request_tokens: int  # prompt and completion together
    max_seqs_per_forward: int  # of all replicas
    num_replicas: int
    num_workers: int  # of each replica
    max_topk_logprobs: int
    logprobs_mode: LogprobsMode
    tool_call_parser: str  # "auto", "hermes" or "llama3"
    reasoning_parser: str  # "auto", "think" or "none"
    embedding_pooling: Pooling  # of requests that do not say
    cartridge_tags: bool  # read tags of system messages that name cartridges
    cartridge_shape: ModelShape  # that cartridges must fit
    # Numbers of ``Sampling`` for requests that leave them out; otherwise the endpoint's own
    # default counts.
    sampling_defaults: Mapping[str, float]


@dataclass(frozen=True)
class AdmissionConfig:
    """How the manager decides how many sequences run, and how fast prompts are fed."""

    # Predict the lengths of sequences; otherwise count each with its max_tokens.
    predict_lengths: bool
    # Learn lengths from finished sequences; otherwise use the prior alone.
    learn_lengths: bool
    # Number of finished sequences after which an observation weighs 1/e.
    length_memory: int
    num_length_buckets: int
    # Number of finished sequences after which prior_mean is given up.
    num_lengths_awaited: int
    # Expected length before that, as a fraction of max_tokens; None learns from the start.
    prior_mean: float | None
    prior_std: float
    # Margin of a predicted length, in standard deviations.
    std_scale: float
    # Share of the KV cache that predictions may fill.
    target_utilization: float
    # Fill batches with prompts; otherwise feed prompts just fast enough to keep the cache full.
    greedy_prefill: bool
    # Tokens; used without greedy_prefill.
    prefill_round_up_multiple: int


@dataclass(frozen=True)
class ManagerConfig:
    """The manager room's slice."""

    page_size: int  # tokens
    num_pages: int  # as planned; a worker that has measured its memory says how many there are
    # More than max_seqs_per_forward: a slot is reused only after its last batch is absorbed.
    num_slots: int
    max_seqs_per_forward: int  # running sequences
    max_tokens_per_forward: int
    max_request_tokens: int
    # Parts of the running sequences, of which each batch serves one; 1 without a pipeline.
    num_lanes: int
    # Batches in flight, at most. With several lanes, one more for each further lane.
    scheduling_steps_ahead: int
    # Plan fewer steps ahead if the device does not need them; otherwise always plan that many.
    adapt_steps_ahead: bool
    # Tokens planned beyond those that the server acknowledged, for sequences with stop strings.
    stop_lag: int
    admission: AdmissionConfig
    use_groups: bool  # find the decode rows that share a prefix
    min_group_size: int  # rows
    min_prefix_len: int  # tokens
    # Seconds of the device after which a waiting client that has less than its share gets room.
    share_wait_s: float
    check_invariants: bool  # after every turn; slow
    force_preemption: bool  # preempt now and then without need, for tests

    @property
    def max_running(self) -> int:
        """Sequences that run at a time. Each may need a row of a batch, and a row is a token."""
        return min(self.max_seqs_per_forward, self.max_tokens_per_forward)

    @property
    def max_in_flight(self) -> int:
        """Batches that are planned before the result of the first is known."""
        return self.num_lanes - 1 + self.scheduling_steps_ahead


@dataclass(frozen=True)
class WorkerConfig:
    """The model room's slice: one worker's."""

    # Of the worker within its replica: stage * tp_size + its rank among those of the stage.
    rank: int
    tp_size: int  # workers that share each layer
    pp_size: int  # stages, each with a part of the layers
    model_path: str
    trust_remote_code: bool
    rope_scaling: str | None  # JSON that replaces the model's
    device: str  # "cpu" or "cuda"
    # Among the visible devices; None on "cpu", and for the device that the process has chosen.
    device_index: int | None
    dtype: str  # "float32", "bfloat16" or "float16"
    attention: str  # "auto", "compiled", "flashinfer", "triton" or "reference"
    instruction_set: str  # of the kernels on "cpu"; "auto" for the best one
    use_groups: bool | None  # read a shared prefix once; None where that saves time
    linear: str  # "auto", "plain" or "packed"
    quantization: str | None  # of the products: "int8", "fp8" or None
    kv_cache_dtype: str  # "auto" for dtype, or "fp8_e4m3"
    # Whether no result may depend on the batch; None if it costs nothing.
    deterministic: bool | None
    load_format: str  # "auto" or "dummy"
    page_size: int
    num_pages: int  # of the KV cache; where the device's memory can be measured, only planned
    # Then the measurement decides, within these: the longest request needs the least.
    least_pages: int
    most_pages: int
    num_slots: int
    max_seqs_per_forward: int
    max_tokens_per_forward: int
    max_request_tokens: int
    max_topk_logprobs: int
    torch_compile: bool
    torch_compile_config: str | None  # JSON
    cudagraph_sizes: tuple[int, ...]  # in rows, ascending; () for none
    cudagraph_max_tokens: int  # of a sequence in a graph
    # Tokens of a batch from which on products overlap with what ranks exchange; None for none.
    async_tp_threshold: int | None
    num_threads: int | None  # of the CPU backend; None leaves it to torch

    @property
    def num_ranks(self) -> int:
        """Workers of the replica."""
        return self.tp_size * self.pp_size


@dataclass(frozen=True)
class ReplicaSlices:
    """One manager and its workers."""

    manager: ManagerConfig
    workers: tuple[WorkerConfig, ...]  # by rank, at least one


@dataclass(frozen=True)
class MemoryItem:
    """A part of a device's memory."""

    name: str
    num_bytes: int
    reason: str  # what the bytes follow from


@dataclass(frozen=True)
class MemoryPlan:
    """What one worker takes of its device, by arithmetic, before anything is loaded."""

    line: str  # for the log
    device: str  # "cpu" or "cuda"
    free_bytes: int | None  # what the worker may take; None if unknown
    items: tuple[MemoryItem, ...]
    kv_tokens: int  # of the KV cache
    most_kv_tokens: int  # that a measurement may raise it to
    max_request_tokens: int  # of a request


@dataclass(frozen=True)
class EngineSlices:
    """Everything that resolution decides."""

    server: ServerConfig
    replicas: tuple[ReplicaSlices, ...]  # at least one
    dtype_plan: str  # which dtype and why; a line for the log
    idle_flags: tuple[str, ...]  # lines for the log, about flags that change nothing here
    memory_plan: MemoryPlan  # of each worker
    determinism_plan: str  # whether results may depend on the batch, and why; a line for --show
    # How long a process that has work may show no progress before it counts as stalled.
    stall_timeout_s: float
    replica_restarts: int  # of each replica, or HTTP process, within ten minutes
    profile_path: str | None  # of a trace; None for no trace
    profile_num_batches: int
    log_level: str
    log_format: str  # "text" or "json"
    # Kinds of processes, as roles name them.
    log_procs: tuple[str, ...] | None
    # The kind of the process in the foreground; of several, it is the first.
    local_proc_name: Kind
    server_processes: int = 1  # that share the port
