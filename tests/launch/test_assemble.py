"""What a checkpoint says and what the user says come together in slices that agree."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import EOS_ID, VOCAB_SIZE, edit_json, make_checkpoint

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.memory import Memory
from tokasaurus.entry import run
from tokasaurus.errors import ConfigError
from tokasaurus.launch.assemble import assemble
from tokasaurus.model.facts import model_facts, read_model_config
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import load_model


def positions_of(path) -> int:
    return json.loads((path / "config.json").read_text())["max_position_embeddings"]


def sizes(path, **flags):
    return assemble(EngineConfig(model=str(path), device="cpu", **flags))


def worker_of(path, **flags):
    (replica,) = sizes(path, **flags).replicas
    return replica.workers[0]


def test_every_room_gets_the_sizes_of_the_checkpoint(tmp_path):
    for architecture in ("llama", "qwen2", "qwen3"):
        path = make_checkpoint(tmp_path / architecture, architecture)
        edit_json(path / "generation_config.json", temperature=0.25, top_k=7)
        slices = sizes(path, kv_cache_num_tokens=4096, page_size=32, max_seqs_per_forward=4)
        server, (replica,) = slices.server, slices.replicas
        manager, (worker,) = replica.manager, replica.workers
        assert server.vocab_size == VOCAB_SIZE, architecture
        assert server.eos_token_ids == (EOS_ID,)
        assert server.sampling_defaults == {"temperature": 0.25, "top_k": 7}
        assert manager.num_pages == worker.num_pages == 4096 // 32
        assert manager.max_request_tokens == positions_of(path)
        assert server.max_request_tokens == worker.max_request_tokens == positions_of(path)


def test_model_and_cache_take_the_memory_that_resolution_counted(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path / "model", "qwen3", num_heads=4, num_kv_heads=2)
    flags = {
        "kv_cache_num_tokens": 640,
        "page_size": 32,
        "dtype": "bfloat16",
        "max_tokens_per_forward": 64,
    }
    model, worker = read_model_config(path), worker_of(path, **flags)
    cache = KVCache.allocate(
        num_layers=model.num_layers,
        num_pages=worker.num_pages,
        page_size=worker.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    available = "tokasaurus.launch.machine.available_memory_bytes"
    place = Placement(torch.bfloat16, torch.device("cpu"))
    _, weights, _ = load_model(path, model, place)
    memory = Memory("cpu", None, "bfloat16", model_facts(path))
    others = memory.batch_bytes(worker.max_tokens_per_forward) + (512 << 20)  # and the process
    num_bytes = cache.num_bytes + 2 * weights.num_parameters + others
    monkeypatch.setattr(available, lambda: num_bytes)
    assert worker_of(path, **flags) == worker
    monkeypatch.setattr(available, lambda: num_bytes - 1)
    with pytest.raises(ConfigError, match="kv_cache_num_tokens=640 needs a KV cache of 640"):
        sizes(path, **flags)


def test_a_scaling_of_positions_counts_once(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    original = positions_of(path)
    low_and_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for scaling, expected in (
        ({"rope_type": "default"}, original),
        ({"rope_type": "linear", "factor": 4.0}, 4 * original),
        ({"rope_type": "yarn", "factor": 2.0}, 2 * original),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, original),
        ({"rope_type": "llama3", "factor": 8.0, **low_and_high}, 8 * original),
    ):
        slices = sizes(path, rope_scaling=scaling, kv_cache_num_tokens=64 * original)
        assert slices.replicas[0].manager.max_request_tokens == expected, scaling


def test_more_positions_than_the_model_has_are_refused(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    original = positions_of(path)
    linear = {"rope_type": "linear", "factor": 2.0}
    for scaling, most in ((None, original), (linear, 2 * original)):
        flags = {"rope_scaling": scaling, "kv_cache_num_tokens": 8 * original}
        slices = sizes(path, max_num_tokens_per_request=most, **flags)
        assert slices.replicas[0].manager.max_request_tokens == most
        with pytest.raises(ConfigError, match=f"the model has {most} positions"):
            sizes(path, max_num_tokens_per_request=most + 1, **flags)


def test_dtypes_reach_the_worker(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    assert worker_of(path, instruction_set="generic").dtype == "float32"
    assert worker_of(path, instruction_set="generic", dtype="bfloat16").dtype == "bfloat16"
    multiplies = any("avx512_bf16" in each.features for each in usable_sets())
    assert worker_of(path).dtype == ("bfloat16" if multiplies else "float32")
    for other in (torch.float32, torch.float16):
        path = make_checkpoint(tmp_path / str(other), "llama", dtype=other)
        assert worker_of(path).dtype == "float32", other


def test_show_says_dtype_and_memory_of_the_model_that_is_here(tmp_path, capsys):
    path = make_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)

    def shown(*flags):
        with pytest.raises(SystemExit):
            run([*flags, "device=cpu", "--show"], {})
        return capsys.readouterr().out.splitlines()

    dtype, memory = shown(f"model={path}", "instruction_set=generic")[-3:-1]
    assert dtype.startswith("# dtype=auto: float32, although the checkpoint has bfloat16")
    assert memory.startswith("# memory: cpu has ")
    assert shown(f"model={path}", "dtype=float32")[-3] == "# dtype=float32: as asked"
    assert shown("model=org/elsewhere")[-1].startswith("# model=org/elsewhere is not here yet")


def test_show_prints_the_flags_of_a_configuration_that_is_refused_and_fails(tmp_path, capsys):
    path = make_checkpoint(tmp_path / "model", "llama")
    flags = [f"model={path}", "device=cpu", "max_num_tokens_per_request=100000", "pp_size=100"]
    assert run([*flags, "--show"], {}) == 2
    printed = capsys.readouterr()
    assert "max_num_tokens_per_request: 100000" in printed.out.splitlines()
    for refused in (
        "max_num_tokens_per_request=100000: the model has",
        "pp_size=100: the model has",
    ):
        assert refused in printed.err


def test_show_memory_prints_a_table_that_adds_up_and_loads_nothing(tmp_path, capsys):
    path = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32)
    (path / "model.safetensors").unlink()
    flags = [f"model={path}", "device=cpu", "load_format=dummy", "kv_cache_num_tokens=4096"]
    with pytest.raises(SystemExit) as ended:
        run([*flags, "--show-memory"], {})
    assert not ended.value.code
    numbers = {}
    for line in capsys.readouterr().out.splitlines():
        if found := re.match(r"([A-Za-z ]+?)  +(-?[0-9,]+)  ", line):
            numbers[found[1]] = int(found[2].replace(",", ""))
    model = read_model_config(path)
    assert numbers["weights"] == 4 * model.num_parameters
    assert numbers["KV cache"] == 4 * 4096 * model.kv_elements_per_token
    total, free, reserve = (numbers.pop(name) for name in ("total", "free", "reserve"))
    assert total == sum(numbers.values())
    assert reserve == free - total


def test_show_memory_refuses_what_does_not_fit_and_a_model_that_is_elsewhere(tmp_path, capsys):
    path = make_checkpoint(tmp_path / "model", "llama")
    too_much = [f"model={path}", "device=cpu", "kv_cache_num_tokens=(10**12)", "--show-memory"]
    assert run(too_much, {}) == 2
    assert "kv_cache_num_tokens=1000000000000 needs a KV cache" in capsys.readouterr().err
    assert run(["model=org/elsewhere", "--show-memory"], {}) == 2
    assert "model=org/elsewhere is not here yet" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["flashinfer", "triton"])
def test_attention_that_a_device_cannot_run_is_refused_before_anything_starts(
    tmp_path, capsys, monkeypatch, attention
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = make_checkpoint(tmp_path / "model", "llama")
    flags = [f"model={path}", "device=cpu", f"attention={attention}"]
    reason = f"attention={attention} does not run on device=cpu: set compiled or reference"
    assert run([*flags, "--show-memory"], {}) == 2
    assert reason in capsys.readouterr().err
    assert run([*flags, "--show"], {}) == 2
    assert reason in capsys.readouterr().err


def test_dummy_weights_are_planned_from_config_json_alone(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path / "model", "llama", tied=True)
    (path / "model.safetensors").unlink()
    process_bytes = 512 << 20
    weight_bytes = 4 * read_model_config(path).num_parameters
    available = "tokasaurus.launch.machine.available_memory_bytes"
    monkeypatch.setattr(available, lambda: process_bytes + weight_bytes - 1)
    with pytest.raises(ConfigError, match=r"the weights take .* in float32"):
        sizes(path, load_format="dummy")
    monkeypatch.setattr(available, lambda: 2 * process_bytes)
    assert worker_of(path, load_format="dummy").load_format == "dummy"


def test_the_bundled_model_gets_the_default_cache(monkeypatch):
    available = "tokasaurus.launch.machine.available_memory_bytes"
    monkeypatch.setattr(available, lambda: 8 * 10**9)
    slices = assemble(EngineConfig(device="cpu"))
    manager = slices.replicas[0].manager
    assert manager.num_pages * manager.page_size == 131072
    assert "131072 tokens" in slices.memory_plan.line
