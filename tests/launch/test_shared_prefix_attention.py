"""Attention that reads a shared prefix once for a group of sequences changes no token."""

from __future__ import annotations

import pytest

from tokasaurus import LLM, SamplingParams
from tokasaurus.model.backend.reference import ReferenceAttention

pytestmark = pytest.mark.engine

HEADER = "Every dinosaur in this park has a name, a favourite food and a friend. "
PROMPTS = [HEADER + text for text in ("Once upon a time,", "A B C D A B C", "2 + 3 =")]


def generate(attention="reference", temperature=0.8, **flags):
    """The samples of prompts that begin together, when their header's pages are cached."""
    params = SamplingParams(n=4, temperature=temperature, max_tokens=12, seed=3, logprobs=0)
    with LLM(attention=attention, page_size=4, **flags) as llm:
        llm.generate(HEADER, SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [sample for output in outputs for sample in output.outputs]


def test_tokens_are_the_same_with_groups_and_without(monkeypatch):
    num_decodes, num_chunks = [], []
    attend_to_prefixes = ReferenceAttention._attend_to_prefixes

    def counting(self, *arguments):
        num_decodes.append(self._groups.num_decodes.sum())
        num_chunks.append(self._groups.num_chunks.sum())
        return attend_to_prefixes(self, *arguments)

    monkeypatch.setattr(ReferenceAttention, "_attend_to_prefixes", counting)
    plain = generate(use_hydragen=False)
    assert not any(num_decodes + num_chunks)
    grouped = generate(use_hydragen=True, hydragen_min_group_size=2, hydragen_min_prefix_len=8)
    assert sum(count > 0 for count in num_decodes) > 8
    assert max(num_chunks) == len(PROMPTS)
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
