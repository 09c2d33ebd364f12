"""A request gets the same bits whatever runs beside it.

The long test, `make test-determinism`, prints its seeds. COMPOSITIONS_SEED=7 repeats another one.
"""

from __future__ import annotations

import os
import random

import pytest
from checkpoints import make_checkpoint
from compositions import Engine, Setting, composition, differences, random_requests

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.instruction_sets import usable_sets

SETS = [instructions.name for instructions in usable_sets()]
DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Returns the directory of a tiny model with long contexts."""
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = make_checkpoint(
                tmp_path_factory.mktemp(architecture), architecture, max_position_embeddings=4096
            )
        return made[architecture]

    return get


def check_compositions(path, seed, instruction_set, dtype, *, engines, rounds, requests, longest):
    """Compares requests among others, in several engines, with what they get alone in another."""
    chance = random.Random(seed)
    asked = random_requests(seed, requests, longest=longest)
    base = Engine(path, Setting(instruction_set, dtype))
    alone = [base.alone(request) for request in asked]
    assert all(answer.reasons for answer in alone)
    failures = []
    for _ in range(engines):
        setting = Setting.random(chance, instruction_set, dtype)
        engine = Engine(path, setting)
        if dtype == "float16":
            # Products of PyTorch: their tiles, and so their bits, may differ between settings.
            alone = [engine.alone(request) for request in asked]
        for _ in range(rounds):
            chosen, arrivals, aborts = composition(chance, len(asked))
            answers = engine.run([asked[number] for number in chosen], arrivals, aborts)
            for number, answer, abort in zip(chosen, answers, aborts, strict=True):
                if abort is None:
                    found = differences(alone[number], answer)
                    failures += [f"{setting}: request {number}: {each}" for each in found]
    assert not failures, f"seed {seed}:\n" + "\n".join(failures[:20])


def test_requests_get_the_same_bits_alone_and_beside_others(checkpoint_of):
    """A small sample of the long test, with the best instruction set."""
    for seed, dtype in enumerate(DTYPES):
        check_compositions(
            checkpoint_of("llama"),
            seed,
            "auto",
            dtype,
            engines=2,
            rounds=3,
            requests=6,
            longest=300,
        )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_many_compositions(checkpoint_of, instruction_set, dtype):
    """160 compositions each: 2,400 on a processor with five instruction sets."""
    seed = int(os.environ.get("COMPOSITIONS_SEED", "1"))
    for number, architecture in enumerate(ARCHITECTURES):
        own = 1000 * seed + number
        print(f"{instruction_set}, {dtype}, {architecture}: seed {own}")
        check_compositions(
            checkpoint_of(architecture),
            own,
            instruction_set,
            dtype,
            engines=6,
            rounds=9,
            requests=40,
            longest=1000,
        )


@pytest.mark.engine
def test_prompts_get_the_same_bits_alone_and_together():
    """Through ``LLM``, with the bundled model: prefixes in the cache, forks, preemptions."""
    header = "Every dinosaur in this park has a name, a favourite food and a friend. " * 3
    prompts = [header + text for text in ("Once upon a time,", "A B C D", "2 + 3 =")] + ["Hello"]
    params = SamplingParams(n=2, max_tokens=12, seed=3, logprobs=2, prompt_logprobs=1)

    def parts(output):
        samples = [(each.token_ids, each.logprobs) for each in output.outputs]
        return samples, output.prompt_logprobs

    with LLM(deterministic=True) as llm:
        alone = []
        for prompt in prompts:
            llm.reset_prefix_cache()
            alone += llm.generate(prompt, params, use_tqdm=False)
    flags = {"page_size": 7, "bump_city_population_me": True, "max_tokens_per_forward": 96}
    with LLM(deterministic=True, use_hydragen=True, **flags) as llm:
        together = llm.generate(prompts * 2, params, use_tqdm=False)
    for one, other in zip(alone * 2, together, strict=True):
        assert parts(one) == parts(other), one.prompt
