"""Penalties, masks and biases in the whole embedded engine, under conditions that might lose them.

The cache is small, preemption is forced, prompts come in chunks, prefixes are found in the cache,
samples fork, and several batches are in flight. Still each token must be the one that plain Python
computes from transformers' logits.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from unittest import mock

import pytest
import torch
from adjustment_oracle import adjusted_logits
from checkpoints import EOS_ID, make_checkpoint
from oracle import TIE, reference_logits

from tokasaurus import LLM, SamplingParams
from tokasaurus.launch import llm as llm_module
from tokasaurus.launch.embedded import EmbeddedEngine
from tokasaurus.protocol.messages import Adjustments, LogprobsMode

pytestmark = pytest.mark.engine

ASKED = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0, "frequency_penalty": -0.3},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8, "bad_words": ["a", "bc"]},
    {"logit_bias": {"70": 6.5, 71: -100}, "repetition_penalty": 1.2},
    {"bad_words": [chr(i) + chr(j) for i in range(97, 107) for j in range(97, 107)]},
    {"min_tokens": 25, "logit_bias": {EOS_ID: 30}},
    {"min_tokens": 25, "ignore_eos": True, "stop_token_ids": [70, 71], "logit_bias": {70: 9}},
    {},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adjusted")
    return make_checkpoint(directory, "llama", seed=5, num_heads=4, num_kv_heads=2, tied=True)


@pytest.fixture(scope="module")
def llm(model):
    """Preempts with and without need, and has four batches in flight."""
    four_ahead = partial(EmbeddedEngine, steps_ahead=4)
    with mock.patch.object(llm_module, "EmbeddedEngine", four_ahead):
        engine = LLM(
            model,
            dtype="float32",
            page_size=4,
            kv_cache_num_tokens=640,
            max_num_tokens_per_request=192,
            max_tokens_per_forward=48,
            max_seqs_per_forward=12,
            bump_city_population_me=True,
            allocator_sanity_checks=True,
        )
    with engine:
        yield engine


def adjustments_by_hand(params, llm):
    encode = llm.get_tokenizer().encode_fragment
    words = [word for text in params.bad_words or () for word in (encode(text), encode(" " + text))]
    stops = {EOS_ID, *(params.stop_token_ids or ())}
    return Adjustments(
        bad_words=tuple(tuple(word) for word in words),
        min_tokens=params.min_tokens,
        late_ids=tuple(stops),
        bias=tuple((params.logit_bias or {}).items()),
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
    )


def prompts():
    base = [30 + i % 40 for i in range(90)]
    return [base[:60], base[:60], [*base[:40], 90, 91], base, base[:3]]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "-".join(asked) or "nothing")
def test_greedy_tokens_are_those_of_the_oracle(llm, model, asked):
    """One kind of adjustment at a time, beside requests without any."""
    params = SamplingParams(
        **{"max_tokens": 36, "temperature": 0.0, "ignore_eos": "min_tokens" not in asked, **asked},
        logprobs=0,
        logprobs_mode="processed",
        n=2,
    )
    plain = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True, seed=1)
    given = prompts()
    before = llm.num_preemptions
    outputs = llm.generate([*given, *given], [params] * 5 + [plain] * 5, use_tqdm=False)
    assert llm.num_preemptions > before
    assert max(output.num_cached_tokens for output in outputs) > 0
    adjustments = adjustments_by_hand(params, llm)
    for output in outputs[:5]:
        prompt = list(output.prompt_token_ids)
        assert output.outputs[0].token_ids == output.outputs[1].token_ids
        sample = output.outputs[0]
        ids = list(sample.token_ids)
        logits = reference_logits(model, prompt, ids)
        rows = [
            adjusted_logits(row, adjustments, prompt, ids[:position])
            for position, row in enumerate(logits.double().tolist())
        ]
        expected = torch.tensor(rows, dtype=torch.float32)
        chosen = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (expected.amax(1) - chosen).max() <= 4 * TIE
        logprobs = [e[i].logprob for e, i in zip(sample.logprobs, ids, strict=True)]
        torch.testing.assert_close(
            torch.tensor(logprobs), chosen - expected.logsumexp(1), atol=1e-4, rtol=0
        )
        assert len(ids) >= params.min_tokens
        if "stop_token_ids" in asked or EOS_ID in (params.logit_bias or {}):
            assert (len(ids), sample.finish_reason) == (params.min_tokens + 1, "stop")
            assert sample.text == llm.get_tokenizer().decode(ids[:-1])
        elif asked:
            plain_ids = llm.generate(
                [prompt], dataclasses.replace(params, **CLEARED), use_tqdm=False
            )
            assert plain_ids[0].outputs[0].token_ids != ids


CLEARED = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "bad_words": None,
}


def test_a_seed_draws_the_same_alone_and_among_others(llm, model):
    """With preemption and without, beside any other requests."""
    params = [
        SamplingParams(
            **{"max_tokens": 30, "ignore_eos": True, **asked}, n=3, seed=7 + number, top_k=30
        )
        for number, asked in enumerate(ASKED)
    ]
    given = [prompts()[number % 5] for number in range(len(ASKED))]
    among = llm.generate(given, params, use_tqdm=False)
    with LLM(model, dtype="float32", max_tokens_per_forward=256) as calm:
        for number, output in enumerate(among):
            alone = calm.generate([given[number]], params[number], use_tqdm=False)[0]
            for one, other in zip(alone.outputs, output.outputs, strict=True):
                assert one.token_ids == other.token_ids
        assert calm.num_preemptions == 0
    distinct = {tuple(sample.token_ids) for output in among for sample in output.outputs}
    assert len(distinct) > 2 * len(ASKED)


def test_raw_logprobs_are_the_models_own(llm, model):
    params = SamplingParams(
        **ASKED[3],
        temperature=0.7,
        max_tokens=20,
        ignore_eos=True,
        logprobs=0,
        seed=1,
        logprobs_mode=LogprobsMode.RAW,
    )
    sample = llm.generate([prompts()[0]], params, use_tqdm=False)[0].outputs[0]
    ids = list(sample.token_ids)
    logits = reference_logits(model, prompts()[0], ids)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    got = torch.tensor([e[i].logprob for e, i in zip(sample.logprobs, ids, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_bad_words_never_come(llm):
    """Their parts may come in other words."""
    params = SamplingParams(
        temperature=1.5,
        n=8,
        seed=3,
        max_tokens=60,
        ignore_eos=True,
        logit_bias={64: 8, 65: 8, 66: 8},
    )
    free = llm.generate("go", params, use_tqdm=False)[0].outputs
    words = ["ab", "ba", "aa"]
    tokens = [llm.get_tokenizer().token_text(i) for i in (64, 65, 66)]
    assert tokens == ["a", "b", "c"]
    assert all(any(word in sample.text for sample in free) for word in words)
    bound = llm.generate("go", dataclasses.replace(params, bad_words=words), use_tqdm=False)[
        0
    ].outputs
    assert not any(word in sample.text for sample in bound for word in words)
    assert any("bb" in sample.text for sample in bound)
