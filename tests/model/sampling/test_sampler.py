"""The sampler against a row-by-row oracle and exact probabilities, alone and in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows import named
from sampling_driver import draw, logprobs_of, parameters, processed, sent

from tokasaurus.model.sampling import logit_rows, sampler
from tokasaurus.model.sampling.kinds import Kind, plan_rows
from tokasaurus.model.sampling.randomness import uniforms
from tokasaurus.protocol.messages import LogprobsMode


def ranking(logits):
    """Ids, best first; equal logits by id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def kept_by_oracle(logits, temperature, top_k, top_p, min_p):
    """The ids that the filters keep, one filter after the other, in float64."""
    scores = [x / (temperature or 1) for x in logits]
    weights = np.exp(np.array(scores) - max(scores)).tolist()
    left = ranking(logits)
    if top_k > 0:
        left = left[:top_k]
    total = sum(weights[i] for i in left)
    nucleus, held = [], 0.0
    for i in left:
        if top_p < 1 and held >= top_p * total:
            break
        nucleus.append(i)
        held += weights[i]
    best = weights[nucleus[0]]
    return {i for i in nucleus if weights[i] >= min_p * best}


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


def check_filters(vocab_size):
    """All combinations in one batch."""
    rng = np.random.default_rng(vocab_size)
    rows = [(f, t) for f in FILTERS for t in (0.0, 0.5, 1.0, 1.7)]
    logits = torch.from_numpy(rng.normal(0, 2, (len(rows), vocab_size)).astype(np.float32))
    chosen = parameters(len(rows), temperature=[t for _, t in rows])
    for name in ("top_k", "top_p", "min_p"):
        for row, (filters, _) in enumerate(rows):
            if name in filters:
                chosen[name][row] = filters[name]
    left = processed(logits, chosen).isfinite()
    for row, (filters, temperature) in enumerate(rows):
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
        expected = kept_by_oracle(logits[row].double().tolist(), temperature, **options)
        assert set(left[row].nonzero()[:, 0].tolist()) == expected, rows[row]


def test_filters_keep_what_the_oracle_keeps(monkeypatch):
    """Few candidates force the full sort, as does a device that must not be asked."""
    for candidates, answers_at_once, few in ((4, True, 0), (512, True, 1 << 18), (4, False, 0)):
        monkeypatch.setattr(sampler, "_FEW_WEIGHTS", few)
        monkeypatch.setattr(sampler, "_NUCLEUS_CANDIDATES", candidates)
        monkeypatch.setattr(sampler, "_answers_at_once", lambda _, answer=answers_at_once: answer)
        for vocab_size in (7, 300):
            with named((candidates, answers_at_once, vocab_size)):
                check_filters(vocab_size)
    monkeypatch.undo()
    # Large enough for top_p to list candidates; the last block is short.
    check_filters(2 * 64 * 64 + 77)


def test_a_device_that_is_not_asked_draws_the_same_tokens(monkeypatch):
    """From peaked and flat logits, with and without ties; the candidates are enough for some."""
    counts = []
    find_nucleus = sampler._nucleus

    def counted(logits, columns):
        nucleus, short = find_nucleus(logits, columns)
        counts.append((len(short), len(logits)))
        return nucleus, short

    monkeypatch.setattr(sampler, "_nucleus", counted)
    for seed in range(16):
        rng = np.random.default_rng(seed)
        logits, chosen = random_batch(50, vocab_size=9000, seed=seed)
        logits *= torch.from_numpy(rng.choice([0, 0.1, 0.5, 1], (50, 1)).astype(np.float32))
        if seed % 2:
            logits = logits.round()
        asked = draw(logits, chosen), processed(logits, chosen).isfinite()
        num_asked = len(counts)
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "_answers_at_once", lambda _: False)
            unasked = draw(logits, chosen), processed(logits, chosen).isfinite()
        assert len(counts) == num_asked, seed
        assert torch.equal(asked[0], unasked[0]), seed
        assert torch.equal(asked[1], unasked[1]), seed
    num_short, num_rows = np.sum(counts, axis=0)
    assert num_rows > 200
    assert 0.1 * num_rows < num_short < 0.9 * num_rows


def test_another_device_is_never_asked(monkeypatch):
    """Tensors of the meta device have no values, so a question about them raises."""
    logits, chosen = random_batch(60)
    tokens = draw(logits.to("meta"), chosen)
    logprobs = logprobs_of(logits.to("meta"), tokens, chosen, width=6, with_ranks=True)
    assert (tokens.device.type, tokens.shape, logprobs.top.shape) == ("meta", (60,), (60, 6))
    monkeypatch.setattr(sampler, "_answers_at_once", lambda _: True)
    monkeypatch.setattr(sampler, "_NUCLEUS_CANDIDATES", 8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        draw(logits.to("meta"), chosen)


def test_equal_logits_rank_by_id(monkeypatch):
    monkeypatch.setattr(sampler, "_NUCLEUS_CANDIDATES", 2)
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, 1.0]] * 4)
    chosen = parameters(4, top_k=[2, 4, 0, 0], top_p=[1, 1, 0.5, 0.2])
    left = processed(logits, chosen).isfinite().int().tolist()
    assert left[0] == [0, 1, 0, 1, 0, 0]
    assert left[1] == [1, 1, 0, 1, 1, 0]
    # Two of the three best hold 0.58.
    assert left[2] == [0, 1, 0, 1, 0, 0]
    assert left[3] == [0, 1, 0, 0, 0, 0]


def test_greedy_is_the_first_of_the_ranking():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 5.0]])
    assert draw(logits, parameters(2, temperature=0)).tolist() == [1, 0]
    assert draw(logits, parameters(2, top_k=1, seed=[3, 4])).tolist() == [1, 0]
    # Filters do not change this, nor does a temperature at which numbers would overflow.
    assert draw(logits * 1e4, parameters(2, temperature=1e-44, top_p=0.1)).tolist() == [1, 0]


def check_distribution(filters):
    n, vocab_size = 20_000, 12
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 1, vocab_size).astype(np.float32))
    chosen = parameters(n, temperature=0.8, seed=np.arange(n) * 7919, **filters)
    tokens = draw(logits.repeat(n, 1), chosen)
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    kept = sorted(kept_by_oracle(logits.double().tolist(), 0.8, **options))
    weights = np.exp(logits.double().numpy() / 0.8)[kept]
    expected = n * weights / weights.sum()
    assert counts.sum() == counts[kept].sum() == n
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = len(kept) - 1
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5 + 10 * (freedom > 0)


def test_draws_follow_the_exact_probabilities():
    """By chi-square over many draws; removed tokens are never drawn."""
    for filters in FILTERS:
        with named(filters):
            check_distribution(filters)


def check_numbers(kind, filters):
    """Zero weights are never drawn, not even by the extreme numbers."""
    weights = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.0])
    numbers = np.array([0.0, 0.2857, 0.2858, 0.857, 0.858, 1 - 2.0**-53])
    logits = torch.full((len(numbers), 3000), -torch.inf)
    logits[:, 1500:1507] = weights.log()
    chosen = parameters(len(numbers), **filters)
    plan = sent(plan_rows, chosen, logits.shape[1], draws=True)
    assert [rows.kind for rows in plan] == [kind]
    plan[0].numbers.tensor[:] = torch.from_numpy(numbers)[:, None]
    drawn = sampler.draw(logits, plan) - 1500
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4], kind


def test_a_number_picks_the_token_whose_share_contains_it(monkeypatch):
    """In the order of the ids, whatever the kind of row."""
    for kind, filters in (
        (Kind.WHOLE, {}),
        (Kind.WHOLE, {"min_p": 0.2}),
        (Kind.LISTED, {"top_k": 3}),
        (Kind.NUCLEUS, {"top_p": 0.999}),
        (Kind.SORTED, {"top_k": 2999}),
    ):
        for few in (0, 1 << 18):
            monkeypatch.setattr(sampler, "_FEW_WEIGHTS", few)
            check_numbers(kind, filters)


def test_weights_that_diverged_draw_some_token():
    """Logits that are NaN or infinite must not end the engine: better weights may come."""
    rows = [(broken, f) for broken in (torch.nan, torch.inf, -torch.inf) for f in FILTERS]
    chosen = parameters(len(rows), temperature=1.0, seed=range(len(rows)))
    for row, (_, filters) in enumerate(rows):
        for name, value in filters.items():
            chosen[name][row] = value
    for vocab_size in (50, 5000):
        logits = torch.randn(len(rows), vocab_size)
        for row, (broken, _) in enumerate(rows):
            logits[row, : 1 if row % 2 else None] = broken
        tokens = draw(logits, chosen)
        assert 0 <= tokens.min() <= tokens.max() < vocab_size
        logprobs_of(logits, tokens, chosen, 5)


def test_a_nucleus_ends_where_its_share_is_reached():
    left = processed(torch.zeros(1, 4), parameters(1, top_p=0.5)).isfinite()
    assert left.tolist() == [[True, True, False, False]]


def test_a_large_vocabulary_is_drawn_exactly():
    """Among 200,000 tokens of about equal weight, a draw picks the token that float64 picks."""
    vocab_size, n = 200_000, 32
    logits = torch.from_numpy(
        np.random.default_rng(0).uniform(-1, 0, vocab_size).astype(np.float32)
    )
    chosen = parameters(n, seed=np.arange(n))
    tokens = draw(logits.repeat(n, 1), chosen).numpy()
    cumulative = np.exp(logits.double().numpy()).cumsum()
    numbers = uniforms(chosen["seed"], chosen["sample_index"], chosen["num_generated"])
    expected = np.searchsorted(cumulative, numbers * cumulative[-1], side="right")
    assert np.abs(tokens - expected).max() <= 1


def test_a_draw_is_that_of_a_cumulated_vocabulary():
    """The sums by blocks decide nothing: one sum over all tokens, in float64, picks the same."""
    n = 300
    for vocab_size, spread in ((50_001, 0.1), (50_001, 4), (300, 1), (256, 1)):
        rng = np.random.default_rng(vocab_size)
        logits = torch.from_numpy(rng.normal(0, spread, vocab_size).astype(np.float32))
        chosen = parameters(n, temperature=0.7, seed=np.arange(n))
        scores = logits / np.float32(0.7)
        cumulative = (scores - scores.max()).exp().numpy().cumsum(dtype=np.float64)
        numbers = uniforms(chosen["seed"], chosen["sample_index"], chosen["num_generated"])
        expected = np.searchsorted(cumulative, numbers * cumulative[-1], side="right")
        assert draw(logits.repeat(n, 1), chosen).tolist() == expected.tolist(), vocab_size


def random_batch(num_rows, vocab_size=500, seed=11):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (num_rows, vocab_size)).astype(np.float32))
    chosen = parameters(
        num_rows,
        temperature=rng.choice([0, 0.6, 1, 1.5], num_rows),
        top_k=rng.choice([0, 0, 1, 20, 400], num_rows),
        top_p=rng.choice([1, 1, 0.9, 0.3], num_rows),
        min_p=rng.choice([0, 0, 0.05], num_rows),
        seed=rng.integers(0, 2**63, num_rows),
        sample_index=rng.integers(0, 1000, num_rows),
        num_generated=rng.integers(0, 5000, num_rows),
        num_logprobs=rng.choice([-1, 0, 1, 5], num_rows),
        logprobs_mode=rng.choice([0, 1, 2], num_rows),
    )
    return logits, chosen


def check_rows_alone(vocab_size):
    logits, chosen = random_batch(80, vocab_size)
    together = draw(logits, chosen)
    kept = processed(logits, chosen)
    for row in range(80):
        one = (logits[row : row + 1], chosen.take(slice(row, row + 1)))
        assert draw(*one) == together[row], row
        assert torch.equal(processed(*one)[0], kept[row]), row
    order = np.random.default_rng(0).permutation(80)[:50]
    shuffled = draw(logits[torch.from_numpy(order)], chosen.take(order))
    assert torch.equal(shuffled, together[torch.from_numpy(order)])


def test_a_draw_does_not_depend_on_the_rows_around_it():
    """Rows of all kinds are in the batch; a small vocabulary is sorted, a large one is not."""
    for vocab_size in (500, 9000):
        with named(vocab_size):
            check_rows_alone(vocab_size)


def test_each_row_is_of_the_kind_that_its_parameters_need():
    cases = [
        ({}, Kind.WHOLE),
        ({"temperature": 0.5, "min_p": 0.1}, Kind.WHOLE),
        ({"temperature": 0, "top_k": 3}, Kind.GREEDY),
        ({"top_k": 1}, Kind.LISTED),
        ({"top_k": 78, "top_p": 0.5, "min_p": 0.1}, Kind.SORTED),
        ({"top_k": 64, "top_p": 0.5, "min_p": 0.1}, Kind.LISTED),
        ({"top_k": 10_000}, Kind.WHOLE),
        ({"top_k": 10_000, "top_p": 0.5}, Kind.NUCLEUS),
    ]
    chosen = parameters(len(cases))
    for row, (columns, _) in enumerate(cases):
        for name, value in columns.items():
            chosen[name][row] = value
    plan = sent(plan_rows, chosen, 10_000, draws=True)
    kinds = {int(i): rows.kind for rows in plan for i in rows.index.tensor}
    assert [kinds[row] for row in range(len(cases))] == [kind for _, kind in cases]
    # Rows of one kind pay for nothing that only other kinds need.
    for rows in plan:
        assert (rows.numbers is None) == (rows.kind is Kind.GREEDY)
        assert (rows.top_k is not None) == (rows.kind in (Kind.LISTED, Kind.SORTED))
    # Scores do not depend on what is drawn.
    plan = sent(plan_rows, chosen, 10_000, draws=False)
    assert all(rows.numbers is None and rows.kind is not Kind.GREEDY for rows in plan)


def test_the_size_of_parts_changes_no_number(monkeypatch):
    logits, chosen = random_batch(60, vocab_size=9000)
    whole = draw(logits, chosen), processed(logits, chosen)
    for cached in (1, 9000 * 7, 9000 * 1000):
        monkeypatch.setattr(logit_rows, "_CACHED", cached)
        for one, other in zip(
            whole, (draw(logits, chosen), processed(logits, chosen)), strict=True
        ):
            assert torch.equal(one, other), cached


def test_a_draw_depends_on_seed_sample_and_position():
    logits = torch.zeros(4, 10_000)
    chosen = parameters(4, seed=[1, 2, 1, 1], sample_index=[0, 0, 1, 0], num_generated=[0, 0, 0, 1])
    assert len(set(draw(logits, chosen).tolist())) == 4


def test_logprobs_are_those_of_the_oracle():
    logits, chosen = random_batch(60)
    tokens = draw(logits, chosen)
    result = logprobs_of(logits, tokens, chosen, width=6)
    for row in range(60):
        wanted = int(chosen["num_logprobs"][row])
        if wanted < 0:
            assert result.chosen[row].isnan()
        else:
            mode, temperature = (
                LogprobsMode(chosen["logprobs_mode"][row]),
                chosen["temperature"][row],
            )
            scores = logits[row].double()
            if mode is not LogprobsMode.RAW:
                scores = scores / float(temperature or 1)
            if mode is LogprobsMode.PROCESSED:
                one = chosen.take(slice(row, row + 1))
                scores[~processed(logits[row : row + 1], one)[0].isfinite()] = -torch.inf
            expected = scores.log_softmax(-1)
            torch.testing.assert_close(
                result.chosen[row].double(), expected[tokens[row]], atol=1e-5, rtol=1e-5
            )
            best = ranking(scores.tolist())[: max(wanted, 1)]
            assert result.top_ids[row, :wanted].tolist() == best[:wanted]
            torch.testing.assert_close(
                result.top[row, :wanted].double(), expected[best[:wanted]], atol=1e-5, rtol=1e-5
            )
            # The best token's number is the same bit for bit.
            if wanted and tokens[row] == best[0]:
                assert result.chosen[row] == result.top[row, 0]
        assert result.top_ids[row, max(wanted, 0) :].eq(-1).all()
        assert result.top[row, max(wanted, 0) :].isnan().all()


def test_logprobs_do_not_underflow():
    logits = torch.tensor([[0.0, 500.0]])
    result = logprobs_of(logits, torch.tensor([0]), parameters(1, num_logprobs=2), width=2)
    assert result.chosen[0] == -500
    assert result.top[0].tolist() == [0, -500]


def test_logprobs_beyond_the_vocabulary_are_empty():
    result = logprobs_of(
        torch.zeros(1, 3), torch.tensor([0]), parameters(1, num_logprobs=5), width=5
    )
    assert result.top_ids[0, 3:].tolist() == [-1, -1]


def test_ranks_count_higher_logits():
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0]]).repeat(4, 1)
    result = logprobs_of(
        logits, torch.arange(4), parameters(4, num_logprobs=[0, 0, 2, -1]), width=2, with_ranks=True
    )
    assert result.ranks.tolist() == [1, 4, 1, -1]


def test_only_tokens_with_the_best_logit_get_the_best_logprob():
    """Also where the subtraction rounds two logits to one number."""
    best = torch.tensor(1.0)
    next_best = best.nextafter(torch.tensor(0.0))
    logits = torch.full((1, 50_000), -2.0)
    logits[0, 7], logits[0, 3], logits[0, 9] = best, next_best, next_best
    norm = logits.logsumexp(-1)
    assert best - norm == next_best - norm
    for width in (1, 3):
        asked = parameters(3, num_logprobs=width)
        result = logprobs_of(logits.repeat(3, 1), torch.tensor([7, 3, 9]), asked, width)
        assert (result.chosen == result.top[:, 0]).tolist() == [True, False, False]
        assert result.chosen[1] == result.chosen[2]
    assert result.top[0].tolist() == [result.chosen[i] for i in (0, 1, 2)]
    # In a tie both tokens have the number of the one that is listed.
    logits[0, 3] = best
    result = logprobs_of(
        logits.repeat(2, 1), torch.tensor([7, 3]), parameters(2, num_logprobs=1), 1
    )
    assert (result.chosen == result.top[:, 0]).all()
