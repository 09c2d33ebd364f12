"""Logits are made for chosen rows only, and in parts of a bounded size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokasaurus.model.sampling import drawing
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.drawing import draw_tokens, plan_draws, plan_scores, score_prompts
from tokasaurus.model.sampling.history import History
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.upload import Staging

VOCAB_SIZE, HIDDEN_SIZE, NUM_ROWS = 5000, 8, 40
CPU = torch.device("cpu")


class CountingModel:
    """Counts the rows of each call. Its logits are exact in every batch.

    Products of small whole numbers do not round, and the added fractions make all logits differ.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self):
        self.num_rows = []
        self._weight = torch.randint(-3, 4, (VOCAB_SIZE, HIDDEN_SIZE)).float()

    def logits(self, hidden):
        self.num_rows.append(len(hidden))
        return hidden @ self._weight.T + torch.arange(VOCAB_SIZE) / 8192


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CountingModel()


def make_hidden():
    return torch.randint(-3, 4, (NUM_ROWS, HIDDEN_SIZE)).float()


def make_parameters(num_rows):
    """All kinds of logprobs, seeds of their own, and a filter."""
    asked = SamplingParameters.neutral(num_rows)
    asked["num_logprobs"][:] = np.arange(num_rows) % 4 - 1
    asked["logprobs_mode"][:] = np.arange(num_rows) % 3
    asked["temperature"][:] = 0.7
    asked["top_k"][:] = 50
    asked["seed"][:] = np.arange(num_rows)
    return asked


def draw_and_score(model, hidden, sampled, scored):
    """Every tensor that comes out when these rows draw, and those are scored."""
    adjustments = AdjustmentTable(NUM_ROWS, VOCAB_SIZE, History(NUM_ROWS, 1, 1, CPU), CPU)
    staging = Staging(CPU)
    slots = np.arange(len(sampled), dtype=np.int32)
    drawing_rows = plan_draws(
        staging.add_indices(np.array(sampled, np.int32)),
        slots,
        staging.add_indices(slots),
        make_parameters(len(sampled)),
        adjustments,
        VOCAB_SIZE,
        staging,
    )
    prompt_rows = plan_scores(
        np.array(scored),
        np.arange(len(scored), dtype=np.int32) * 100,
        make_parameters(len(scored)),
        VOCAB_SIZE,
        staging,
    )
    staging.send()
    tokens, logprobs = draw_tokens(model, hidden, drawing_rows, None)
    prompt = score_prompts(model, hidden, prompt_rows)
    return [tokens, *vars(logprobs).values(), *vars(prompt).values()]


def test_only_the_given_rows_get_logits(model):
    hidden = make_hidden()
    tokens, *_ = draw_and_score(model, hidden, [7, 7, 31], [4, 5])
    assert model.num_rows == [3, 2]
    hidden[[row for row in range(NUM_ROWS) if row not in (4, 5, 7, 31)]] = torch.nan
    again, *_ = draw_and_score(model, hidden, [7, 7, 31], [4, 5])
    assert torch.equal(tokens, again)


def test_parts_fill_the_tiles_of_a_product(monkeypatch):
    monkeypatch.setattr(drawing, "_MAX_LOGITS", 1 << 25)
    for vocab_size, sizes in ((128_256, [256, 256, 88]), (100, [600]), (1 << 18, [128] * 4 + [88])):
        assert [part.stop - part.start for part in drawing._parts(600, vocab_size)] == sizes


def test_parts_are_bounded_and_change_no_number(model, monkeypatch):
    hidden, rows = make_hidden(), list(range(NUM_ROWS))
    whole = draw_and_score(model, hidden, rows, rows)
    assert model.num_rows == [NUM_ROWS, NUM_ROWS]
    model.num_rows.clear()
    monkeypatch.setattr(drawing, "_MAX_LOGITS", 7 * VOCAB_SIZE + 1)
    parts = draw_and_score(model, hidden, rows, rows)
    assert model.num_rows == [7, 7, 7, 7, 7, 5] * 2
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
