"""What a user can choose about an engine: every flag, its default and its meaning.

Owns the names and defaults of the flags, which are a public interface. Knows no model, no machine
and no limit that depends on them: a limit left at None adapts, and ``resolve`` decides how.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokasaurus.config.builder import Builder
from tokasaurus.config.other_engines import OTHER_ENGINES
from tokasaurus.config.schema import Retired, Schema, check_fields, flag

__all__ = ["ENGINE", "EngineConfig"]

_MODEL = "Model"
_SERVER = "Server"
_SECURITY = "Access"
_OVERLOAD = "Limits on requests"
_LOGGING = "Logging"
_LIMITS = "Memory and batch size"
_SCHEDULING = "Scheduling"
_LOGPROBS = "Logprobs"
_PARALLEL = "Several GPUs"
_GRAPHS = "Compilation and CUDA graphs"
_HYDRAGEN = "Shared prefixes"
_STATISTICS = "Statistics"
_CARTRIDGES = "Cartridges and chat defaults"
_DEBUG = "Debugging"

_UVICORN_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
_PROCESSES = ("server", "manager", "model", "worker")

# Features still to come: a flag for one is refused with "... is not available yet".
_WANDB = "the report to Weights & Biases"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The choices for one engine, checked one by one; ``resolve`` checks them together.

    Raises:
        ConfigError: one line for every field of a wrong type, out of range or not available.
    """

    model: str | None = flag(
        None,
        group=_MODEL,
        help=(
            "A directory in Hugging Face format, or a repository id, which is downloaded once "
            "and cached."
        ),
        adapts="the small bundled model",
    )
    tokenizer: str | None = flag(
        None,
        group=_MODEL,
        help="The tokenizer's source: a directory or a repository id.",
        adapts="model",
    )
    served_model_name: str | None = flag(
        None, group=_MODEL, help="The model's id in the API.", adapts="model, as written"
    )
    trust_remote_code: bool = flag(
        False,
        group=_MODEL,
        help="Let the repository's own Python code load its configuration and tokenizer.",
    )
    dtype: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "float32", "bfloat16", "float16"),
        synonyms={
            "float": "float32",
            "fp32": "float32",
            "bf16": "bfloat16",
            "half": "float16",
            "fp16": "float16",
        },
        help=(
            "Precision of weights, activations and KV cache. auto: bfloat16 on cuda; on cpu, "
            "bfloat16 if the checkpoint has it and the processor, or instruction_set, multiplies "
            "it (AVX512-BF16, AMX), otherwise float32. The log and --show say which and why."
        ),
    )
    rope_scaling: Mapping[str, Any] | None = flag(
        None,
        group=_MODEL,
        help=(
            "Replaces the model's rope_scaling: JSON, or nested keys, as in "
            "rope_scaling.rope_type=linear rope_scaling.factor=2."
        ),
        adapts="the model's",
    )
    device: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "cpu", "cuda"),
        synonyms={"gpu": "cuda"},
        help="Where the model runs. auto: cuda if the machine has it.",
    )
    attention: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "compiled", "flashinfer", "triton", "reference"),
        help=(
            "The device's attention: its fast kernel, or the plain one that serves as the "
            "reference. auto: compiled on cpu; flashinfer or else triton on cuda, if they work."
        ),
    )
    instruction_set: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "amx", "avx512_bf16", "avx512", "avx2", "generic"),
        help=(
            "The processor's instructions that compiled kernels use on cpu. auto: the best set "
            "that the processor has. generic: what every processor of its kind has."
        ),
    )
    linear: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "plain", "packed"),
        help=(
            "How layers multiply. plain: PyTorch multiplies by the weights as they are. packed: "
            "device=cpu lays the weights out once for a kernel of ours, which is faster for "
            "batches of few rows. auto: packed if it works."
        ),
    )
    quantization: str | None = flag(
        None,
        group=_MODEL,
        choices=("int8", "fp8"),
        help=(
            "Weights of products in 8 bits, and activations quantized to 8 bits as they are "
            "multiplied. It needs less memory and time, and tokens differ a little. Everything "
            "else keeps dtype. int8: for device=cpu. fp8: e4m3, for devices with compute "
            "capability 8.9; on a CPU it takes more time, not less."
        ),
        adapts="weights in dtype",
    )
    kv_cache_dtype: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "fp8", "fp8_e4m3"),
        help=(
            "Precision of the KV cache. auto: dtype. fp8, which is fp8_e4m3: keys and values are "
            "rounded to 8 bits as they are written, and attention computes in dtype. The cache "
            "holds twice as many tokens in the same memory, and tokens differ a little. For "
            "attention=flashinfer, triton and reference."
        ),
    )
    deterministic: bool | None = flag(
        None,
        group=_MODEL,
        help=(
            "Whether a request gets the same tokens and logprobs, bit for bit, whatever runs "
            "beside it. T makes sure of it, or the engine does not start; products that depend on "
            "the number of rows then run on tiles of fixed sizes, which takes longer. F does not "
            "look. auto: it is so if it takes no longer. The log says whether and why."
        ),
        adapts="auto",
    )
    load_format: str = flag(
        "auto",
        group=_MODEL,
        choices=("auto", "dummy"),
        help=(
            "Where the weights come from. auto: the model's safetensors files. dummy: random "
            "numbers; of the model, only config.json and the tokenizer's files are needed."
        ),
    )
    cpu_threads: int | None = flag(
        None,
        group=_MODEL,
        minimum=1,
        help="Threads of the model process on cpu. With launcher=ray, Ray reserves as many CPUs.",
        adapts="PyTorch's choice; several workers share the cores; 1 with launcher=ray",
    )

    host: str = flag(
        "127.0.0.1",
        group=_SERVER,
        help="The address to listen on. 0.0.0.0 lets other machines in; set an api_key then.",
    )
    port: int = flag(
        10210,
        group=_SERVER,
        minimum=0,
        maximum=65535,
        help="The port to listen on, one for all replicas; 0 takes a free one.",
    )
    shutdown_timeout_s: float = flag(
        30.0,
        group=_SERVER,
        minimum=0,
        help="How long running requests may take to finish after a first Ctrl-C or SIGTERM.",
    )
    restart_timeout_s: float = flag(
        1800.0,
        group=_SERVER,
        minimum=0,
        help=(
            "In a restart (`toka restart`, SIGUSR2): how long the new engine may take to be ready, "
            "and after that the old one to finish its requests."
        ),
    )

    tool_call_parser: str = flag(
        "auto",
        group=_SERVER,
        choices=("auto", "hermes", "llama3"),
        help="How the model writes tool calls. auto: as its chat template shows.",
    )
    reasoning_parser: str = flag(
        "auto",
        group=_SERVER,
        choices=("auto", "think", "none"),
        help=(
            "think: text between <think> and </think> at the start of an answer becomes its "
            "reasoning_content. auto: think if the chat template has such marks."
        ),
    )
    embedding_pooling: str = flag(
        "mean",
        group=_SERVER,
        choices=("mean", "last"),
        help=(
            "How /v1/embeddings turns a text into one vector if the request does not say: the "
            "mean of its tokens' hidden states, or the hidden state of its last token."
        ),
    )
    data_dir: str | None = flag(
        None,
        group=_SERVER,
        help=(
            "Where files and batches are kept, so that batches continue after a restart. Only "
            "one engine at a time may use it."
        ),
        adapts="~/.local/share/tokasaurus/port-PORT",
    )
    unsafe_pickle_responses: bool = flag(
        False,
        group=_SERVER,
        help=(
            "Answer /custom/synchronous-batch-completions with a Python pickle, as clients of "
            "version 0.0.4 expect, unless Accept asks for JSON or msgpack. The risk is the "
            "client's: anyone who can answer in the engine's place, or change its answers on the "
            "way, can run any code in the process that unpickles."
        ),
    )

    api_key: tuple[str, ...] | None = flag(
        None,
        group=_SECURITY,
        secret=True,
        help=(
            "Keys, one of which every request must send as Authorization: Bearer KEY. Other "
            "users of the machine can read a command line; api_key_file and the environment "
            "variable TOKASAURUS_API_KEY add keys that they cannot read."
        ),
        adapts="no key is needed",
    )
    api_key_file: str | None = flag(
        None,
        group=_SECURITY,
        help=(
            "A file with more keys, one per line; empty lines and lines that begin with # are "
            "ignored."
        ),
        adapts="no file",
    )
    admin_api_key: tuple[str, ...] | None = flag(
        None,
        group=_SECURITY,
        secret=True,
        help=(
            "Keys that also control the engine: pause it, abort all requests, release its memory, "
            "replace its weights. admin_api_key_file and the environment variable "
            "TOKASAURUS_ADMIN_API_KEY add keys that other users of the machine cannot read."
        ),
        adapts="an engine on a loopback address needs none; others cannot be controlled",
    )
    admin_api_key_file: str | None = flag(
        None,
        group=_SECURITY,
        help="A file with more admin keys, in the form of api_key_file.",
        adapts="no file",
    )
    trust_request_chat_template: bool = flag(
        False,
        group=_SECURITY,
        help=(
            "Let a request bring its own chat_template. The risk: it is a Jinja program, which "
            "runs in the server, so a single request can take ten seconds of its time and a "
            "gigabyte of its memory."
        ),
    )
    ssl_certfile: str | None = flag(
        None,
        group=_SECURITY,
        help="Serve HTTPS with this certificate chain, a PEM file; needs ssl_keyfile.",
        adapts="plain HTTP",
    )
    ssl_keyfile: str | None = flag(
        None,
        group=_SECURITY,
        help="The certificate's private key, a PEM file without a password.",
        adapts="plain HTTP",
    )
    cors_origins: tuple[str, ...] | None = flag(
        None,
        group=_SECURITY,
        help=(
            "Origins whose web pages may call the engine, such as https://example.org; * allows "
            "every page."
        ),
        adapts="pages of other origins may not",
    )
    allowed_hosts: tuple[str, ...] | None = flag(
        None,
        group=_SECURITY,
        help=(
            "More names that clients may call the engine by, in the header Host, besides those of "
            "loopback and host: names such as gpu.example.org, *.example.org for all below it, "
            "or * for every name. Others are refused with status 421."
        ),
        adapts="on a loopback address without api_key no more names; otherwise every name",
    )

    server_processes: int = flag(
        1,
        group=_OVERLOAD,
        minimum=1,
        maximum=256,
        help=(
            "Processes that share the port, where one cannot keep the GPUs busy. Limits, fair "
            "shares, commands and metrics are those of the engine, whichever of them a client "
            "reaches. With more than 1, one more process joins them to the replicas."
        ),
    )
    max_queued_requests: int = flag(
        65536,
        group=_OVERLOAD,
        minimum=1,
        help="The most prompts in flight, running or waiting; more are refused with status 429.",
    )
    request_timeout_s: float | None = flag(
        None,
        group=_OVERLOAD,
        minimum=0.001,
        help=(
            "How long a request may take, waiting included, before it is ended with status 408. "
            "Lines of batches have their own time."
        ),
        adapts="no limit",
    )
    request_read_timeout_s: float = flag(
        60.0,
        group=_OVERLOAD,
        minimum=0.001,
        help=(
            "How long a connection may take to send a request's headers, and how long its body "
            "may take for each 1024 bytes, before it is closed with status 408."
        ),
    )
    max_body_bytes: int = flag(
        256 << 20,
        group=_OVERLOAD,
        minimum=1024,
        help="The largest body of a request; a larger one is refused with status 413.",
    )
    max_n: int = flag(
        65536,
        group=_OVERLOAD,
        minimum=1,
        maximum=65536,
        help="The most samples of one prompt, the field n; more are refused with status 400.",
    )
    max_stored_bytes: int | None = flag(
        None,
        group=_OVERLOAD,
        minimum=1,
        help=(
            "The most bytes of all files in data_dir, inputs and results of batches. An upload "
            "beyond it is refused with status 400; results are always kept."
        ),
        adapts="a tenth of the disk",
    )

    max_request_priority: int = flag(
        0,
        group=_OVERLOAD,
        minimum=0,
        maximum=1_000_000,
        help=(
            "By how much requests may outrank the default priority 0: the field priority must be "
            "at least minus this. A key may have a limit of its own: KEY max_request_priority=N "
            "in the place of KEY. Admin keys have none."
        ),
    )
    fair_share_wait_s: float = flag(
        1.0,
        group=_OVERLOAD,
        minimum=0,
        help=(
            "How long a request of a client that runs less than its share waits for room, in "
            "seconds that the device works, before sequences of clients that run more than theirs "
            "are preempted for it. Also how long requests whose cartridges are in the KV cache may "
            "overtake one for whose cartridge there is no room."
        ),
    )

    stall_timeout_s: float = flag(
        60.0,
        group=_LOGGING,
        minimum=0.1,
        help=(
            "How long the manager or the worker may make no progress, though it has work, before "
            "/health says so. The worker gets more time where its largest batches take long."
        ),
    )
    uvicorn_log_level: str = flag(
        "info",
        group=_LOGGING,
        choices=_UVICORN_LEVELS,
        help="Log level of the web server; warning hides the line for each request.",
    )
    log_level: str = flag("INFO", group=_LOGGING, choices=_LEVELS, help="Log level of the engine.")
    log_format: str = flag(
        "text",
        group=_LOGGING,
        choices=("text", "json"),
        help=(
            "text: lines for people. json: one JSON object per line, from every process, with "
            "time, level, process, message and, where they apply, request_id and traceback."
        ),
    )
    otlp_endpoint: str | None = flag(
        None,
        group=_LOGGING,
        help=(
            "Send OpenTelemetry traces of requests to this collector, by OTLP over HTTP: "
            "http://HOST:4318. It needs the extra otlp. Environment variables such as "
            "OTEL_TRACES_SAMPLER and OTEL_SERVICE_NAME say the rest."
        ),
        adapts="no traces",
    )
    log_procs: tuple[str, ...] | None = flag(
        None,
        group=_LOGGING,
        choices=_PROCESSES,
        help="Only these processes log; model and worker name the same process.",
        adapts="all",
    )

    kv_cache_num_tokens: int | Literal["auto"] | None = flag(
        None,
        group=_LIMITS,
        aliases=("kv_cache_size_num_tokens",),
        minimum=1,
        help=(
            "Tokens that the KV cache of a replica holds. auto: what the free memory holds beside "
            "the weights and the largest batch, less a tenth of the free memory; on cuda, what a "
            "measurement at the start leaves."
        ),
        usually="131072",
        adapts="down to auto; up to max_num_tokens_per_request",
    )
    page_size: int | None = flag(
        None,
        group=_LIMITS,
        minimum=1,
        help=(
            "Tokens in a page. If page_size and kv_cache_num_tokens are both set, the second must "
            "be a multiple of the first; otherwise it is rounded up to whole pages."
        ),
        usually="16",
    )
    max_seqs_per_forward: int | None = flag(
        None,
        group=_LIMITS,
        minimum=1,
        help="Sequences that run at the same time.",
        usually="1024",
        adapts="down to max_tokens_per_forward, and to the memory",
    )
    max_tokens_per_forward: int | None = flag(
        None,
        group=_LIMITS,
        minimum=1,
        help="Prompt and generated tokens of one batch, together.",
        usually="8192",
        adapts="up to max_seqs_per_forward; down to the memory",
    )
    max_num_tokens_per_request: int | None = flag(
        None,
        group=_LIMITS,
        minimum=2,
        help="Tokens of a request, prompt and completion together.",
        adapts="what the model's positions and the KV cache allow",
    )

    scheduling_steps_ahead: int = flag(
        8,
        group=_SCHEDULING,
        minimum=1,
        help=(
            "The most batches planned before the result of the first is known. With pp_size over "
            "1, there may be one more for each stage and buffer stage but the first."
        ),
    )

    max_topk_logprobs: int | None = flag(
        20,
        group=_LOGPROBS,
        minimum=1,
        help=(
            "The most top logprobs that a request may ask for; None allows only those of the "
            "chosen tokens."
        ),
    )
    logprobs_mode: str = flag(
        "temperature",
        group=_LOGPROBS,
        choices=("temperature", "raw", "processed"),
        help=(
            "The distribution that logprobs come from: softmax of logits / temperature, of the "
            "logits alone, or after temperature and filters."
        ),
    )

    profile: bool = flag(
        False,
        group=_DEBUG,
        help=(
            "Write a timeline of the first batches of the first replica to profile.json in "
            "data_dir: the manager's turns, the queue, and the device. chrome://tracing and "
            "ui.perfetto.dev show it."
        ),
    )
    profile_num_batches: int = flag(
        1000, group=_DEBUG, minimum=1, help="Batches in the timeline of profile."
    )
    local_proc_name: str = flag(
        "server",
        group=_DEBUG,
        choices=_PROCESSES,
        help="The process that runs in the foreground, where a debugger can reach it.",
    )
    allocator_sanity_checks: bool = flag(
        False, group=_DEBUG, help="Check all invariants of the page tables after each turn; slow."
    )
    bump_city_population_me: bool = flag(
        False,
        group=_DEBUG,
        help="Preempt running sequences without need, to test that preemption changes no result.",
    )

    # --- features still to come -------------------------------------------------------------------
    dp_size: int = flag(
        1,
        group=_PARALLEL,
        minimum=1,
        help=(
            "Replicas of the model behind one port. Each has weights and a KV cache of its own. "
            "It takes dp_size x pp_size x tp_size GPUs, in their order."
        ),
    )
    replica_restarts: int = flag(
        3,
        group=_PARALLEL,
        minimum=0,
        help=(
            "With dp_size over 1: how often within ten minutes a replica is started again after "
            "one of its processes has ended or makes no progress. After that, or after two starts "
            "in a row that did not make it ready, the engine goes on without it. With "
            "server_processes over 1 the same holds for a process that serves HTTP."
        ),
    )
    pp_size: int = flag(
        1,
        group=_PARALLEL,
        minimum=1,
        help=(
            "Stages of each replica: devices that each have a part of the layers. Batches run in "
            "all of them at the same time."
        ),
    )
    tp_size: int = flag(
        1,
        group=_PARALLEL,
        minimum=1,
        help=(
            "Devices that share each layer of a stage: each has some of the heads, and a part of "
            "every other weight. It must divide the heads of the model."
        ),
    )
    pp_num_buffer_stages: int | None = flag(
        None,
        group=_PARALLEL,
        minimum=0,
        help=(
            "With pp_size over 1: batches in flight beyond one for each stage. They hide the way "
            "of the tokens from the last stage to the first."
        ),
        usually="1",
        adapts="0 on cpu, where that way is short and small batches are slow",
    )
    async_tp_threshold: int | None = flag(
        None,
        group=_PARALLEL,
        minimum=1,
        help=(
            "With tp_size over 1: tokens in a batch from which on matrix products overlap with "
            "what devices exchange. It needs GPUs that NVLink joins; on others it changes nothing, "
            "and the log says so."
        ),
        adapts="never",
    )

    launcher: str = flag(
        "local",
        group=_PARALLEL,
        choices=("local", "ray"),
        help=(
            "Where managers and workers run. local: on this machine. ray: on the nodes of a Ray "
            "cluster, the replicas spread over them; the server runs here. It needs the extra ray."
        ),
    )
    ray_address: str = flag(
        "auto",
        group=_PARALLEL,
        help=(
            "With launcher=ray: HOST:PORT of the cluster that this machine belongs to. auto: the "
            "one that the environment variable RAY_ADDRESS names, or that runs here."
        ),
    )
    launch_timeout_s: float = flag(
        300.0,
        group=_PARALLEL,
        minimum=0,
        help="How long to wait for other machines: for room on a cluster, and for their programs.",
    )

    torch_compile: bool = flag(
        False,
        group=_GRAPHS,
        help=(
            "Compile the whole model with torch.compile, for batches of any size. It takes a "
            "minute at each start. On cpu the compiled kernels of the engine are faster."
        ),
    )
    torch_compile_config: Mapping[str, Any] | None = flag(
        None,
        group=_GRAPHS,
        help="Arguments of torch.compile, by nested keys, as in torch_compile_config.mode=default.",
        adapts="its own",
    )
    use_cudagraphs: bool | None = flag(
        None,
        group=_GRAPHS,
        help=(
            "On cuda, run small batches of generated tokens as CUDA graphs: the device repeats "
            "recorded kernels, and Python launches none. Batches with prompts, or with a shared "
            "prefix that is read once, run as usual. F never does. On cpu T changes nothing, and "
            "the log says so."
        ),
        adapts="T on cuda",
    )
    cudagraph_max_size: int = flag(
        128,
        group=_GRAPHS,
        minimum=1,
        help="Sequences in the largest graph, a multiple of cudagraph_step.",
    )
    cudagraph_step: int = flag(
        16,
        group=_GRAPHS,
        minimum=1,
        help=(
            "Sequences by which each graph is larger than the next smaller one. A batch runs as "
            "the smallest graph that has room for it."
        ),
    )
    cudagraph_max_kv_indices_per_seq: int = flag(
        32768,
        group=_GRAPHS,
        minimum=1,
        help="Pages of a sequence in a graph. A batch with a longer one runs as usual.",
    )

    use_hydragen: bool | None = flag(
        None,
        group=_HYDRAGEN,
        help=(
            "Group the sequences of every batch by the prefixes they share, and read such a "
            "prefix once for all of them, those that decode and those that feed their prompts. "
            "F never does. T does for every group. auto does where it saves time, as the engine "
            "measures when it starts; flashinfer and triton count bytes instead, and "
            "attention=reference needs T."
        ),
        adapts="auto, a choice for each group",
    )
    hydragen_min_group_size: int | None = flag(
        None,
        group=_HYDRAGEN,
        minimum=2,
        help="Sequences that must share a prefix. Smaller groups are not considered.",
        adapts="4 with use_hydragen=auto, which takes those that save time; 32 with T",
    )
    hydragen_min_prefix_len: int | None = flag(
        None,
        group=_HYDRAGEN,
        minimum=1,
        help="Tokens that a shared prefix must have. Shorter ones are not considered.",
        adapts="64 with use_hydragen=auto, which takes those that save time; 256 with T",
    )

    greedy_prefill: bool = flag(
        True,
        group=_SCHEDULING,
        help="Fill every batch with as much of the waiting prompts as fits.",
    )
    prefill_round_up_multiple: int = flag(
        16,
        group=_SCHEDULING,
        minimum=1,
        help="Without greedy_prefill: round the prompt tokens of a batch up to a multiple of this.",
    )
    track_early_stopping: bool = flag(
        True,
        group=_SCHEDULING,
        help="Learn from finished sequences how early others will end.",
    )
    early_stopping_buffer_size: int = flag(
        2048,
        group=_SCHEDULING,
        minimum=1,
        help="Finished sequences that are remembered.",
    )
    early_stopping_num_prediction_buckets: int = flag(
        1024, group=_SCHEDULING, minimum=1, help="Resolution of the learned table."
    )
    early_stopping_initial_wait: int = flag(
        16,
        group=_SCHEDULING,
        minimum=0,
        help=(
            "Sequences that must finish before predictions replace early_stopping_init_mean, if "
            "that is set."
        ),
    )
    early_stopping_init_mean: float | None = flag(
        None,
        group=_SCHEDULING,
        minimum=0,
        help="Expected length until early_stopping_initial_wait, as a fraction of max_tokens.",
        adapts="learned from the first token on, starting from a sixteenth of max_tokens",
    )
    early_stopping_init_std: float | None = flag(
        None,
        group=_SCHEDULING,
        minimum=0,
        help="Standard deviation of early_stopping_init_mean.",
        adapts="0.0",
    )
    use_spec_allocation: bool = flag(
        True,
        group=_SCHEDULING,
        help=(
            "Admit sequences by their predicted lengths rather than by their largest possible "
            "lengths."
        ),
    )
    spec_allocation_std_buffer_scale: float = flag(
        0.25,
        group=_SCHEDULING,
        minimum=0,
        help="Safety margin of a predicted length, in standard deviations.",
    )
    spec_allocation_target_kv_cache_utilization: float = flag(
        1.0,
        group=_SCHEDULING,
        minimum=0,
        help="Share of the KV cache that predictions may fill; more than 1 overcommits.",
    )

    stats_report_seconds: float = flag(
        5.0,
        group=_STATISTICS,
        minimum=0,
        help=(
            "Period of the line of statistics in the log, which is left out while nothing runs; "
            "0 turns it off."
        ),
    )
    statsd_server_url: str | None = flag(
        None,
        group=_STATISTICS,
        aliases=("statsd_addr",),
        help="Where to send statsd gauges, once a second by UDP: HOST:PORT, or HOST for port 8125.",
        adapts="nowhere",
    )
    wandb_enabled: bool = flag(
        False, group=_STATISTICS, later=_WANDB, help="Send statistics to Weights & Biases."
    )
    wandb_entity: str = flag(
        "hazy-research", group=_STATISTICS, later=_WANDB, help="Entity at Weights & Biases."
    )
    wandb_project: str = flag(
        "tokasaurus", group=_STATISTICS, later=_WANDB, help="Project at Weights & Biases."
    )
    wandb_run_name: str | None = flag(
        None,
        group=_STATISTICS,
        later=_WANDB,
        help="Name of the run at Weights & Biases.",
        adapts="a generated name",
    )

    cartridge_dir: str = flag(
        "./cartridges",
        group=_CARTRIDGES,
        help=(
            "Where cartridges are: files and directories that requests name by their names here, "
            "and, in the directory .store, the checked copies of all that were used or uploaded. "
            "Several engines may share it."
        ),
    )
    cartridge_sources: tuple[str, ...] = flag(
        ("local", "wandb", "huggingface", "s3", "http"),
        group=_CARTRIDGES,
        choices=("local", "wandb", "huggingface", "s3", "http"),
        help="Where requests may get cartridges from. http also needs cartridge_hosts.",
    )
    cartridge_roots: tuple[str, ...] | None = flag(
        None,
        group=_CARTRIDGES,
        help=(
            "The directories in which source=local finds files, once all links are resolved: a "
            "path or several."
        ),
        adapts="cartridge_dir and, on a loopback address, the directory for temporary files",
    )
    cartridge_hosts: tuple[str, ...] | None = flag(
        None,
        group=_CARTRIDGES,
        help=(
            "The hosts that source=http downloads from, redirects included: names such as "
            "files.example.org, or *.example.org for all below it."
        ),
        adapts="no host, so source=http is refused",
    )
    max_cartridge_bytes: int = flag(
        16 << 30,
        group=_CARTRIDGES,
        minimum=1,
        help="The largest file of a cartridge, downloaded, uploaded or local.",
    )
    max_stored_cartridge_bytes: int | None = flag(
        None,
        group=_CARTRIDGES,
        minimum=1,
        help=(
            "The most bytes of all cartridges that the store keeps. Beyond it, copies of local "
            "files and downloads go, the least recently used first; uploads stay."
        ),
        adapts="a tenth of the disk",
    )
    cartridge_timeout_s: float = flag(
        600.0,
        group=_CARTRIDGES,
        minimum=0.001,
        help="How long it may take to get a cartridge from its source.",
    )
    cartridge_host_bytes: int = flag(
        4 << 30,
        group=_CARTRIDGES,
        minimum=0,
        help=(
            "The most bytes of recently used cartridges that are kept in the memory of the host, "
            "from which workers read them again after an eviction from the device."
        ),
    )
    cartridge_tags: bool = flag(
        False,
        group=_CARTRIDGES,
        help=(
            "Read <cartridge> tags in system messages of chats. Whoever writes a system message "
            "can then make the engine download cartridges."
        ),
    )
    max_completion_tokens: int | None = flag(
        None,
        group=_CARTRIDGES,
        minimum=1,
        later="a server-wide default for max_completion_tokens",
        help="Length of a chat completion whose request sets none.",
        adapts="what fits",
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @staticmethod
    def from_flags(**flags: Any) -> EngineConfig:
        """Makes a configuration from keyword arguments.

        Keys work as on the command line: aliases, ``config="file.yaml"`` (read first), and the
        nearest name in the error about an unknown key. Values are Python values of the flag's type;
        strings are not read as literals.

        Raises:
            ConfigError: one line for each thing that is wrong.
        """
        builder = Builder(ENGINE)
        for key in sorted(flags, key=lambda key: key != "config"):
            builder.assign(key, flags[key])
        parsed = builder.finish()
        for line in parsed.warnings:
            warnings.warn(line, UserWarning, stacklevel=2)
        return parsed.value


def _uvsh() -> Mapping[str, Any]:
    """uvicorn_log_level=warning"""
    return {"uvicorn_log_level": "warning"}


def _dmanager() -> Mapping[str, Any]:
    """local_proc_name=manager, to debug the manager"""
    return {"local_proc_name": "manager"}


def _dmodel() -> Mapping[str, Any]:
    """local_proc_name=model, to debug the worker"""
    return {"local_proc_name": "model"}


def _par(dp: int = 1, pp: int = 1, tp: int = 1) -> Mapping[str, Any]:
    """.par(dp=2, pp=2, tp=1) sets dp_size, pp_size and tp_size; each defaults to 1"""
    return {"dp_size": dp, "pp_size": pp, "tp_size": tp}


ENGINE = Schema(
    target=EngineConfig,
    program="toka",
    summary="Serve a language model over the OpenAI API.",
    reads_files=True,
    examples=(
        "toka",
        "toka model=meta-llama/Llama-3.2-1B-Instruct port=8080",
        "toka model=my_directory kv_cache_num_tokens='(512 * 1024)' .uvsh",
        "toka config=engine.yaml max_seqs_per_forward=256 --show",
        "toka model=my_directory kv_cache_num_tokens=auto --show-memory",
    ),
    shortcuts={"uvsh": _uvsh, "dmanager": _dmanager, "dmodel": _dmodel, "par": _par},
    retired={
        "stop_string_num_token_lookback": Retired(
            int, 5, "stop strings of any length are found in the whole text"
        ),
        "enable_chosen_logprobs": Retired(
            bool,
            True,
            "logprobs of the chosen tokens are computed whenever a request asks for them",
        ),
        "enable_precise_onboard": Retired(
            bool, True, "sequences are always admitted by the exact forecast"
        ),
        "precise_onboard_batch_size": Retired(
            int, 128, "the forecast decides about any number of sequences at once"
        ),
    },
    foreign=OTHER_ENGINES,
)
