"""The whole embedded engine generates what transformers generates.

Every case compares greedy tokens and logprobs in fp32. Tokens may differ only where the reference's
two best logits tie, logprobs by 1e-4. Cases differ in architecture, page size, chunking, prefix
hits and preemption.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from oracle import assert_greedy, reference_generate

from tokasaurus import LLM, SamplingParams

pytestmark = pytest.mark.engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)


@dataclass(frozen=True)
class Variant:
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.architecture, *(f"{k}={v}" for k, v in self.options.items())])


VARIANTS = [
    Variant("llama", {"num_heads": 4, "num_kv_heads": 2, "tied": True}),
    Variant("llama", {"num_heads": 3, "num_kv_heads": 1, "tied": False, "shards": 3}),
    Variant("llama", {"num_heads": 4, "num_kv_heads": 4, "tied": False, "rope": "llama3"}),
    Variant("qwen2", {"num_heads": 4, "num_kv_heads": 2, "tied": True, "shards": 2}),
    Variant("qwen2", {"num_heads": 5, "num_kv_heads": 5, "tied": False}),
    Variant("qwen3", {"num_heads": 4, "num_kv_heads": 2, "tied": True}),
    Variant("qwen3", {"num_heads": 9, "num_kv_heads": 3, "tied": False, "shards": 2}),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(variant: Variant) -> Path:
        if str(variant) not in made:
            directory = tmp_path_factory.mktemp(variant.architecture)
            make_checkpoint(directory, variant.architecture, seed=1, **variant.options)
            made[str(variant)] = directory
        return made[str(variant)]

    return get


def random_prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(10, 200) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


def check(path: Path, outputs: list[Any]) -> None:
    for output in outputs:
        sample = output.outputs[0]
        logprobs = [
            entry[token].logprob
            for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)
        ]
        assert len(sample.token_ids) == GREEDY.max_tokens
        assert_greedy(path, list(output.prompt_token_ids), list(sample.token_ids), logprobs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_greedy_tokens_alone_and_among_64_prompts(checkpoint, variant):
    path = checkpoint(variant)
    prompts = random_prompts(64)
    with LLM(path, dtype="float32", max_tokens_per_forward=96, max_seqs_per_forward=48) as llm:
        alone = llm.generate([prompts[0]], GREEDY, use_tqdm=False)
        expected = reference_generate(path, prompts[0], GREEDY.max_tokens)
        assert list(alone[0].outputs[0].token_ids) == expected
        among = llm.generate(prompts, GREEDY, use_tqdm=False)
    check(path, alone + among)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_with_chunks_prefix_hits_and_preemptions(checkpoint, architecture, page_size):
    """A small cache, small batches and forced preemption; prompts share prefixes in many ways."""
    path = checkpoint(Variant(architecture, {"num_heads": 4, "num_kv_heads": 2, "tied": True}))
    base = [30 + i % 150 for i in range(192)]
    prompts = [
        base[:128],
        base[:128],
        base[:129],
        base[:127],
        [*base[:64], 11, 12, 13],
        base,
        base[:7],
    ]
    with LLM(
        path,
        dtype="float32",
        page_size=page_size,
        kv_cache_num_tokens=640,
        max_num_tokens_per_request=320,
        max_tokens_per_forward=48,
        max_seqs_per_forward=6,
        bump_city_population_me=True,
        allocator_sanity_checks=True,
    ) as llm:
        first = llm.generate(prompts[:1], GREEDY, use_tqdm=False)
        rest = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.num_preemptions > 0
    check(path, first + rest)
    hits = [output.num_cached_tokens for output in rest]
    # The whole prompt was cached, but its last token must run.
    assert hits[0] == 127 // page_size * page_size
    # The cached part ends with a page, and the next token begins one.
    assert hits[2] == 128 // page_size * page_size
    # A part of the prompt was cached.
    assert hits[4] == 64 // page_size * page_size


def test_a_seed_gives_the_same_tokens_alone_and_among_others(checkpoint):
    path = checkpoint(VARIANTS[0])
    prompts = random_prompts(64, seed=3)
    params = [
        SamplingParams(
            temperature=(0.7, 1.0, 1.3)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20, 3)[i % 3],
            seed=i,
            max_tokens=30,
            n=1 + i % 3,
            ignore_eos=True,
        )
        for i in range(64)
    ]
    with LLM(path, dtype="float32", max_tokens_per_forward=80, max_seqs_per_forward=40) as llm:
        among = llm.generate(prompts, params, use_tqdm=False)
        for i in (0, 17, 40, 63):
            alone = llm.generate([prompts[i]], params[i], use_tqdm=False)[0]
            for one, other in zip(alone.outputs, among[i].outputs, strict=True):
                assert one.token_ids == other.token_ids
    texts = {tuple(sample.token_ids) for output in among for sample in output.outputs}
    assert len(texts) > 100  # different seeds and samples give different tokens
