"""What preparation refuses, and what it decides for the client."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engine import CONFIG, PREPARER, TOKENIZER, VOCAB_SIZE, with_config
from rows import each_row

from tokasaurus.errors import RequestError, RequestTooLong
from tokasaurus.protocol.messages import LogprobsMode
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import Preparer

PROMPT = [10, 11, 12]


def test_missing_parameters_come_from_the_generation_config():
    config = with_config(
        sampling_defaults={"temperature": 0.6, "top_p": 0.8, "top_k": 5, "min_p": 0.2},
        logprobs_mode=LogprobsMode.RAW,
    )
    preparer = Preparer(config, TOKENIZER)
    first = preparer.prepare(PROMPT, SamplingParams()).sampling
    off = SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=0)
    second = preparer.prepare(PROMPT, off).sampling
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.6, 0.8, 5, 0.2)
    assert first.logprobs_mode == LogprobsMode.RAW
    assert (second.temperature, second.top_p, second.top_k, second.min_p) == (0, 1, 0, 0)


def test_requests_without_a_seed_get_different_seeds():
    seeds = {PREPARER.prepare(PROMPT, SamplingParams()).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_minus_one_is_no_seed_and_other_negative_seeds_are_seeds():
    def seed_of(seed):
        return PREPARER.prepare(PROMPT, SamplingParams(seed=seed)).seed

    assert len({seed_of(-1) for _ in range(20)}) == 20
    negative = [-2, -3, -1234, -(1 << 63)]
    assert [seed_of(seed) for seed in negative] == [seed_of(seed) for seed in negative]
    assert len({seed_of(seed) for seed in negative}) == len(negative)
    assert all(0 <= seed_of(seed) < 2**63 for seed in negative)
    assert [seed_of(seed) for seed in (0, 7, (1 << 63) - 1)] == [0, 7, (1 << 63) - 1]


def test_tiny_numbers_leave_the_likeliest_token():
    """Of a request and of the generation config."""
    for temperature in (0, 1e-300, 1e-8, 0.99e-5):
        for preparer, params in (
            (PREPARER, SamplingParams(temperature=temperature)),
            (
                Preparer(with_config(sampling_defaults={"temperature": temperature}), TOKENIZER),
                SamplingParams(),
            ),
        ):
            assert preparer.prepare(PROMPT, params).sampling.temperature == 0
    assert PREPARER.prepare(PROMPT, SamplingParams(temperature=1e-5)).sampling.temperature == 1e-5
    for top_p in (0, 1e-300):
        for preparer, params in (
            (PREPARER, SamplingParams(top_p=top_p)),
            (
                Preparer(with_config(sampling_defaults={"top_p": top_p}), TOKENIZER),
                SamplingParams(),
            ),
        ):
            assert np.float32(preparer.prepare(PROMPT, params).sampling.top_p) > 0
    assert PREPARER.prepare(PROMPT, SamplingParams(top_p=0.5)).sampling.top_p == 0.5


def test_top_k_as_large_as_the_vocabulary_is_off():
    assert PREPARER.prepare(PROMPT, SamplingParams(top_k=VOCAB_SIZE)).sampling.top_k == 0


def test_a_request_without_max_tokens_gets_the_rest_of_the_context():
    prepared = PREPARER.prepare(PROMPT, SamplingParams(max_tokens=None))
    assert prepared.max_tokens == CONFIG.max_request_tokens - len(PROMPT)


@each_row(
    "prompt, params, kind, field",
    [
        ([], {}, RequestError, "prompt"),
        ([VOCAB_SIZE], {}, RequestError, "prompt"),
        ([-1], {}, RequestError, "prompt"),
        ([2**63], {}, RequestError, "prompt"),
        ([1.5], {}, RequestError, "prompt"),
        ([1] * 512, {}, RequestTooLong, "prompt"),
        ([1] * 500, {"max_tokens": 13}, RequestTooLong, "max_tokens"),
        ([1], {"logprobs": 21}, RequestError, "logprobs"),
        ([1], {"prompt_logprobs": 21}, RequestError, "prompt_logprobs"),
    ],
)
def test_a_request_that_cannot_run_is_refused_by_field(prompt, params, kind, field):
    with pytest.raises(kind) as error:
        PREPARER.prepare(prompt, SamplingParams(**params))
    assert error.value.field == field
    assert error.value.message.startswith(field)


def test_refusals_tell_the_numbers_and_the_limits():
    with pytest.raises(RequestTooLong, match=r"13.*500.*512.*12"):
        PREPARER.prepare([1] * 500, SamplingParams(max_tokens=13))
    with pytest.raises(RequestError, match="max_topk_logprobs=20"):
        PREPARER.prepare([1], SamplingParams(logprobs=21))
