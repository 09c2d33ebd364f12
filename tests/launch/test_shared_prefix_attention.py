"""Attention that reads a shared prefix once for a group of sequences changes no token."""

from __future__ import annotations

import pytest

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.backend.reference import ReferenceAttention

pytestmark = pytest.mark.engine

HEADER = "Every dinosaur in this park has a name, a favourite food and a friend. "
PROMPTS = [HEADER + text for text in ("Once upon a time,", "A B C D A B C", "2 + 3 =")]


def generate(attention="reference", temperature=0.8, **flags):
    params = SamplingParams(n=4, temperature=temperature, max_tokens=12, seed=3, logprobs=0)
    with LLM(attention=attention, page_size=4, **flags) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [sample for output in outputs for sample in output.outputs]


def test_tokens_are_the_same_with_groups_and_without(monkeypatch):
    num_grouped_batches = 0
    attend_in_groups = ReferenceAttention._attend_in_groups

    def counting(self, *arguments):
        nonlocal num_grouped_batches
        num_grouped_batches += 1
        return attend_in_groups(self, *arguments)

    monkeypatch.setattr(ReferenceAttention, "_attend_in_groups", counting)
    plain = generate(use_hydragen=False)
    assert num_grouped_batches == 0
    grouped = generate(use_hydragen=True, hydragen_min_group_size=2, hydragen_min_prefix_len=8)
    assert num_grouped_batches > 8
    for one, other in zip(plain, grouped, strict=True):
        assert one.token_ids == other.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, rel=1e-4)


def test_greedy_tokens_of_the_compiled_kernel_are_the_same_with_groups_and_without():
    group = {"hydragen_min_group_size": 2, "hydragen_min_prefix_len": 8}
    plain, grouped, chosen = (
        generate("compiled", 0.0, use_hydragen=use, **group) for use in (False, True, None)
    )
    for one, other, third in zip(plain, grouped, chosen, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, rel=1e-4)
