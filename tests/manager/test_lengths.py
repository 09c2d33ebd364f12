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


def refresh(predictor: LengthPredictor, running=NONE, max_tokens=1, groups=None) -> None:
    running = np.asarray(running)
    groups = column(NO_GROUP, len(running)) if groups is None else np.asarray(groups)
    predictor.refresh(groups, running, np.broadcast_to(max_tokens, running.shape))


def predict(predictor: LengthPredictor, num_generated, max_tokens, group: int = NO_GROUP):
    num_generated = np.asarray(num_generated)
    limits = np.broadcast_to(max_tokens, num_generated.shape)
    return predictor.predict(column(group, len(num_generated)), num_generated, limits)


def survival_by_hand(ended, running, horizon: int) -> list[float]:
    """S(0) .. S(horizon), by the product-limit estimator; ended: (length, max_tokens)."""
    survival = [1.0]
    for x in range(horizon):
        num_at_risk = sum(length > x for length, _ in ended) + sum(g > x for g in running)
        num_ends = sum(length == x + 1 < limit for length, limit in ended)
        survival.append(survival[-1] * (1 - num_ends / num_at_risk if num_at_risk else 1.0))
    return survival


def moments_by_hand(survival, g: int, limit: int) -> tuple[float, float]:
    left = [s / survival[g] for s in survival]
    mean = g + sum(left[g:limit])
    square = sum(x * x * (left[x - 1] - left[x]) for x in range(g + 1, limit))
    return mean, math.sqrt(max(0.0, square + limit * limit * left[limit - 1] - mean * mean))


@pytest.mark.parametrize("seed", range(12))
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
        refresh(predictor, (running * share).astype(int), 60)
    survival = survival_by_hand(list(zip(ended, limits, strict=True)), list(running), 60)
    num_checked = 0
    for g in range(60):
        if sum(ended > g) + sum(running > g) < 4 or survival[g] == 0:
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
        refresh(predictor, np.full(np.count_nonzero(lengths > age), age), 2000)
    assert naive < 110
    # Nobody can know what the others will do; the limit is the safe side.
    assert predict(predictor, [0, 200], 2000).min() > 1700


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
            refresh(predictor, age[age > 0], 4000)
    waiting, running = predict(predictor, [0, 200], 4000)
    assert 165 < waiting < 240
    assert 365 < running < 440


def test_aborted_sequences_stay_at_risk():
    predictors = [LengthPredictor(100, initial_wait=1, std_scale=0.0) for _ in range(2)]
    for predictor in predictors:
        refresh(predictor, [5] * 100, 100)
        observe(predictor, [10] * 100, 100)
    predictors[0].abort(np.full(100, 50))
    for predictor in predictors:
        refresh(predictor)
    # Half of those that were 9 long ended there; nobody is known to end later.
    assert predict(predictors[0], [0], 100).tolist() == [55]
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


def test_siblings_count_by_their_number():
    predictor = LengthPredictor(4000, initial_wait=1, std_scale=0.0)
    observe(predictor, [1000] * 1000, 4000)
    group = predictor.open_group()
    seen = []
    for _ in range(4):
        refresh(predictor)
        seen += predict(predictor, [0], 4000, group).tolist()
        observe(predictor, [100], 4000, group)
    for number, predicted in enumerate(seen):
        everybody = (1000 * 1000 + number * 100) / (1000 + number)
        # Two imagined siblings are as all are.
        expected = (number * 100 + 2 * everybody) / (number + 2)
        assert predicted == pytest.approx(expected, rel=0.02)
    # Siblings that were shorter say nothing; other groups are not touched.
    assert predict(predictor, [150], 4000, group)[0] == predict(predictor, [150], 4000)[0]
    assert predict(predictor, [0], 4000, predictor.open_group())[0] > 990


def test_running_siblings_count_too():
    predictor = LengthPredictor(4000, initial_wait=1, std_scale=0.0)
    observe(predictor, [1000] * 1000, 4000)
    group = predictor.open_group()
    observe(predictor, [100], 4000, group)
    refresh(predictor)
    alone = predict(predictor, [0], 4000, group)[0]
    refresh(predictor, [120] * 7, 4000, [group] * 7)
    beside_longer_ones = predict(predictor, [0], 4000, group)[0]
    assert alone < 705
    assert beside_longer_ones == pytest.approx((100 + 9 * 1000) / 10, rel=0.01)
    assert predict(predictor, [120], 4000, group)[0] == pytest.approx(1000, rel=0.01)


def test_deviation_of_siblings_is_the_margin():
    predictor = LengthPredictor(1000, initial_wait=1, std_scale=1.0)
    group = predictor.open_group()
    observe(predictor, [400, 600] * 500, 1000)
    observe(predictor, [100] * 200, 1000, group)
    refresh(predictor)
    everybody = np.repeat([400, 600, 100], [500, 500, 200])
    assert predict(predictor, [0], 1000)[0] == math.ceil(everybody.mean() + everybody.std())
    assert predict(predictor, [0], 1000, group)[0] < 160


def test_handles_are_reused_and_start_afresh():
    predictor = LengthPredictor(1000, initial_wait=1, std_scale=0.0)
    first = predictor.open_group()
    observe(predictor, [10] * 50, 1000, first)
    observe(predictor, [500] * 1000, 1000)
    refresh(predictor)
    assert predict(predictor, [0], 1000, first)[0] < 60
    observe(predictor, [10], 1000, first)
    predictor.close_group(first)
    other = predictor.open_group()
    assert other != first  # the tables still know it
    assert predict(predictor, [0], 1000, other)[0] > 450
    refresh(predictor)
    assert predictor.open_group() == first
    assert predict(predictor, [0], 1000, first)[0] > 450


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
            refresh(predictor, lengths[22:], limits[22:], groups[22:])
            answer = predictor.predict(groups, lengths, limits)
            assert (answer <= limits).all()
            assert (answer > lengths)[lengths < limits].all()
            answers.append(answer)
            if rng.random() < 0.2:
                predictor.close_group(handles[0])
                limits, groups, lengths = limits[22:], groups[22:], lengths[22:]
                refresh(predictor, lengths[groups > 0], max_length)
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
