"""The kernels of sampling in Triton, interpreted, against torch and the compiled CPU kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows import named
from sampling_driver import parameters, random_batch, sent

from tokasaurus.model.backend.base import DEFAULT_OPTIONS, DRAW
from tokasaurus.model.backend.cpu.sampling import CompiledSampling
from tokasaurus.model.backend.masking import mask_rows
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted
from tokasaurus.model.sampling import sampler
from tokasaurus.model.sampling.draws import plan_row_draws
from tokasaurus.model.sampling.kinds import plan_rows

pytestmark = pytest.mark.triton

# The interpreter widens bf16 correctly, and these kernels compute in fp32.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of one tile and of several, whole and short ones.
VOCABULARIES = [1, 7, 255, 256, 600]


@pytest.fixture
def kernels(monkeypatch):
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    found = TritonBackend.sampling(DEFAULT_OPTIONS)
    monkeypatch.setattr("tokasaurus.model.backend.triton.sampling._TILE", 256)
    return found


def draw(logits, chosen, kernels):
    return sent(plan_row_draws, chosen, logits.shape[1], kernels=kernels).draw(logits)


def draw_by_torch(logits, chosen):
    return sampler.draw(logits.float(), sent(plan_rows, chosen, logits.shape[1], draws=True))


def test_tokens_are_those_of_torch_and_of_the_cpu(kernels):
    compiled = CompiledSampling("auto")
    for number, vocab_size in enumerate(VOCABULARIES):
        for dtype in DTYPES if vocab_size == 600 else DTYPES[number % 3 :][:1]:
            logits, chosen = random_batch(24, vocab_size, seed=number)
            logits = logits.to(dtype)
            with named((vocab_size, dtype)):
                tokens = draw(logits, chosen, kernels).tolist()
                assert tokens == draw_by_torch(logits, chosen).tolist()
                assert tokens == draw(logits, chosen, compiled).tolist()


def test_tokens_of_a_large_vocabulary_are_those_of_torch(kernels, monkeypatch):
    monkeypatch.setattr("tokasaurus.model.backend.triton.sampling._TILE", 4096)
    for dtype in (torch.float32, torch.bfloat16):
        logits, chosen = random_batch(12, 40_001, seed=7)
        logits = logits.to(dtype)
        with named(dtype):
            expected = draw_by_torch(logits, chosen)
            assert draw(logits, chosen, kernels).tolist() == expected.tolist()


def test_bytes_of_draws_may_lie_anywhere(kernels):
    logits, chosen = random_batch(5, 300, seed=1)
    rows = sent(plan_row_draws, chosen, 300, kernels=kernels).rows.tensor
    expected = kernels.draw(logits, rows)
    room = torch.empty(rows.numel() + 3, dtype=torch.uint8)
    moved = room[3:].view(rows.shape)
    moved.copy_(rows)
    assert torch.equal(kernels.draw(logits, moved), expected)


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
                norms, higher = kernels.log_sums(logits, None, None)
                assert higher is None
                expected = logits.double().logsumexp(dim=-1)
                torch.testing.assert_close(norms.double(), expected, rtol=1e-7, atol=1e-7)


def test_rankings_are_sorted_by_score_and_id(kernels):
    for seed, vocab_size in enumerate(VOCABULARIES):
        logits, _ = random_batch(20, vocab_size, seed)
        logits[5] = torch.linspace(1, 1 + 1e-5, vocab_size)  # scores that the division rounds
        index = torch.tensor([5, 17, 3, 0, 19])
        for temperature in (None, torch.tensor([3.0, 0.7, 1.0, 2.0, 1.0])):
            scores = logits[index]
            if temperature is not None:
                scores = scores / temperature[:, None]
            for depth in {1, min(20, vocab_size), vocab_size}:
                best, ids = kernels.ranked(logits, index, temperature, depth)
                order = np.argsort(-scores.numpy(), axis=-1, kind="stable")[:, :depth]
                with named((vocab_size, temperature, depth)):
                    assert ids.tolist() == order.tolist()
                    assert torch.equal(best, scores.gather(1, ids))


def test_numbers_that_diverged_give_what_torch_gives(kernels):
    """Greedy and unfiltered rows the same token, filtered ones some token."""
    rows = [
        (broken, filters, temperature)
        for broken in (torch.nan, torch.inf, -torch.inf)
        for filters in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1})
        for temperature in (0, 0.7)
    ]
    chosen = parameters(len(rows), temperature=[row[2] for row in rows], seed=range(len(rows)))
    for number, (_, filters, _) in enumerate(rows):
        for name, value in filters.items():
            chosen[name][number] = value
    is_exact = torch.tensor([t == 0 or not filters for _, filters, t in rows])
    for place in (slice(None), slice(40, 41)):
        logits = torch.randn(len(rows), 600)
        for number, (broken, _, _) in enumerate(rows):
            logits[number, place] = broken
        with named(place):
            tokens = draw(logits, chosen, kernels)
            assert 0 <= tokens.min() <= tokens.max() < 600
            expected = draw_by_torch(logits, chosen)
            assert tokens[is_exact].tolist() == expected[is_exact].tolist()
            norms, _ = kernels.log_sums(logits, None, None)
            sums = logits.logsumexp(-1)
            torch.testing.assert_close(norms, sums, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_tokens_without_a_weight_are_never_drawn(kernels):
    """In a vocabulary that begins and ends with them; the others are drawn by their shares."""
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:307] = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.0]).log()
    draws = np.zeros(150, DRAW)
    draws["seed"] = np.arange(150)
    draws["temperature"], draws["top_p"], draws["log_min_p"] = 1, 1, -np.inf
    rows = torch.from_numpy(draws.view(np.uint8).reshape(150, -1))
    tokens = kernels.draw(logits.expand(150, -1), rows)
    counts = np.bincount(tokens - 300, minlength=7) / 150
    assert np.flatnonzero(counts).tolist() == [1, 3, 4]
    assert np.abs(counts[[1, 3, 4]] - np.array([0.5, 1, 0.25]) / 1.75).max() < 0.1


def test_no_rows_give_no_tokens(kernels):
    logits = torch.zeros(0, 300)
    assert kernels.draw(logits, torch.zeros(0, DRAW.itemsize, dtype=torch.uint8)).tolist() == []
    norms, higher = kernels.log_sums(logits, None, None, torch.zeros(0, dtype=torch.int64))
    assert len(norms) == len(higher) == 0


def test_masks_leave_what_the_definition_leaves(kernels):
    """Of some rows and of all, also where adjustments forbid every allowed token."""
    for vocab_size in VOCABULARIES:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(vocab_size)
            logits = torch.randn(6, vocab_size, generator=generator).to(dtype)
            adjusted = logits + 1
            adjusted[2] = adjusted[4] = -torch.inf
            bits = torch.randint(0, 256, (6, -(-vocab_size // 8)), generator=generator)
            bits = bits.to(torch.uint8)
            bits[3] = 0  # nothing at all is allowed
            for rows in ([0, 1, 2, 3, 4, 5], [4], [1, 2, 5], []):
                index = torch.tensor(rows, dtype=torch.int64)
                for values in (adjusted, logits):
                    before = values.clone()
                    arguments = values, logits, index, bits[: len(rows)]
                    with named((vocab_size, dtype, rows)):
                        found = kernels.mask(*arguments)
                        assert torch.equal(found, mask_rows(*arguments))
                        assert torch.equal(values, before)
