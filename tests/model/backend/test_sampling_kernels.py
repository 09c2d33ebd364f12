"""The kernels of sampling against the sampler in torch, in every usable instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows import named
from sampling_driver import logprobs_of, parameters, random_batch, sent

from tokasaurus.model.backend.base import DRAW
from tokasaurus.model.backend.cpu import sampling
from tokasaurus.model.backend.cpu.sampling import CompiledSampling
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.model.sampling import sampler
from tokasaurus.model.sampling.draws import plan_row_draws
from tokasaurus.model.sampling.kinds import plan_rows
from tokasaurus.model.sampling.logprobs import logprobs_of as logprobs_by_plan
from tokasaurus.model.sampling.logprobs import plan_logprobs

SETS = [instructions.name for instructions in usable_sets()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With one block and several, whole and short ones, small ones and some that top_p looks into first.
VOCABULARIES = [1, 7, 255, 256, 300, 1025, 9000, 40_001]


@pytest.fixture(params=SETS)
def kernels(request):
    return CompiledSampling(request.param)


def draw(logits, chosen, kernels):
    return sent(plan_row_draws, chosen, logits.shape[1], kernels=kernels).draw(logits)


def draw_by_torch(logits, chosen):
    return sampler.draw(logits.float(), sent(plan_rows, chosen, logits.shape[1], draws=True))


def test_tokens_are_those_of_torch(kernels):
    for number, vocab_size in enumerate(VOCABULARIES):
        for dtype in DTYPES:
            logits, chosen = random_batch(60, vocab_size, seed=number)
            logits = logits.to(dtype)
            with named((vocab_size, dtype)):
                expected = draw_by_torch(logits, chosen)
                assert draw(logits, chosen, kernels).tolist() == expected.tolist()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_program_changes_nothing(kernels, default):
    """Results have four bytes for each number, whatever torch makes where no dtype is named."""
    logits = torch.randn(3, 300)
    norms, _ = kernels.log_sums(logits, None, None)
    scores, ids = kernels.ranked(logits, None, None, 5)
    torch.set_default_dtype(default)
    try:
        others, _ = kernels.log_sums(logits, None, None)
        other_scores, other_ids = kernels.ranked(logits, None, None, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(others, norms)
    assert torch.equal(other_scores, scores)
    assert torch.equal(other_ids, ids)


def test_a_row_depends_on_nothing_beside_it(kernels, monkeypatch):
    """Neither on other rows, nor on its place, nor on the number of threads."""
    for vocab_size in (500, 9000):
        logits, chosen = random_batch(40, vocab_size, seed=2)
        monkeypatch.setattr(sampling, "_LOGITS_PER_THREAD", 1 << 40)
        together = draw(logits, chosen, kernels)
        norms, _ = kernels.log_sums(logits, None, None)
        for row in range(40):
            one = draw(logits[row : row + 1], chosen.take(slice(row, row + 1)), kernels)
            assert one == together[row], (vocab_size, row)
        monkeypatch.setattr(sampling, "_LOGITS_PER_THREAD", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        order = torch.randperm(40)
        shuffled = draw(logits[order], chosen.take(order.numpy()), kernels)
        assert torch.equal(shuffled, together[order]), vocab_size
        assert torch.equal(kernels.log_sums(logits, order, None)[0], norms[order]), vocab_size


def test_every_instruction_set_gets_the_same_bits():
    logits = torch.randn(30, 9001) * 4
    temperature = torch.rand(30) + 0.5
    first, *others = (
        CompiledSampling(name).log_sums(logits, None, temperature)[0] for name in SETS
    )
    for name, norms in zip(SETS[1:], others, strict=True):
        assert torch.equal(norms, first), name


def test_sums_and_counts_are_exact(kernels):
    for vocab_size in VOCABULARIES:
        for dtype in DTYPES:
            logits, _ = random_batch(20, vocab_size, seed=1)
            logits = logits.to(dtype)
            index = torch.tensor([3, 17, 3, 0])
            temperature = torch.tensor([1.0, 0.7, 2.0, 0.1])
            ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
            scores = logits[index].float() / temperature[:, None]
            picked = scores.gather(1, ids[:, None])
            norms, higher = kernels.log_sums(logits, index, temperature, ids)
            with named((vocab_size, dtype)):
                expected = scores.double().logsumexp(dim=-1)
                torch.testing.assert_close(norms.double(), expected, rtol=1e-7, atol=1e-7)
                assert torch.equal(higher, (scores > picked).sum(dim=-1))


def test_rankings_are_sorted_by_score_and_id(kernels):
    for seed, vocab_size in enumerate(VOCABULARIES):
        logits, _ = random_batch(20, vocab_size, seed)
        logits[5] = torch.linspace(1, 1 + 1e-5, vocab_size)  # scores that the division rounds
        index = torch.tensor([5, 17, 3, 0, 19])
        for temperature in (None, torch.tensor([3.0, 0.7, 1.0, 2.0, 1.0])):
            scores = logits[index]
            if temperature is not None:
                scores = scores / temperature[:, None]
            for depth in {1, min(20, vocab_size), min(400, vocab_size)}:
                best, ids = kernels.ranked(logits, index, temperature, depth)
                order = np.argsort(-scores.numpy(), axis=-1, kind="stable")[:, :depth]
                with named((vocab_size, temperature, depth)):
                    assert ids.tolist() == order.tolist()
                    assert torch.equal(best, scores.gather(1, ids))


def test_logprobs_are_those_of_torch(kernels):
    """Of every mode, for rows that ask for none to five top tokens, from half precision too."""
    for dtype in DTYPES:
        for modes in ([0], [1], [0, 1, 2]):
            logits, chosen = random_batch(60, 9000, seed=4)
            logits = logits.to(dtype)
            chosen["logprobs_mode"][:] = np.resize(modes, 60)
            tokens = draw(logits, chosen, kernels)
            expected = logprobs_of(logits.float(), tokens, chosen, 5, with_ranks=True)
            plan = sent(plan_logprobs, chosen, 9000, kernels=kernels)
            result = logprobs_by_plan(logits, tokens, plan, 5, with_ranks=True)
            with named((dtype, modes)):
                for name, value in vars(expected).items():
                    other = getattr(result, name)
                    torch.testing.assert_close(
                        other, value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name
                    )


def test_numbers_that_diverged_give_what_torch_gives(kernels):
    """Greedy and unfiltered rows the same token, filtered ones some token."""
    rows = [
        (broken, filters, temperature)
        for broken in (torch.nan, torch.inf, -torch.inf)
        for filters in ({}, {"top_k": 5}, {"top_k": 400}, {"top_p": 0.9}, {"min_p": 0.1})
        for temperature in (0, 1, 0.7)
    ]
    chosen = parameters(len(rows), temperature=[row[2] for row in rows], seed=range(len(rows)))
    for number, (_, filters, _) in enumerate(rows):
        for name, value in filters.items():
            chosen[name][number] = value
    is_exact = torch.tensor([t == 0 or not filters for _, filters, t in rows])
    for vocab_size in (50, 5000):
        for place in (slice(None), slice(40, 41)):
            logits = torch.randn(len(rows), vocab_size)
            for number, (broken, _, _) in enumerate(rows):
                logits[number, place] = broken
            with named((vocab_size, place)):
                tokens = draw(logits, chosen, kernels)
                assert 0 <= tokens.min() <= tokens.max() < vocab_size
                expected = draw_by_torch(logits, chosen)
                assert tokens[is_exact].tolist() == expected[is_exact].tolist()
                norms, _ = kernels.log_sums(logits, None, None)
                sums = logits.logsumexp(-1)
                torch.testing.assert_close(norms, sums, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_tokens_without_a_weight_are_never_drawn(kernels):
    """In a vocabulary that begins and ends with them; the others are drawn by their shares."""
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 1500:1507] = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.0]).log()
    draws = np.zeros(2000, DRAW)
    draws["seed"] = np.arange(2000)
    draws["temperature"], draws["top_p"], draws["log_min_p"] = 1, 1, -np.inf
    rows = torch.from_numpy(draws.view(np.uint8).reshape(2000, -1))
    tokens = kernels.draw(logits.expand(2000, -1), rows)
    counts = np.bincount(tokens - 1500, minlength=7) / 2000
    assert np.flatnonzero(counts).tolist() == [1, 3, 4]
    assert np.abs(counts[[1, 3, 4]] - np.array([0.5, 1, 0.25]) / 1.75).max() < 0.05
