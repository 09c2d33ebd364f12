"""The length predictor against counting by hand, and where counting by hand misleads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokasaurus.manager.lengths import NO_GROUP, LengthPredictor

NONE = np.empty(0, np.int64)


def column(values, num: int | None = None) -> np.ndarray:
    return np.asarray(values) if num is None else np.full(num, values)


def observe(predictor: LengthPredictor, lengths, max_tokens, group: int = NO_GROUP) -> None:
    lengths = np.asarray(lengths)
    limits = np.broadcast_to(max_tokens, lengths.shape)
    predictor.observe(column(group, len(lengths)), lengths, limits)


def refresh(predictor: LengthPredictor, running=NONE, groups=None) -> None:
    running = np.asarray(running)
    groups = column(NO_GROUP, len(running)) if groups is None else np.asarray(groups)
    predictor.refresh(groups, running)


def predict(predictor: LengthPredictor, num_generated, max_tokens, group: int = NO_GROUP):
    num_generated = np.asarray(num_generated)
    limits = np.broadcast_to(max_tokens, num_generated.shape)
    return predictor.predict(column(group, len(num_generated)), num_generated, limits)


def survival_by_hand(ended, running, horizon: int) -> list[float]:
    """S(0) .. S(horizon), by the product-limit estimator; ended: (length, max_tokens)."""
    survival = [1.0]
    num_tokens = sum(length for length, _ in ended) + sum(running)
    overall_hazard = sum(length < limit for length, limit in ended) / num_tokens
    for x in range(horizon):
        num_at_risk = sum(length > x for length, _ in ended) + sum(g > x for g in running)
        num_ends = sum(length == x + 1 < limit for length, limit in ended)
        hazard = num_ends / num_at_risk if num_at_risk else overall_hazard
        survival.append(survival[-1] * (1 - hazard))
    return survival


def moments_by_hand(survival, g: int, limit: int) -> tuple[float, float]:
    left = [s / survival[g] for s in survival]
    mean = g + sum(left[g:limit])
    square = sum(x * x * (left[x - 1] - left[x]) for x in range(g + 1, limit))
    return mean, math.sqrt(max(0.0, square + limit * limit * left[limit - 1] - mean * mean))


@pytest.mark.parametrize("seed", range(8))
def test_conditional_on_survival_equals_counting_by_hand(seed):
    rng = np.random.default_rng(seed)
    scale = float(rng.choice([0.0, 0.25, 1.0]))
    predictor = LengthPredictor(60, memory=10**12, initial_wait=1, std_scale=scale)
    limits = rng.integers(10, 61, 300)
    ended = np.minimum(rng.geometric(0.05, 300), limits)
    running = np.minimum(rng.geometric(0.08, 40), 50) if seed % 2 else NONE
    # In several steps, during which those that run get longer.
    for part, share in zip(np.array_split(np.arange(300), 5), (0.2, 0.4, 0.6, 0.9, 1), strict=True):
        observe(predictor, ended[part], limits[part])
        refresh(predictor, (running * share).astype(int))
    survival = survival_by_hand(list(zip(ended, limits, strict=True)), list(running), 60)
    num_checked = 0
    for g in range(60):
        if sum(ended >= g) + sum(running >= g) < 4 or survival[g] < 1e-9:
            continue
        for limit in range(g + 1, 61, 1 + seed % 4):
            mean, std = moments_by_hand(survival, g, limit)
            (predicted,) = predict(predictor, [g], limit)
            exact = mean + scale * std
            bounded = min(max(math.ceil(exact - 1e-6), g + 1), limit)
            assert predicted == bounded or abs(predicted - exact) < 1 + 1e-5, (g, limit)
            num_checked += predicted == bounded
    assert num_checked > 100


def test_prior_until_enough_sequences_ended():
    predictor = LengthPredictor(1000, initial_wait=16)
    observe(predictor, [10] * 15, 1000)
    refresh(predictor)
    assert predict(predictor, [0, 500, 999], 1000).tolist() == [1000] * 3
    observe(predictor, [10], 1000)
    assert predict(predictor, [0], 1000).tolist() == [1000]  # the tables are of the last refresh
    refresh(predictor)
    assert predict(predictor, [0], 1000).tolist() == [10]
    assert predict(predictor, [11], 1000).tolist() == [1000]  # nobody was seen there


def test_configured_prior():
    predictor = LengthPredictor(1000, prior_mean=0.25, prior_std=0.1, std_scale=0.5)
    assert predict(predictor, [0, 100, 600], 1000).tolist() == [300, 300, 651]
    assert predict(predictor, [0], 100).tolist() == [30]


def test_where_few_have_been_the_prior_has_its_share():
    predictor = LengthPredictor(1000, initial_wait=1, std_scale=0.0)
    observe(predictor, [10] * 100 + [20] * 2, 1000)
    refresh(predictor)
    # Two of four: halfway between 20 and 1000.
    assert predict(predictor, [15], 1000).tolist() == [510]


def test_a_limit_reached_is_not_an_end():
    predictor = LengthPredictor(1000, initial_wait=1, std_scale=0.0)
    observe(predictor, [50] * 500, 50)
    observe(predictor, [50, 400] * 100, 1000)
    refresh(predictor)
    # All 700 were 49 long; 600 of them might have been longer, and of 100 it is known how much.
    assert predict(predictor, [0], 1000)[0] == math.ceil(6 / 7 * 400 + 1 / 7 * 50)
    assert predict(predictor, [0], 50)[0] == 50
    assert predict(predictor, [100], 1000)[0] == 400


def test_the_first_to_finish_do_not_speak_for_all():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 2001, 4000))
    predictor = LengthPredictor(2000, std_scale=0.0)
    naive = lengths[lengths <= 200].mean()
    for age in range(20, 201, 20):
        observe(predictor, lengths[(lengths > age - 20) & (lengths <= age)], 2000)
        refresh(predictor, np.full(np.count_nonzero(lengths > age), age))
    assert naive < 110
    # Nobody can know how the hazard goes on; that it goes on at all is known.
    waiting, running = predict(predictor, [0, 200], 2000)
    assert lengths.mean() < waiting < 1.3 * lengths.mean()
    assert lengths[lengths > 200].mean() < running < 1.3 * lengths[lengths > 200].mean()


def test_a_busy_engine_is_not_biased():
    # Many run compared with what is remembered; each step starts as many as end.
    rng = np.random.default_rng(1)
    total = rng.geometric(1 / 200, 3000)
    age = (rng.random(3000) * total).astype(int)
    predictor = LengthPredictor(4000, memory=300, std_scale=0.0)
    for step in range(1500):
        age += 1
        done = age >= total
        observe(predictor, age[done], 4000)
        age[done] = 0
        total[done] = rng.geometric(1 / 200, np.count_nonzero(done))
        if step % 10 == 0:
            refresh(predictor, age[age > 0])
    waiting, running = predict(predictor, [0, 200], 4000)
    assert 165 < waiting < 240
    assert 365 < running < 440


def test_aborted_sequences_stay_at_risk():
    predictors = [LengthPredictor(100, initial_wait=1, std_scale=0.0) for _ in range(2)]
    for predictor in predictors:
        refresh(predictor, [5] * 100)
        observe(predictor, [10] * 100, 100)
    predictors[0].abort(np.full(100, 50))
    for predictor in predictors:
        refresh(predictor)
    # Half of those that were 9 long ended there. The others were 50, and went on with the hazard of
    # all: 100 ends in 6000 tokens.
    rest = sum((1 - 100 / 6000) ** x for x in range(50))
    assert predict(predictors[0], [0], 100)[0] == math.ceil((10 + 50 + rest) / 2)
    assert predict(predictors[1], [0], 100).tolist() == [10]


def test_old_lengths_fade():
    predictor = LengthPredictor(1000, memory=200, std_scale=0.0)
    for _ in range(20):
        observe(predictor, [500] * 50, 1000)
        refresh(predictor)
    assert predict(predictor, [0], 1000).tolist() == [500]
    seen = []
    for _ in range(20):
        observe(predictor, [20] * 50, 1000)
        refresh(predictor)
        seen += predict(predictor, [0], 1000).tolist()
    assert seen == sorted(seen, reverse=True)
    assert seen[3] == pytest.approx(20 + 480 / math.e, rel=0.12)  # after 200
    assert seen[-1] < 30


def taught(max_tokens=8000, mean=400) -> LengthPredictor:
    """All requests: a constant hazard."""
    lengths = np.random.default_rng(5).geometric(1 / mean, 4000)
    predictor = LengthPredictor(max_tokens, memory=10**9, std_scale=0.0)
    observe(predictor, np.minimum(lengths, max_tokens), max_tokens)
    refresh(predictor)
    return predictor


def test_siblings_count_by_their_number():
    predictor = taught()
    short, long, other = (predictor.open_group() for _ in range(3))
    everybody = predict(predictor, [0], 8000)[0]
    assert everybody == predict(predictor, [0], 8000, short)[0]  # nothing is known
    short_seen, long_seen = [everybody], [everybody]
    for _ in range(6):
        observe(predictor, [50], 8000, short)
        observe(predictor, [2500], 8000, long)
        refresh(predictor)
        short_seen += predict(predictor, [0], 8000, short).tolist()
        long_seen += predict(predictor, [0], 8000, long).tolist()
    assert short_seen == sorted(short_seen, reverse=True)
    assert everybody < long_seen[1] < 1.03 * min(long_seen[2:])
    assert short_seen[-1] < 0.35 * everybody
    assert long_seen[-1] > 3 * everybody
    assert predict(predictor, [0], 8000, other)[0] == predict(predictor, [0], 8000)[0]


def test_running_siblings_count_too():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [100], 8000, group)
    refresh(predictor)
    alone = predict(predictor, [0, 120], 8000, group)
    refresh(predictor, [2000] * 7, [group] * 7)
    beside_longer_ones = predict(predictor, [0, 120], 8000, group)
    assert alone[0] < predict(predictor, [0], 8000)[0]
    assert (beside_longer_ones > 2 * alone).all()


def test_siblings_that_ended_earlier_make_those_that_run_end_soon():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [90, 95, 100, 100, 105, 110, 115], 8000, group)
    refresh(predictor, [120], [group])
    rest = predict(predictor, [120], 8000, group)[0] - 120
    assert rest < 0.45 * (predict(predictor, [120], 8000)[0] - 120)


def test_a_sequence_is_not_its_own_sibling():
    predictor = taught()
    group = predictor.open_group()
    refresh(predictor, [1000], [group])
    assert predict(predictor, [1000], 8000, group)[0] == predict(predictor, [1000], 8000)[0]
    assert predict(predictor, [0], 8000, group)[0] > predict(predictor, [0], 8000)[0]


def test_a_group_at_its_limit_is_long():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [1500] * 7, 1500, group)
    refresh(predictor)
    assert predict(predictor, [0], 1500)[0] < 450
    assert predict(predictor, [0], 1500, group)[0] > 1000


def test_deviation_is_the_margin():
    predictor = LengthPredictor(1000, initial_wait=1, std_scale=1.0)
    observe(predictor, [400, 600] * 500, 1000)
    refresh(predictor)
    assert predict(predictor, [0, 500], 1000).tolist() == [600, 600]
    assert predict(predictor, [0], 500).tolist() == [500]


def test_handles_are_reused_and_start_afresh():
    predictor = taught()
    first = predictor.open_group()
    observe(predictor, [10] * 50, 8000, first)
    refresh(predictor)
    assert predict(predictor, [0], 8000, first)[0] < 60
    observe(predictor, [10], 8000, first)
    predictor.close_group(first)
    other = predictor.open_group()
    assert other != first  # the tables still know it
    assert predict(predictor, [0], 8000, other)[0] > 350
    refresh(predictor)
    assert predictor.open_group() == first
    assert predict(predictor, [0], 8000, first)[0] > 350


@pytest.mark.parametrize("seed", range(6))
def test_bounds_and_determinism(seed):
    def run():
        rng = np.random.default_rng(seed)
        max_length = int(rng.choice([1, 7, 100, 5000, 131_072]))
        predictor = LengthPredictor(max_length, num_buckets=64, memory=100, initial_wait=4)
        handles = [predictor.open_group() for _ in range(5)]
        limits_of = rng.integers(1, max_length + 1, 6)
        answers = []
        for _ in range(40):
            groups = rng.integers(-1, 5, 50)
            limits = limits_of[groups]
            lengths = rng.integers(0, limits + 1)
            predictor.observe(groups[:20], np.maximum(lengths[:20], 1), limits[:20])
            predictor.abort(lengths[20:22])
            refresh(predictor, lengths[22:], groups[22:])
            answer = predictor.predict(groups, lengths, limits)
            assert (answer <= limits).all()
            assert (answer > lengths)[lengths < limits].all()
            answers.append(answer)
            if rng.random() < 0.2:
                predictor.close_group(handles[0])
                limits, groups, lengths = limits[22:], groups[22:], lengths[22:]
                refresh(predictor, lengths[groups > 0])
                assert predictor.open_group() == handles[0]
        return np.concatenate(answers)

    assert np.array_equal(run(), run())


def test_wide_buckets_are_close_to_exact():
    rng = np.random.default_rng(3)
    lengths = np.minimum(np.exp(rng.normal(7, 1, 20_000)).astype(int) + 1, 100_000)
    predictor = LengthPredictor(131_072, memory=10**9, std_scale=0.0)
    observe(predictor, lengths, 131_072)
    refresh(predictor)
    for g in (0, 10, 100, 1000, 5000):
        for limit in (g + 100, 4 * g + 1000, 131_072):
            exact = np.minimum(lengths[lengths > g], limit).mean()
            assert predict(predictor, [g], limit)[0] == pytest.approx(exact, rel=0.01, abs=1)


def test_nobody():
    predictor = LengthPredictor(100)
    refresh(predictor)
    assert predict(predictor, NONE, 100).shape == (0,)
