"""Our models against those of transformers, in fp32."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE
from oracle import assert_greedy, reference_generate, reference_model
from rows import named
from worker_driver import Enter, generate, make_driver

from tokasaurus.protocol.messages import LogprobsMode, Sampling
from tokasaurus.rounding import ceil_div


@dataclass(frozen=True)
class Variant:
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return "-".join([self.architecture, *(f"{k}={v}" for k, v in self.options.items())])


VARIANTS = [
    Variant("llama", {"tied": True}),
    Variant("llama", {"num_heads": 3, "num_kv_heads": 1, "shards": 3}),
    Variant("llama", {"num_heads": 4, "num_kv_heads": 4, "rope": "llama3"}),
    Variant("llama", {"rope": "llama3", "config_style": 4}),
    Variant("llama", {"rope": "linear", "config_style": 4, "tied": True}),
    Variant("llama", {"config_style": 4, "num_heads": 9, "num_kv_heads": 3, "head_dim": 10}),
    Variant("llama", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama", {"hidden_size": 48, "head_dim": 20}),
    Variant("qwen2", {"tied": True, "shards": 2}),
    Variant("qwen2", {"num_heads": 5, "num_kv_heads": 5}),
    Variant("qwen2", {"rope": "yarn", "config_style": 4}),
    Variant("qwen3", {"tied": True}),
    Variant("qwen3", {"num_heads": 9, "num_kv_heads": 3, "shards": 2, "config_style": 4}),
    Variant("qwen3", {"attention_bias": True, "head_dim": 24, "hidden_size": 64}),
]


def random_ids(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_logprob_of_every_prompt_position_is_that_of_transformers(checkpoint, variant):
    """The prompt logprobs cover the whole vocabulary."""
    path = checkpoint(variant.architecture, **variant.options)
    ids = random_ids(150)
    driver = make_driver(path)
    driver.start(3)
    (whole,) = driver.chunks(3, ids, 150, VOCAB_SIZE)
    result = driver.step(prefill=[whole])
    with torch.inference_mode():
        logits = reference_model(path)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1]
    got = torch.full_like(expected, torch.nan)
    got.scatter_(
        1,
        torch.tensor(result.prompt_top_ids, dtype=torch.int64),
        torch.tensor(result.prompt_top_logprobs),
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    chosen = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.prompt_logprobs), chosen, atol=1e-4, rtol=0)


def check_greedy_tokens(path, page_size, **options):
    prompt = random_ids(50, seed=page_size)
    driver = make_driver(path, page_size=page_size, num_pages=ceil_div(256, page_size), **options)
    ids, logprobs = generate(driver, prompt, 64, chunk=17)
    assert_greedy(path, prompt, ids, logprobs)
    if page_size == 16:
        assert ids == reference_generate(path, prompt, 64)


@pytest.mark.parametrize("attention", ["reference", "compiled"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(checkpoint, architecture, attention):
    """After chunked prefill and paged decode over shuffled pages."""
    path = checkpoint(architecture, num_heads=3, num_kv_heads=1, rope="llama3", shards=2)
    for page_size in (1, 16, 64):
        with named(page_size):
            check_greedy_tokens(path, page_size, attention=attention)


def test_greedy_tokens_of_packed_products_are_those_of_transformers(checkpoint):
    for architecture, options in (("llama", {"tied": True}), ("qwen2", {}), ("qwen3", {})):
        with named(architecture):
            path = checkpoint(architecture, num_heads=3, num_kv_heads=1, **options)
            check_greedy_tokens(path, 16, linear="packed")


def test_many_sequences_in_mixed_batches_match_transformers(checkpoint):
    """They start, wait, run in chunks and end at different times."""
    path = checkpoint("llama", tied=True)
    driver = make_driver(path, num_pages=200, num_slots=12)
    source = random.Random(5)
    prompts = {slot: random_ids(source.randint(1, 90), slot) for slot in range(12)}
    chunks = {
        slot: driver.chunks(slot, ids, source.choice([7, 16, 30, 100]))
        for slot, ids in prompts.items()
    }
    got: dict[int, list[int]] = {slot: [] for slot in prompts}
    logprobs: dict[int, list[float]] = {slot: [] for slot in prompts}
    waiting = list(prompts)
    prefilling: list[int] = []
    while min(len(ids) for ids in got.values()) < 20:
        if waiting and source.random() < 0.7:
            slot = waiting.pop(0)
            driver.start(slot, num_logprobs=0)
            prefilling.append(slot)
        decode = [slot for slot in prompts if got[slot] and source.random() < 0.8]
        prefill = [chunks[slot].pop(0) for slot in prefilling if source.random() < 0.7]
        result = driver.step(decode, prefill)
        sampling = decode + [chunk.slot for chunk in prefill if chunk.ends_prompt]
        assert len(result.token_ids) == len(sampling)
        for slot, token, logprob in zip(
            sampling, result.token_ids, result.logprobs, strict=len(result.logprobs) > 0
        ):
            got[slot].append(int(token))
            logprobs[slot].append(float(logprob))
        prefilling = [slot for slot in prefilling if chunks[slot]]
    for slot, prompt in prompts.items():
        assert_greedy(path, prompt, got[slot], logprobs[slot])


def test_a_preempted_sequence_continues_the_same_random_stream(checkpoint):
    """It returns in another slot; its prompt and generated ids are the new prompt."""
    path = checkpoint("qwen2", tied=True)
    driver = make_driver(path)
    prompt = random_ids(30)
    how = {"sampling": Sampling(temperature=1.0, top_p=0.95), "seed": 99, "sample_index": 2}
    whole, logprobs = generate(driver, prompt, 30, slot=0, **how)
    rest, _ = generate(driver, prompt + whole[:12], 18, slot=5, num_generated=12, **how)
    assert rest == whole[12:]
    again, _ = generate(driver, prompt, 30, slot=0, chunk=9, **how)
    assert again == whole
    assert len(set(whole)) > 5
    assert max(logprobs) < 0


def check_half_precision(path, attention, dtype, tolerance):
    prompt = random_ids(40)
    driver = make_driver(path, dtype=dtype, attention=attention)
    ids, logprobs = generate(driver, prompt, 20)
    with torch.inference_mode():
        logits = reference_model(path)(torch.tensor([prompt + ids])).logits[0, 39:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["reference", "compiled"])
def test_logprobs_in_half_precision_are_close_to_fp32(checkpoint, attention):
    for dtype, tolerance in (("bfloat16", 0.5), ("float16", 0.1)):
        with named(dtype):
            check_half_precision(checkpoint("qwen3", tied=True), attention, dtype, tolerance)


def check_prompt_logprobs(path, mode):
    ids = random_ids(40)
    with torch.inference_mode():
        logits = reference_model(path)(torch.tensor([ids])).logits[0]
    if mode is not LogprobsMode.RAW:
        logits = logits / 0.7
    if mode is LogprobsMode.PROCESSED:
        logits[logits < logits.topk(200).values[:, -1:]] = -torch.inf
    expected = logits.log_softmax(-1)
    sampling = Sampling(
        temperature=0.7,
        top_k=200 if mode is LogprobsMode.PROCESSED else 0,
        logprobs_mode=mode,
    )
    driver = make_driver(path)
    driver.start(0, sampling)
    driver.start(1)
    other = random_ids(9, seed=1)
    got, top_ids, top = [], [], []
    for chunk in driver.chunks(0, ids, 13, 2):
        decode = [1] if chunk.start else []
        # A prompt that asks for no logprobs.
        extra = [] if chunk.start else [Enter(1, other)]
        result = driver.step(decode, [*extra, chunk])
        assert len(result.prompt_logprobs) == len(chunk.ids) - chunk.ends_prompt
        got.extend(result.prompt_logprobs)
        top_ids.extend(result.prompt_top_ids.tolist())
        top.extend(result.prompt_top_logprobs.tolist())
    chosen = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got), chosen, atol=1e-4, rtol=0)
    best = expected[:-1].topk(2)
    assert top_ids == best.indices.tolist()
    torch.testing.assert_close(torch.tensor(top), best.values, atol=1e-4, rtol=0)


def test_prompt_logprobs_do_not_depend_on_the_chunks(checkpoint):
    """There is one for each token after the first, in the mode of the sequence."""
    for mode in LogprobsMode:
        with named(mode):
            check_prompt_logprobs(checkpoint("llama", tied=True), mode)
