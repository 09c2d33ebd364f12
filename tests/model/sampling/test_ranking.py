"""The beginning of a ranking, against a stable sort of the whole vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from rows import named

from tokasaurus.model.sampling import logit_rows, ranking
from tokasaurus.model.sampling.logit_rows import LogitRows
from tokasaurus.model.sampling.ranking import first_of, most_ranked, ranked, sorted_logits

# One block, a whole number of blocks, and a short last block of one token or more.
SIZES = (1, 64, 65, 640, 1281, 1407)


def random_logits(vocab_size: int, seed: int, num_rows: int = 12) -> torch.Tensor:
    """Most rows have ties; zeros have both signs, and some logits are infinite."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (num_rows, vocab_size))
    logits[::2] = logits[::2].round()
    logits[1] = 0
    logits[2, rng.random(vocab_size) < 0.5] = -np.inf
    logits[3] = -np.inf
    logits[4, -1] = logits[4].max() + 1
    logits *= rng.choice([-1, 1], (num_rows, 1))
    return torch.from_numpy(logits.astype(np.float32))


def check_rankings(vocab_size: int, seed: int) -> None:
    logits = random_logits(vocab_size, seed)
    rows = torch.tensor([3, 1, 1, 11, 0, 2, 4])
    for index in (None, rows):
        some = logits if index is None else logits[index]
        expected = some.sort(dim=-1, descending=True, stable=True)
        view = LogitRows(logits, index)
        assert torch.equal(first_of(view), expected.indices[:, 0])
        assert torch.equal(sorted_logits(some), expected.values)
        for depth in {1, 2, max(most_ranked(vocab_size), 1), vocab_size // 3 + 1, vocab_size}:
            values, ids = ranked(view, min(depth, vocab_size))
            with named(depth):
                assert torch.equal(values, expected.values[:, :depth])
                assert torch.equal(ids, expected.indices[:, :depth])


def test_rankings_are_those_of_a_stable_sort(monkeypatch):
    """Also where rows are looked at in parts."""
    for cached, small in ((logit_rows._CACHED, 4096), (1000, 0)):
        monkeypatch.setattr(logit_rows, "_CACHED", cached)
        monkeypatch.setattr(ranking, "_SMALL_VOCABULARY", small)
        for vocab_size in SIZES:
            for seed in range(5):
                with named((cached, vocab_size, seed)):
                    check_rankings(vocab_size, seed)


def test_rows_that_diverged_have_ids_too(monkeypatch):
    monkeypatch.setattr(ranking, "_SMALL_VOCABULARY", 0)
    logits = torch.full((3, 1300), torch.nan)
    logits[1, 5:] = 1
    logits[2] = torch.inf
    for ids in (first_of(LogitRows(logits))[:, None], ranked(LogitRows(logits), 10)[1]):
        assert 0 <= ids.min() <= ids.max() < 1300


def test_rows_are_read_where_they_lie():
    logits = torch.arange(12.0).view(4, 3)
    rows = LogitRows(logits, torch.tensor([3, 1]))
    assert (len(rows), rows.vocab_size) == (2, 3)
    assert rows.gather(torch.tensor([[2, 0], [1, 1]])).tolist() == [[11, 9], [4, 4]]
    last = rows.take(torch.tensor([1]))
    assert [(part, some.tolist()) for part, some in last.parts()] == [(slice(0, 1), [[3, 4, 5]])]
