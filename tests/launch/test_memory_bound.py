"""The memory that resolution counts is what an engine takes, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import EOS_ID, make_tokenizer

from tokasaurus.config.memory import Memory
from tokasaurus.model.facts import model_facts

pytestmark = [pytest.mark.engine, pytest.mark.processes]

_PROGRAM = """
import json, sys
from tokasaurus import LLM, SamplingParams

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

model, flags, num_prompts, length = json.loads(sys.argv[1])
llm = LLM(model, load_format="dummy", **flags)
loaded = peak()
params = SamplingParams(
    max_tokens=3, temperature=0.9, top_p=0.9, min_p=0.01, logprobs=20, prompt_logprobs=20,
    repetition_penalty=1.1,
)
llm.generate([[i % 250] + [7] * (length - 1) for i in range(num_prompts)], params)
print(json.dumps([loaded, peak()]))
"""


def peaks(path, num_prompts, length, **flags):
    """The process's peak after loading, and after serving, in bytes."""
    arguments = json.dumps([str(path), flags, num_prompts, length])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, served = json.loads(done.stdout.splitlines()[-1])
    return loaded, served


def write_model(directory, **fields):
    make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "eos_token_id": EOS_ID,
                "max_position_embeddings": 4096,
                "tie_word_embeddings": True,
                **fields,
            }
        )
    )
    return directory


def check_peaks(path, dtype, num_prompts, length, max_tokens, **flags):
    kv_tokens = 16 * 1024
    loaded, served = peaks(
        path,
        num_prompts,
        length,
        dtype=dtype,
        kv_cache_num_tokens=kv_tokens,
        max_tokens_per_forward=max_tokens,
        **flags,
    )
    memory = Memory("cpu", None, dtype, model_facts(path))
    process = 512 << 20
    assert loaded < process + memory.weight_bytes, "weights are in memory twice"
    batch = memory.batch_bytes(max_tokens)
    assert served < process + memory.weight_bytes + memory.kv_bytes(kv_tokens) + batch
    return loaded, served


def test_an_engine_stays_below_weights_cache_and_the_bound_of_its_batches(tmp_path):
    """One model has a large vocabulary, the other wide layers."""
    for fields, dtype in (
        ({"vocab_size": 65536, "hidden_size": 128, "intermediate_size": 256}, "float32"),
        ({"vocab_size": 512, "hidden_size": 512, "intermediate_size": 16384}, "bfloat16"),
    ):
        directory = tmp_path / dtype
        directory.mkdir()
        path = write_model(directory, num_hidden_layers=2, num_attention_heads=2, **fields)
        check_peaks(path, dtype, 8, 256, 2048, cpu_threads=1)


@pytest.mark.long
def test_a_model_of_a_billion_parameters_is_never_in_memory_twice(tmp_path):
    """The shape of Llama-3.2-1B."""
    path = write_model(
        tmp_path,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    )
    loaded, served = check_peaks(path, "bfloat16", 4, 64, 256)
    assert loaded < 3.1e9, loaded
    assert served < 24 * 2**30, served
