"""A model that several ranks share, against one device and against transformers, in fp32."""

from __future__ import annotations

import random

import torch
from checkpoints import VOCAB_SIZE
from oracle import assert_greedy, reference_generate, reference_model
from rows import named
from worker_driver import Driver, worker_config

from tokasaurus.model.worker.worker import Worker

# Heads, key and value heads, and ranks that share them.
VARIANTS = (
    ("llama", {"tied": True}, 2),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 1}, 4),
    ("llama", {"num_heads": 8, "num_kv_heads": 4, "shards": 3, "rope": "llama3"}, 4),
    ("qwen2", {"tied": True, "shards": 2}, 4),
    ("qwen2", {"num_heads": 6, "num_kv_heads": 6}, 2),
    ("qwen3", {"tied": True, "vocab_size": VOCAB_SIZE - 1}, 4),
    ("qwen3", {"attention_bias": True, "head_dim": 24, "hidden_size": 64}, 2),
)


def random_ids(count, seed=0):
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE - 1) for _ in range(count)]


def driver_of(meeting, path, **fields):
    config = worker_config(path, rank=meeting.rank, tp_size=meeting.size, **fields)
    return Driver(Worker(config, rendezvous=meeting.rendezvous), config)


def scored_and_generated(meeting, path, prompt, num_tokens, fields):
    """Prompt logprobs of the whole vocabulary, and greedy tokens with their logprobs."""
    driver = driver_of(meeting, path, **fields)
    driver.worker.warm_up()
    vocab_size = driver.worker._vocab_size
    driver.start(3)
    (whole,) = driver.chunks(3, prompt, len(prompt), vocab_size)
    result = driver.step(prefill=[whole])
    driver.start(0, num_logprobs=0)
    for part in driver.chunks(0, prompt, 17):
        drawn = driver.step(prefill=[part])
    if meeting.rank:
        for _ in range(num_tokens - 1):
            driver.step(decode=[0])
        return None
    ids, logprobs = [int(drawn.token_ids[0])], [float(drawn.logprobs[0])]
    for _ in range(num_tokens - 1):
        drawn = driver.step(decode=[0])
        ids.append(int(drawn.token_ids[0]))
        logprobs.append(float(drawn.logprobs[0]))
    scores = torch.full((len(prompt) - 1, vocab_size), torch.nan)
    top_ids = torch.tensor(result.prompt_top_ids, dtype=torch.int64)
    scores.scatter_(1, top_ids, torch.tensor(result.prompt_top_logprobs))
    return scores, ids, logprobs


def check_parity(checkpoint, ranks, variants, **fields):
    for architecture, options, size in variants:
        with named(f"{size} ranks, {architecture} {options}"):
            path = checkpoint(architecture, **options)
            prompt = random_ids(50, size)
            fields = {"max_topk_logprobs": VOCAB_SIZE, **fields}
            scores, ids, logprobs = ranks.run(size, scored_and_generated, path, prompt, 24, fields)[
                0
            ]
            with torch.inference_mode():
                logits = reference_model(path)(torch.tensor([prompt])).logits[0]
            expected = logits.log_softmax(-1)[:-1]
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
            assert_greedy(path, prompt, ids, logprobs)
            assert ids == reference_generate(path, prompt, 24)


def test_ranks_that_share_layers_compute_what_transformers_does(checkpoint, ranks):
    check_parity(checkpoint, ranks, VARIANTS, linear="packed")


def test_ranks_whose_weights_are_not_packed_do_so_too(checkpoint, ranks):
    check_parity(checkpoint, ranks, VARIANTS[1::2], linear="plain")


def test_graphs_contain_what_ranks_exchange(checkpoint, ranks):
    traced = {"torch_compile": True, "torch_compile_config": '{"backend": "eager"}'}
    for linear in ("packed", "plain"):
        check_parity(checkpoint, ranks, VARIANTS[:1], linear=linear, **traced)
