"""The length predictor against counting by hand, and where counting by hand misleads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokasaurus.manager.forecast.lengths import NO_GROUP, LengthPredictor, at_most_median

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


def predict(
    predictor: LengthPredictor, num_generated, max_tokens, group: int = NO_GROUP, together: int = 1
):
    """One after another, beginning with number 0."""
    num_generated = np.asarray(num_generated)
    limits = np.broadcast_to(max_tokens, num_generated.shape)
    numbers = np.arange(len(num_generated))
    groups = column(group, len(num_generated))
    return predictor.predict(groups, num_generated, limits, numbers, together)


def sample(
    predictor: LengthPredictor, g: int, max_tokens: int, group: int = NO_GROUP, num: int = 4096
) -> np.ndarray:
    """The predictions for many sequences of one age."""
    return predict(predictor, np.full(num, g), max_tokens, group)


def mean(predictor: LengthPredictor, g: int, max_tokens: int, group: int = NO_GROUP) -> float:
    return float(sample(predictor, g, max_tokens, group).mean())


def survival_by_hand(ended, running, horizon: int) -> list[float]:
    """S(0) .. S(horizon), by the product-limit estimator; ended: (length, max_tokens)."""
    survival = [1.0]
    imagined = np.mean([limit for _, limit in ended]) / 16
    num_tokens = sum(length for length, _ in ended) + sum(running)
    num_stops = sum(length < limit for length, limit in ended)
    overall = (num_stops + 1) / (num_tokens + imagined)
    for x in range(horizon):
        num_at_risk = sum(length > x for length, _ in ended) + sum(g > x for g in running)
        num_ends = sum(length == x + 1 < limit for length, limit in ended)
        survival.append(survival[-1] * (1 - (num_ends + 4 * overall) / (num_at_risk + 4)))
    return survival


def test_predictions_have_the_distribution_counted_by_hand():
    for seed in range(6):
        check_predictions_by_hand(seed)


def check_predictions_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predictor = LengthPredictor(60, memory=10**12, std_scale=0.0)
    limits = rng.integers(10, 61, 300)
    for limit in limits:
        predictor.expect(int(limit), 1)
    ended = np.minimum(rng.geometric(0.05, 300), limits)
    running = np.minimum(rng.geometric(0.08, 40), 50) if seed % 2 else NONE
    # In several steps, during which those that run get longer.
    for part, share in zip(np.array_split(np.arange(300), 5), (0.2, 0.4, 0.6, 0.9, 1), strict=True):
        observe(predictor, ended[part], limits[part])
        refresh(predictor, (running * share).astype(int))
    survival = np.array(survival_by_hand(list(zip(ended, limits, strict=True)), list(running), 60))
    for g in range(0, 60, 3):
        for limit in range(g + 1, 61, 1 + seed):
            counts = np.bincount(sample(predictor, g, limit), minlength=62)
            beyond = 1 - np.cumsum(counts) / 4096
            exact = np.where(np.arange(61) < limit, survival / survival[g], 0)
            assert beyond[g] == 1
            assert np.abs(beyond[g:61] - exact[g:]).max() <= 2 / 4096


def lognormal(rng, num):
    return np.exp(rng.normal(5.5, 0.8, num)).astype(int) + 1


def exponential(rng, num):
    return rng.geometric(1 / 300, num)


def two_points(rng, num):
    return rng.choice([100, 600], num)


@pytest.mark.parametrize("draw", [lognormal, exponential, two_points])
def test_a_population_ends_as_predicted(draw):
    """Sequences of all ages, as they run in a busy engine, against others that have got as far."""
    rng = np.random.default_rng(7)
    limit = 4000
    predictor = LengthPredictor(limit, memory=10**9, std_scale=0.0)
    lengths = np.minimum(draw(rng, 50_000), limit)
    predictor.expect(limit, len(lengths))
    observe(predictor, lengths, limit)
    refresh(predictor)
    # Long sequences are met more often than short ones.
    true = np.minimum(draw(rng, 40_000), limit)
    true = rng.choice(true, 8192, p=true / true.sum())
    age = (rng.random(8192) * true).astype(int)
    predicted = predict(predictor, age, limit)
    assert predicted.mean() == pytest.approx(true.mean(), rel=0.03)
    rest, true_rest = predicted - age, true - age
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        low, high = np.quantile(true_rest, [max(0, share - 0.02), min(1, share + 0.02)])
        assert low - 1 <= np.quantile(rest, share) <= high + 1
    # At one age, the sample is that of the conditional distribution.
    for g in (0, 50, 150, 400):
        left = lengths[lengths > g]
        predictions = sample(predictor, g, limit)
        assert predictions.mean() == pytest.approx(left.mean(), rel=0.02)
        for share in (0.1, 0.5, 0.9):
            value = np.quantile(predictions, share)
            below, upto = np.mean(left < 0.99 * value - 1), np.mean(left <= 1.01 * value + 1)
            assert below - 0.01 <= share <= upto + 0.01
    # Pages that the population still holds, against what is to be expected.
    lengths = np.sort(lengths)
    total = (-(-age // 16)).sum()
    for t in (10, 50, 100, 200, 400, 800):
        pages = -(-(age + t) // 16)
        num_left = len(lengths) - np.searchsorted(lengths, [age, age + t], side="right")
        exact = (pages * num_left[1] / np.maximum(num_left[0], 1)).sum()
        assert abs(pages[predicted > age + t].sum() - exact) < 0.03 * total


def test_tokens_without_an_end_count_at_once():
    predictor = LengthPredictor(4000, std_scale=0.0)
    predictor.expect(4000, 100)
    refresh(predictor)
    at_first = mean(predictor, 0, 4000)
    assert 230 < at_first < 255  # the imagined sequence: 250, and few are cut off at 4000
    refresh(predictor, np.full(100, 50))
    assert mean(predictor, 0, 4000) > 4 * at_first
    assert mean(predictor, 50, 4000) > 4 * at_first


def test_the_imagined_sequence_follows_max_tokens_of_requests():
    predictor = LengthPredictor(100_000, memory=100, std_scale=0.0)
    assert mean(predictor, 0, 100_000) > 5_000
    predictor.expect(800, 4)
    refresh(predictor)
    assert mean(predictor, 0, 100_000) == pytest.approx(50, rel=0.05)
    for _ in range(10):
        predictor.expect(80_000, 100)
        predictor.abort(np.full(1, 1))
        observe(predictor, [400] * 100, 400)  # limits: no ends
        refresh(predictor)
    # One end in all the tokens that are remembered.
    assert mean(predictor, 0, 100_000) > 20_000


def test_requests_of_one_token_teach_nothing():
    """Embeddings and loglikelihoods, by the thousand, among requests for text."""

    def predictions(num_of_one: int, prior: float | None) -> list[np.ndarray]:
        predictor = LengthPredictor(4000, memory=100, prior_mean=prior)
        told = []
        for lengths in ([30, 300] * 4, [60, 600] * 40):
            predictor.expect(1, num_of_one)
            predictor.expect(2000, len(lengths))
            group = predictor.open_group()
            observe(predictor, [1] * num_of_one, 1)
            observe(predictor, [1] * num_of_one, 1, group)
            observe(predictor, lengths, 2000)
            refresh(predictor)
            told += [sample(predictor, 0, 2000), sample(predictor, 0, 2000, group)]
        return told

    for prior in (None, 1.0):
        for beside, alone in zip(predictions(5000, prior), predictions(0, prior), strict=True):
            assert (beside == alone).all(), f"prior {prior}"


def test_numbers_in_a_row_are_spread_evenly():
    predictor = taught()
    octiles = np.quantile(sample(predictor, 0, 8000), np.arange(9) / 8)
    for first in (0, 1000, 65_530, 2**40 + 65_500):
        numbers = np.arange(first, first + 64)
        predicted = predictor.predict(
            column(NO_GROUP, 64), np.zeros(64, int), np.full(64, 8000), numbers
        )
        counts, _ = np.histogram(predicted, octiles)
        assert np.abs(counts - 8).max() <= 2


def test_a_number_lowered_to_the_median_is_never_predicted_longer():
    predictor = taught()
    numbers = np.arange(1000, 1256)
    none = column(NO_GROUP, 256)

    def predicted(of):
        return predictor.predict(none, np.zeros(256, int), column(8000, 256), of)

    lowered = predicted(np.array([at_most_median(number) for number in numbers.tolist()]))
    median = np.median(sample(predictor, 0, 8000))
    assert lowered.max() == pytest.approx(median, rel=0.01)
    is_short = predicted(numbers) <= median
    assert 120 <= is_short.sum() <= 136
    assert (lowered[is_short] == predicted(numbers)[is_short]).all()


def test_the_prediction_for_a_sequence_stays_the_same_while_it_runs():
    predictor = taught()
    at_first, later = sample(predictor, 0, 8000), sample(predictor, 400, 8000)
    # A constant hazard: what is to come does not depend on what was.
    assert np.median(later - 400 - at_first) == pytest.approx(0, abs=12)
    by_both = np.lexsort((later, at_first))
    assert (np.diff(later[by_both]) >= 0).all()


def test_the_prior_holds_until_enough_sequences_ended():
    predictor = LengthPredictor(1000, prior_mean=1.0, initial_wait=16, std_scale=0.0)
    observe(predictor, [10] * 15, 1000)
    refresh(predictor)
    assert predict(predictor, [0, 500, 999], 1000).tolist() == [1000] * 3
    observe(predictor, [10] * 1000, 1000)
    assert predict(predictor, [0], 1000).tolist() == [1000]  # the table is of the last refresh
    refresh(predictor)
    assert np.median(sample(predictor, 0, 1000)) == 10


def test_a_configured_prior_is_predicted():
    predictor = LengthPredictor(1000, prior_mean=0.5, prior_std=0.1, std_scale=0.0)
    predictions = sample(predictor, 0, 1000)
    assert predictions.mean() == pytest.approx(500, abs=1)
    assert predictions.std() == pytest.approx(100, rel=0.01)
    assert sample(predictor, 650, 1000).tolist().count(651) > 3000
    assert mean(predictor, 0, 100) == pytest.approx(50, abs=1)
    with_margin = LengthPredictor(1000, prior_mean=0.5, prior_std=0.1, std_scale=2.0)
    assert predict(with_margin, np.zeros(4096, int), 1000, together=16).mean() == (
        pytest.approx(550, abs=1)
    )


def test_where_few_have_been_the_hazard_of_all_has_its_share():
    predictor = LengthPredictor(1000, memory=10**9, std_scale=0.0)
    predictor.expect(1000, 104)
    observe(predictor, [10] * 100 + [20] * 4, 1000)
    refresh(predictor)
    overall = 105 / (1080 + 62.5)
    # Of eight that were 19 long, the four real ones ended, and a share of those imagined.
    passed = np.mean(sample(predictor, 19, 1000) > 20)
    assert passed == pytest.approx((4 - 4 * overall) / 8, abs=0.001)
    # Beyond the longest length that was seen, that hazard goes on.
    assert mean(predictor, 20, 1000) == pytest.approx(20 + 1 / overall, rel=0.01)


def test_a_limit_reached_is_not_an_end():
    predictor = LengthPredictor(1000, memory=10**9, std_scale=0.0)
    observe(predictor, [50] * 5000, 50)
    observe(predictor, [50, 400] * 1000, 1000)
    refresh(predictor)
    # All 7000 were 49 long; 6000 of them might have been longer, and of 1000 it is known how much.
    predictions = sample(predictor, 0, 1000)
    assert np.mean(predictions == 50) == pytest.approx(1 / 7, abs=0.01)
    assert np.mean(predictions == 400) == pytest.approx(6 / 7, abs=0.02)
    assert np.mean(sample(predictor, 0, 50) == 50) > 0.97
    assert np.mean(sample(predictor, 100, 1000) == 400) > 0.97


def test_the_first_to_finish_do_not_speak_for_all():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 2001, 4000))
    predictor = LengthPredictor(2000, std_scale=0.0)
    naive = lengths[lengths <= 200].mean()
    for age in range(20, 201, 20):
        observe(predictor, lengths[(lengths > age - 20) & (lengths <= age)], 2000)
        refresh(predictor, np.full(np.count_nonzero(lengths > age), age))
    assert naive < 110
    # It cannot be known how the hazard goes on, only that it does.
    waiting, running = mean(predictor, 0, 2000), mean(predictor, 200, 2000)
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
    waiting, running = mean(predictor, 0, 4000), mean(predictor, 200, 4000)
    assert 165 < waiting < 240
    assert 365 < running < 440


def test_aborted_sequences_stay_at_risk():
    predictors = [LengthPredictor(100, memory=10**9, std_scale=0.0) for _ in range(2)]
    for predictor in predictors:
        refresh(predictor, [5] * 2000)
        observe(predictor, [10] * 1000, 100)
    predictors[0].abort(np.full(1000, 50))
    for predictor in predictors:
        refresh(predictor)
    # Half of those that were 9 long ended there. The others were 50.
    assert np.mean(sample(predictors[0], 0, 100) <= 10) == pytest.approx(0.5, abs=0.01)
    assert np.mean(sample(predictors[0], 0, 100) <= 50) == pytest.approx(0.5, abs=0.02)
    assert np.mean(sample(predictors[1], 0, 100) <= 10) > 0.98


def test_old_lengths_fade():
    predictor = LengthPredictor(1000, memory=200, std_scale=0.0)
    for _ in range(20):
        observe(predictor, [500] * 50, 1000)
        refresh(predictor)
    assert mean(predictor, 0, 1000) == pytest.approx(500, rel=0.02)
    seen = []
    for _ in range(30):
        observe(predictor, [20] * 50, 1000)
        refresh(predictor)
        seen.append(mean(predictor, 0, 1000))
    assert seen == sorted(seen, reverse=True)
    assert seen[3] == pytest.approx(20 + 480 / math.e, rel=0.12)  # after 200
    assert seen[-1] < 32


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
    of_all = mean(predictor, 0, 8000)
    assert of_all == mean(predictor, 0, 8000, short)  # nothing is known
    short_seen, long_seen = [of_all], [of_all]
    for _ in range(6):
        observe(predictor, [50], 8000, short)
        observe(predictor, [2500], 8000, long)
        refresh(predictor)
        short_seen.append(mean(predictor, 0, 8000, short))
        long_seen.append(mean(predictor, 0, 8000, long))
    assert short_seen == sorted(short_seen, reverse=True)
    assert of_all < long_seen[1] < 1.03 * min(long_seen[2:])
    assert short_seen[-1] < 0.35 * of_all
    assert long_seen[-1] > 3 * of_all
    assert mean(predictor, 0, 8000, other) == mean(predictor, 0, 8000)


def test_running_siblings_count_too():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [100], 8000, group)
    refresh(predictor)
    alone = [mean(predictor, g, 8000, group) for g in (0, 120)]
    refresh(predictor, [2000] * 7, [group] * 7)
    beside_longer_ones = [mean(predictor, g, 8000, group) for g in (0, 120)]
    assert alone[0] < mean(predictor, 0, 8000)
    assert (np.array(beside_longer_ones) > 2 * np.array(alone)).all()


def test_short_siblings_shorten_the_predictions_for_running_ones():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [90, 95, 100, 100, 105, 110, 115], 8000, group)
    refresh(predictor, [120], [group])
    rest = mean(predictor, 120, 8000, group) - 120
    assert rest < 0.45 * (mean(predictor, 120, 8000) - 120)


def test_a_sequence_is_not_its_own_sibling():
    predictor = taught()
    group = predictor.open_group()
    refresh(predictor, [1000], [group])
    assert mean(predictor, 1000, 8000, group) == mean(predictor, 1000, 8000)
    assert mean(predictor, 0, 8000, group) > mean(predictor, 0, 8000)


def test_a_group_at_its_limit_is_long():
    predictor = taught()
    group = predictor.open_group()
    observe(predictor, [1500] * 7, 1500, group)
    refresh(predictor)
    assert mean(predictor, 0, 1500) < 450
    assert mean(predictor, 0, 1500, group) > 1000


@pytest.mark.parametrize("draw", [lognormal, exponential, two_points])
def test_margin_is_in_deviations_of_the_sum(draw):
    for scale in (0.25, 2.0):
        check_margin(draw, scale)


def check_margin(draw, scale: float) -> None:
    lengths = draw(np.random.default_rng(9), 30_000)
    num = 4096
    sums = []
    for std_scale in (0.0, scale):
        predictor = LengthPredictor(20_000, memory=10**9, std_scale=std_scale)
        observe(predictor, lengths, 20_000)
        refresh(predictor)
        sums.append(predict(predictor, np.zeros(num, int), 20_000, together=num).sum())
    deviation = lengths.std() * np.sqrt(num)
    assert 0.75 < (sums[1] - sums[0]) / (scale * deviation) < 1.15


def test_the_margin_predicts_no_impossible_length():
    predictor = LengthPredictor(1000, memory=10**9, std_scale=1000.0)
    observe(predictor, [400, 600] * 5000, 1000)
    refresh(predictor)
    assert (sample(predictor, 0, 1000) == 1000).all()
    predictor = LengthPredictor(1000, memory=10**9, std_scale=1.0)
    observe(predictor, [400, 600] * 5000, 1000)
    refresh(predictor)
    assert np.mean(sample(predictor, 0, 1000) <= 600) > 0.98
    assert np.mean(sample(predictor, 0, 1000) == 600) > 0.75


def test_lengths_far_beyond_all_others_can_be_told_apart():
    """Though nearly no sequence gets there."""
    predictor = LengthPredictor(100_000, std_scale=0.0)
    group = predictor.open_group()
    observe(predictor, [3] * 5000, 100_000)
    observe(predictor, [100_000, 3], 200_000, group)
    refresh(predictor, [50_000, 60_000], [group, group])
    for handle in (NO_GROUP, group):
        for g in (0, 1, 40_000, 99_000, 99_999):
            predictions = sample(predictor, g, 100_000, handle)
            assert (predictions > g).all()
            assert (predictions <= 100_000).all()
    assert mean(predictor, 40_000, 100_000) < 41_000


def test_handles_are_reused_and_start_afresh():
    predictor = taught()
    first = predictor.open_group()
    observe(predictor, [10] * 50, 8000, first)
    refresh(predictor)
    assert mean(predictor, 0, 8000, first) < 60
    observe(predictor, [10], 8000, first)
    predictor.close_group(first)
    other = predictor.open_group()
    assert other != first  # the tables still know it
    assert mean(predictor, 0, 8000, other) > 350
    refresh(predictor)
    assert predictor.open_group() == first
    assert mean(predictor, 0, 8000, first) > 350


def test_predictions_keep_their_bounds_and_are_the_same_each_time():
    for seed in range(6):
        check_bounds_and_determinism(seed)


def check_bounds_and_determinism(seed: int) -> None:
    def run():
        rng = np.random.default_rng(seed)
        max_length = int(rng.choice([1, 7, 100, 5000, 131_072]))
        prior = {"prior_mean": 0.5, "initial_wait": 200} if seed % 2 else {}
        predictor = LengthPredictor(max_length, num_buckets=64, memory=100, **prior)
        predictor.expect(max_length, 50)
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
            answer = predictor.predict(groups, lengths, limits, np.arange(50))
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
            assert mean(predictor, g, limit) == pytest.approx(exact, rel=0.025, abs=1)


def test_no_sequences_have_no_predictions():
    predictor = LengthPredictor(100)
    refresh(predictor)
    assert predict(predictor, NONE, 100).shape == (0,)


def test_the_mean_is_that_of_the_lengths_up_to_a_limit() -> None:
    chance = np.random.default_rng(0)
    lengths = np.ceil(chance.exponential(200.0, 20_000)).astype(np.int64)
    predictor = LengthPredictor(4096, memory=10**6)
    predictor.observe(np.full(len(lengths), NO_GROUP), lengths, np.full(len(lengths), 4096))
    predictor.refresh(np.empty(0, np.int64), np.empty(0, np.int64))
    for limit in (1, 50, 200, 1000, 10**6):
        expected = np.minimum(lengths, limit).mean()
        assert predictor.mean(limit) == pytest.approx(expected, rel=0.03), limit


def test_the_mean_follows_the_prior_until_lengths_are_known() -> None:
    predictor = LengthPredictor(1000, prior_mean=0.5)
    assert predictor.mean(100) == 50.0
    assert predictor.mean(10**6) == 500.0
    assert predictor.mean(1) == 1.0
