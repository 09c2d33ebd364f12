import dataclasses
import re
import subprocess
import sys

import pytest
from rows import each_row

from tokasaurus import common_types
from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.other_engines import OTHER_ENGINES
from tokasaurus.config.parser import parse_command_line
from tokasaurus.config.schema import flags_of
from tokasaurus.config.suggestions import nearest
from tokasaurus.errors import ConfigError

# The command line is a public interface: a change of a line here breaks users' scripts.
NAMES_AND_DEFAULTS = {
    "model": None,
    "tokenizer": None,
    "served_model_name": None,
    "trust_remote_code": False,
    "dtype": "auto",
    "rope_scaling": None,
    "device": "auto",
    "attention": "auto",
    "instruction_set": "auto",
    "linear": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "deterministic": None,
    "load_format": "auto",
    "cpu_threads": None,
    "host": "127.0.0.1",
    "port": 10210,
    "api_key": None,
    "api_key_file": None,
    "admin_api_key": None,
    "admin_api_key_file": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "cors_origins": None,
    "allowed_hosts": None,
    "server_processes": 1,
    "max_queued_requests": 65536,
    "request_timeout_s": None,
    "request_read_timeout_s": 60.0,
    "max_body_bytes": 256 << 20,
    "max_n": 65536,
    "max_request_priority": 0,
    "fair_share_wait_s": 1.0,
    "max_stored_bytes": None,
    "shutdown_timeout_s": 30.0,
    "restart_timeout_s": 1800.0,
    "tool_call_parser": "auto",
    "reasoning_parser": "auto",
    "cartridge_tags": False,
    "data_dir": None,
    "unsafe_pickle_responses": False,
    "trust_request_chat_template": False,
    "embedding_pooling": "mean",
    "stall_timeout_s": 60.0,
    "uvicorn_log_level": "info",
    "log_level": "INFO",
    "log_format": "text",
    "otlp_endpoint": None,
    "log_procs": None,
    "profile": False,
    "profile_num_batches": 1000,
    "local_proc_name": "server",
    "kv_cache_num_tokens": None,
    "page_size": None,
    "max_seqs_per_forward": None,
    "max_tokens_per_forward": None,
    "max_num_tokens_per_request": None,
    "scheduling_steps_ahead": 8,
    "max_topk_logprobs": 20,
    "logprobs_mode": "temperature",
    "allocator_sanity_checks": False,
    "bump_city_population_me": False,
    "dp_size": 1,
    "replica_restarts": 3,
    "pp_size": 1,
    "tp_size": 1,
    "pp_num_buffer_stages": None,
    "async_tp_threshold": None,
    "launcher": "local",
    "ray_address": "auto",
    "launch_timeout_s": 300.0,
    "torch_compile": False,
    "torch_compile_config": None,
    "use_cudagraphs": None,
    "cudagraph_max_size": 128,
    "cudagraph_step": 16,
    "cudagraph_max_kv_indices_per_seq": 32768,
    "use_hydragen": None,
    "hydragen_min_group_size": None,
    "hydragen_min_prefix_len": None,
    "greedy_prefill": True,
    "prefill_round_up_multiple": 16,
    "track_early_stopping": True,
    "early_stopping_buffer_size": 2048,
    "early_stopping_num_prediction_buckets": 1024,
    "early_stopping_initial_wait": 16,
    "early_stopping_init_mean": None,
    "early_stopping_init_std": None,
    "use_spec_allocation": True,
    "spec_allocation_std_buffer_scale": 0.25,
    "spec_allocation_target_kv_cache_utilization": 1.0,
    "stats_report_seconds": 5.0,
    "statsd_server_url": None,
    "wandb_enabled": False,
    "wandb_entity": "hazy-research",
    "wandb_project": "tokasaurus",
    "wandb_run_name": None,
    "cartridge_dir": "./cartridges",
    "cartridge_sources": ("local", "wandb", "huggingface", "s3", "http"),
    "cartridge_roots": None,
    "cartridge_hosts": None,
    "max_cartridge_bytes": 16 << 30,
    "max_stored_cartridge_bytes": None,
    "cartridge_timeout_s": 600.0,
    "cartridge_host_bytes": 4 << 30,
    "max_completion_tokens": None,
}
ALIASES = {"kv_cache_size_num_tokens": "kv_cache_num_tokens", "statsd_addr": "statsd_server_url"}
RETIRED = {
    "stop_string_num_token_lookback": 5,
    "enable_chosen_logprobs": True,
    "enable_precise_onboard": True,
    "precise_onboard_batch_size": 128,
}
USUALLY = {
    "pp_num_buffer_stages": "1",
    "kv_cache_num_tokens": "131072",
    "page_size": "16",
    "max_seqs_per_forward": "1024",
    "max_tokens_per_forward": "8192",
}


def toka(*arguments, **environment):
    return parse_command_line(arguments, environment)


def test_names_and_defaults_are_frozen():
    assert dataclasses.asdict(EngineConfig()) == NAMES_AND_DEFAULTS
    aliases = {alias: item.name for item in ENGINE for alias in item.notes.aliases}
    assert aliases == ALIASES
    assert {name: item.default for name, item in ENGINE.retired.items()} == RETIRED
    usually = {item.name: item.notes.usually for item in ENGINE if item.notes.usually}
    assert usually == USUALLY
    assert set(ENGINE.shortcuts) == {"uvsh", "dmanager", "dmodel", "par"}


def test_every_flag_is_explained():
    for item in ENGINE:
        assert item.notes.help.endswith("."), item.name
        assert item.notes.group, item.name
        assert (item.default is None) == bool(item.notes.adapts or item.notes.usually), item.name


def test_no_arguments_give_the_defaults():
    assert toka() == EngineConfig()
    assert common_types.EngineConfig is EngineConfig


@each_row(
    "argument, name, value",
    [
        ("kv_cache_num_tokens=(512 * 1024)", "kv_cache_num_tokens", 524288),
        ("kv_cache_num_tokens=(200000)", "kv_cache_num_tokens", 200000),
        ("kv_cache_num_tokens=((1024 + 512) * 1024)", "kv_cache_num_tokens", 1572864),
        ("kv_cache_size_num_tokens=(1024*1024)", "kv_cache_num_tokens", 1048576),
        ("kv_cache_num_tokens=100000", "kv_cache_num_tokens", 100000),
        ("kv_cache_num_tokens=auto", "kv_cache_num_tokens", "auto"),
        ("kv_cache_num_tokens=None", "kv_cache_num_tokens", None),
        ("model=meta-llama/Llama-3.2-1B-Instruct", "model", "meta-llama/Llama-3.2-1B-Instruct"),
        ("model=123", "model", "123"),
        ("model=(1)+(2)", "model", "3"),
        ("model=None", "model", None),
        ("tokenizer=a=b", "tokenizer", "a=b"),
        ("torch_compile=f", "torch_compile", False),
        ("torch_compile=false", "torch_compile", False),
        ("torch_compile=no", "torch_compile", False),
        ("use_cudagraphs=F", "use_cudagraphs", False),
        ("use_cudagraphs=T", "use_cudagraphs", True),
        ("use_cudagraphs=auto", "use_cudagraphs", None),
        (".uvsh", "uvicorn_log_level", "warning"),
        (".uvsh()", "uvicorn_log_level", "warning"),
        (".dmanager", "local_proc_name", "manager"),
        (".dmodel", "local_proc_name", "model"),
        (".par(dp=1,pp=1,tp=1)", "dp_size", 1),
        ("log_level=debug", "log_level", "DEBUG"),
        ("uvicorn_log_level=WARNING", "uvicorn_log_level", "warning"),
        ("log_procs=server,model", "log_procs", ("server", "model")),
        ("--port=8080", "port", 8080),
        ("trust_remote_code=T", "trust_remote_code", True),
        ("rope_scaling.factor=2.0", "rope_scaling", {"factor": 2.0}),
        (
            'rope_scaling={"rope_type": "yarn", "factor": 4}',
            "rope_scaling",
            {"rope_type": "yarn", "factor": 4},
        ),
        ("max_topk_logprobs=None", "max_topk_logprobs", None),
        ("dtype=half", "dtype", "float16"),
        ("dtype=fp16", "dtype", "float16"),
        ("dtype=BF16", "dtype", "bfloat16"),
        ("dtype=float", "dtype", "float32"),
        ("dtype=fp32", "dtype", "float32"),
        ("device=gpu", "device", "cuda"),
        ("--served-model-name=my-model", "served_model_name", "my-model"),
    ],
)
def test_documented_uses_of_flags(argument, name, value):
    result = getattr(toka(argument), name)
    assert result == value
    assert type(result) is type(value)


@each_row(
    "argument, words",
    [
        ("port=2.7", ["port='2.7'", "an integer"]),
        ("port=99999", ["port=99999", "65535"]),
        ("torch_compile=maybe", ["torch_compile='maybe'", "true or false"]),
        ("model=", ["model", "must not be empty"]),
        ("model=(__import__('os').getpid())", ["model", "__import__", "(character 2)"]),
        ("dtype=int8", ["dtype='int8'", "float16"]),
        ("dtype=flaot", ["dtype='flaot'", "the nearest is float32"]),
        ("log_procs=server,wroker", ["log_procs", "worker"]),
        ("prot=1", ["prot", "'port'"]),
        ("kv_cache_num_token=1", ["kv_cache_num_token", "'kv_cache_num_tokens'"]),
        ("max_topk_logprobs=0", ["max_topk_logprobs=0", "at least 1"]),
        ("kv_cache_num_tokens=(512 * 1024", ["kv_cache_num_tokens", "an integer", "parentheses"]),
        (".uvs", [".uvs", ".uvsh"]),
    ],
)
def test_errors_name_the_flag_and_the_remedy(argument, words):
    with pytest.raises(ConfigError) as caught:
        toka(argument)
    assert all(word in str(caught.value) for word in words), caught.value


@each_row("name", [item.name for item in ENGINE if item.notes.later])
def test_features_still_to_come_are_refused_by_name(name):
    item = flags_of(EngineConfig)[name]
    assert getattr(EngineConfig(**{name: item.default}), name) == item.default
    other = {bool: not item.default, int: 77, float: 0.77, str: "x"}.get(item.inner_form, {"x": 1})
    with pytest.raises(ConfigError, match=f"^{name}=.* not available yet"):
        EngineConfig(**{name: other})


def test_sizes_of_the_grid_are_set_together():
    config = toka(".par(dp=2,pp=3,tp=4)")
    assert (config.dp_size, config.pp_size, config.tp_size) == (2, 3, 4)


def test_retired_flags_are_accepted_with_a_warning(capsys):
    assert toka("stop_string_num_token_lookback=9", "enable_chosen_logprobs=F") == EngineConfig()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == [
        "toka: warning: stop_string_num_token_lookback",
        "toka: warning: enable_chosen_logprobs",
    ]


def test_every_flag_of_another_engine_is_reported_with_ours():
    known = set(NAMES_AND_DEFAULTS)
    for name, foreign in OTHER_ENGINES.items():
        assert name not in known | set(ALIASES) | set(RETIRED), name
        assert foreign.ours is None or foreign.ours in known, name
        assert foreign.ours or foreign.note, name
        with pytest.raises(ConfigError) as caught:
            toka(f"{name}=1")
        assert f"unknown flag '{name}'" in str(caught.value)
        assert (foreign.ours or foreign.note) in str(caught.value)


@each_row(
    "arguments, ours",
    [
        (["--max-model-len", "4096"], "max_num_tokens_per_request"),
        (["--context-length=4096"], "max_num_tokens_per_request"),
        (["--tensor-parallel-size", "2"], "tp_size"),
        (["-tp", "2"], "tp_size"),
        (["-c", "65536"], "kv_cache_num_tokens"),
        (["-np", "8"], "max_seqs_per_forward"),
        (["--max-num-seqs", "256"], "max_seqs_per_forward"),
        (["max_running_requests=256"], "max_seqs_per_forward"),
        (["--max-num-batched-tokens", "8192"], "max_tokens_per_forward"),
        (["--chunked-prefill-size", "8192"], "max_tokens_per_forward"),
        (["--gpu-memory-utilization", "0.9"], "kv_cache_num_tokens"),
        (["--mem-fraction-static", "0.9"], "kv_cache_num_tokens"),
        (["--block-size", "16"], "page_size"),
        (["--model-path", "org/name"], "model"),
        (["--tokenizer-path", "org/name"], "tokenizer"),
        (["--enforce-eager"], "use_cudagraphs"),
        (["--no-enforce-eager", "port=1"], "use_cudagraphs"),
        (["--distributed-executor-backend", "ray"], "launcher"),
        (["--tensor-paralel-size", "2"], "tp_size"),
        (["--max-seq-length", "9"], "max_num_tokens_per_request"),
        (["--gpu-memory", "0.9"], "kv_cache_num_tokens"),
    ],
)
def test_flags_of_other_engines_may_have_dashes(arguments, ours):
    with pytest.raises(ConfigError) as caught:
        toka(*arguments)
    assert f"the flag for this is '{ours}'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@each_row(
    "key, guesses",
    [
        ("hydragen", ["'use_hydragen'"]),
        ("cuda_graphs", ["'use_cudagraphs'"]),
        ("kv_cache_tokens", ["'kv_cache_num_tokens'"]),
        ("pagesize", ["'page_size'"]),
        ("certificate", ["ssl_certfile", "ssl_keyfile"]),
        ("loudness", []),
    ],
)
def test_a_guess_at_an_unknown_flag_is_by_its_words_or_there_is_none(key, guesses):
    with pytest.raises(ConfigError) as caught:
        toka(f"{key}=1")
    rest = str(caught.value).removeprefix(f"unknown flag {key!r}")
    named = {name for name in NAMES_AND_DEFAULTS if re.search(rf"\b{name}\b", rest)}
    assert all(guess in rest for guess in guesses), rest
    assert named == {guess.strip("'") for guess in guesses}
    assert "--help" in rest


def test_a_flag_that_others_lack_is_not_confused_with_one_that_shares_its_letters():
    without_launcher = {name: "" for name in NAMES_AND_DEFAULTS if name != "launcher"}
    assert nearest("launcher", without_launcher) is None
    assert nearest("max_len", ["max_n", "page_size"]) is None


def test_the_overrides_variable_follows_the_arguments():
    assert toka("port=1", "host=::1", OVERRIDES="port=2 'model=a b' .uvsh") == EngineConfig(
        port=2, host="::1", model="a b", uvicorn_log_level="warning"
    )


def test_show_prints_a_file_that_config_reads(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        toka("model=not/there", "--show", "port=1", "log_procs=server", "rope_scaling.factor=2")
    assert caught.value.code == 0
    path = tmp_path / "engine.yaml"
    path.write_text(capsys.readouterr().out)
    assert toka(f"config={path}") == EngineConfig(
        model="not/there", port=1, log_procs=("server",), rope_scaling={"factor": 2}
    )


def test_help_lists_every_flag_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        toka("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name, default in NAMES_AND_DEFAULTS.items():
        shown = ",".join(default) if isinstance(default, tuple) else default
        assert f"{name}={USUALLY.get(name, shown)}" in out
        assert " ".join(flags_of(EngineConfig)[name].notes.help.split()) in words
    for name in (*ALIASES, *RETIRED, ".uvsh", ".par", "config=FILE"):
        assert name in out


# --- in Python ------------------------------------------------------------------------------------


def test_from_flags_reads_keyword_arguments_and_a_file(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text("port: 5\nmax_seqs_per_forward: (2 * 8)")
    config = EngineConfig.from_flags(
        port=6, config=path, kv_cache_size_num_tokens=1e3, log_procs=["server"]
    )
    assert config == EngineConfig(
        port=6, max_seqs_per_forward=16, kv_cache_num_tokens=1000, log_procs=("server",)
    )


@each_row(
    "flags, words",
    [
        ({"prot": 1}, ["prot", "'port'"]),
        ({"max_model_len": 5}, ["max_model_len", "'max_num_tokens_per_request'"]),
        ({"port": "8080"}, ["port='8080'", "expected an integer, got text"]),
        ({"port": "auto"}, ["port='auto'", "expected an integer, got text"]),
        ({"kv_cache_num_tokens": "all"}, ["kv_cache_num_tokens", "an integer or auto or None"]),
        ({"model": 123}, ["model=123", "expected text or None"]),
        ({"trust_remote_code": "T"}, ["trust_remote_code='T'", "true or false"]),
        ({"port": True}, ["port=True", "an integer"]),
        ({"wandb_enabled": True}, ["wandb_enabled=True", "not available yet"]),
    ],
)
def test_from_flags_reports_errors(flags, words):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_flags(**flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_from_flags_warns_of_retired_flags():
    with pytest.warns(UserWarning, match="stop_string_num_token_lookback has no effect"):
        assert EngineConfig.from_flags(stop_string_num_token_lookback=7) == EngineConfig()


def test_the_constructor_checks_every_field():
    with pytest.raises(ConfigError) as caught:
        EngineConfig(port="x", page_size=0, dtype="int8", dp_size=0)
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(TypeError):
        EngineConfig(prot=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().port = 1


def test_a_mapping_is_copied():
    scaling = {"factor": 2.0}
    config = EngineConfig(rope_scaling=scaling)
    scaling["factor"] = 3.0
    assert config.rope_scaling == {"factor": 2.0}


def test_config_imports_nothing_heavy():
    code = (
        "import sys, tokasaurus.config.parser, tokasaurus.config.resolve\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'pydantic', 'openai', 'rich'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_use_hydragen_may_be_auto_on_a_command_line_and_in_python():
    assert parse_command_line(["use_hydragen=T"], {}).use_hydragen is True
    for arguments in (["use_hydragen=auto"], ["use_hydragen=F", "use_hydragen=auto"], []):
        assert parse_command_line(arguments, {}).use_hydragen is None
    assert EngineConfig(use_hydragen="auto").use_hydragen is None
    with pytest.raises(ConfigError, match="use_hydragen"):
        parse_command_line(["use_hydragen=often"], {})


def test_deterministic_is_auto_unless_it_is_asked_for():
    for argument, expected in (("T", True), ("F", False), ("auto", None)):
        assert parse_command_line([f"deterministic={argument}"], {}).deterministic is expected
