"""paired.py: under a true null at most 5 % false claims, intervals that cover, and the words for too few seeds."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from orchestration.compare import paired

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

NULLS: dict[str, Draw] = {
    "normal": lambda g, size: g.standard_normal(size),
    "two runs of the same skewed distribution": lambda g, size: g.lognormal(0, 1, size) - g.lognormal(0, 1, size),
    "heavy tails": lambda g, size: g.standard_t(2, size),
    "ties": lambda g, size: g.integers(-1, 2, size).astype(float),
}
"""Differences where the setting changes nothing."""
SKEWED = np.exp(0.25**2 / 2)
MEANS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda g, size: g.standard_normal(size), 0.0),
    "skewed": (lambda g, size: g.lognormal(0, 0.25, size), SKEWED),
    "more skewed": (lambda g, size: g.gamma(4, 1, size), 4.0),
}
"""Differences and their true mean; skewness 0, 0.8 and 1."""


def false_claims(ps: np.ndarray) -> tuple[float, float]:
    """Their share at 5 %, and the most that chance allows in this number of repetitions if 5 % is true (3 standard errors)."""
    return float((ps <= 0.05).mean()), 0.05 + 3 * (0.05 * 0.95 / len(ps)) ** 0.5


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("seeds", [4, 6, 10])
def test_without_a_difference_at_most_one_claim_in_twenty_is_false(null, seeds):
    differences = NULLS[null](np.random.default_rng(seeds), (4000, seeds))
    share, most = false_claims(np.array([paired.sign_flip(values) for values in differences]))
    assert share <= most
    assert seeds >= paired.FEWEST or share == 0


def test_random_flips_make_no_more_false_claims_than_all_flips():
    differences = NULLS["heavy tails"](np.random.default_rng(17), (200, 18))
    share, most = false_claims(np.array([paired.sign_flip(values) for values in differences]))
    assert share <= most


@pytest.mark.parametrize("null", ["normal", "two runs of the same skewed distribution", "heavy tails"])
def test_five_comparisons_with_one_baseline_make_even_one_false_claim_in_at_most_one_table_in_twenty(null):
    generator = np.random.default_rng(5)
    draw = {"normal": generator.standard_normal, "heavy tails": lambda size: generator.standard_t(2, size)}.get(
        null, lambda size: generator.lognormal(0, 1, size)
    )
    cells = draw((1500, 6, 10))  # tables, the baseline and five others, seeds
    ps = np.array([[paired.sign_flip(cell - table[0]) for cell in table[1:]] for table in cells])
    share, most = false_claims(np.array([min(paired.holm(list(table))) for table in ps]))
    assert share <= most
    uncorrected, _ = false_claims(ps.min(axis=1))
    assert uncorrected > 0.1  # so the correction is what holds it down


def test_a_real_difference_is_found():
    differences = np.random.default_rng(8).normal(1.5, 1, (500, 8))
    assert np.mean([paired.sign_flip(values) <= 0.05 for values in differences]) > 0.9


@pytest.mark.parametrize("distribution", MEANS)
@pytest.mark.parametrize(("seeds", "repetitions"), [(6, 800), (10, 800), (20, 400)])
def test_intervals_cover_the_true_mean(distribution, seeds, repetitions):
    assert covered(distribution, seeds, repetitions, paired.interval) >= 0.93


def test_the_same_simulation_sees_that_the_bootstrap_as_it_comes_covers_too_seldom():
    def plain(values: np.ndarray) -> tuple[float, float]:
        return stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval

    assert covered("normal", 6, 800, plain) < 0.9


def covered(distribution: str, seeds: int, repetitions: int, interval: Callable) -> float:
    draw, mean = MEANS[distribution]
    intervals = map(interval, draw(np.random.default_rng(seeds), (repetitions, seeds)))
    return float(np.mean([low <= mean <= high for low, high in intervals]))


def test_below_six_seeds_there_is_no_interval_because_even_all_that_was_seen_does_not_cover():
    values = np.random.default_rng(0).standard_normal((20_000, paired.FEWEST))
    for seeds in (paired.FEWEST - 1, paired.FEWEST):
        seen = values[:, :seeds]
        assert np.mean((seen.min(1) <= 0) & (seen.max(1) >= 0)) == pytest.approx(1 - 2.0 ** (1 - seeds), abs=0.01)
    assert 1 - 2.0 ** (1 - (paired.FEWEST - 1)) < 0.95 < 1 - 2.0 ** (1 - paired.FEWEST)
    assert paired.interval(values[0, :-1]) is None
    assert paired.interval(values[0]) is not None


@pytest.mark.parametrize(
    "values", [[0.0] * 8, [0.5] * 8, [70.1 - 70, 60.1 - 60, 50.1 - 50, 40.1 - 40, 30.1 - 30, 20.1 - 20]], ids=["none", "equal", "rounded"]
)
def test_differences_without_spread_have_no_interval_and_raise_no_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired.interval(values) is None


@pytest.mark.parametrize(
    "values", [[0, 0, 0, 0, 0, 1.0], [0.0] * 9 + [1.0], [-1.0, 1.0] * 4, [1e-9 * i for i in range(7)], [1e9, 0, 0, 0, 0, 0, 1]]
)
def test_an_interval_of_odd_values_is_a_finite_one_around_their_mean(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = paired.interval(values)
    assert min(values) <= low <= np.mean(values) <= high <= max(values)


def test_the_same_differences_give_the_same_interval_and_the_same_p():
    values = list(np.random.default_rng(3).standard_normal(20))
    assert paired.interval(values) == paired.interval(values)
    assert paired.sign_flip(values) == paired.sign_flip(values)


def test_the_test_counts_every_flip_of_signs_that_lies_as_far_from_nothing():
    values = [0.3, -0.1, 0.4, 0.2, 0.6]
    flips = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=5)]
    assert paired.sign_flip(values) == pytest.approx(sum(flip >= sum(values) - 1e-12 for flip in flips) / 32)


@pytest.mark.parametrize(
    ("values", "p"), [([0.1], 1), ([0.1, 0.2, 0.3], 0.25), ([0.1] * 6, 0.03125), ([0.0] * 6, 1), ([0.1, 0.2, -0.3], 1)]
)
def test_p_of_a_few_differences_is_the_one_that_can_be_counted_by_hand(values, p):
    assert paired.sign_flip(values) == p


def test_scipys_permutation_test_agrees():
    for values in np.random.default_rng(4).normal(0.4, 1, (5, 9)):
        theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert paired.sign_flip(values) == pytest.approx(theirs)


def test_random_flips_estimate_what_all_flips_give():
    for values in np.random.default_rng(6).normal(0.5, 1, (5, 12)):
        assert paired.sign_flip(values, exact_up_to=0) == pytest.approx(paired.sign_flip(values), abs=0.01)


def test_no_p_is_smaller_than_the_smallest_possible_one():
    for seeds in (1, 2, 6, paired.EXACT_UP_TO, 70):
        assert paired.sign_flip(np.linspace(1, 2, seeds)) == paired.smallest_p(seeds)
    assert paired.sign_flip(np.linspace(1, 2, paired.EXACT_UP_TO + 1)) >= paired.smallest_p(paired.EXACT_UP_TO + 1)


def test_holms_correction_steps_down_and_keeps_the_order():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_only_seeds_that_both_have_are_compared():
    found = paired.compare({0: 71.0, 1: 72.0, 2: 70.0, 5: 1.0}, {2: 71.0, 1: 70.0, 0: 71.0, 7: 99.0})
    assert (found.seeds, found.values, found.mean) == ((0, 1, 2), (0.0, 2.0, -1.0), pytest.approx(1 / 3))
    assert found.better == 0.5
    assert (found.low, found.high, found.p) == (None, None, 1.0)
    assert paired.compare({0: 1.0}, {1: 1.0}) is None


def test_less_of_a_loss_is_better_and_its_difference_keeps_its_sign():
    found = paired.compare({0: 1.0, 1: 2.0, 2: 2.0, 3: 5.0}, {0: 2.0, 1: 3.0, 2: 2.0, 3: 4.0}, higher=False)
    assert (found.mean, found.better) == (-0.25, 0.625)


def test_a_table_is_corrected_over_all_that_could_be_compared():
    found = [paired.compare(dict.fromkeys(range(6), value), dict.fromkeys(range(6), 0.0)) for value in (1.0, 2.0)]
    one, none, two = paired.corrected([found[0], None, found[1]])
    assert none is None
    assert (one.p, one.p_holm, two.p_holm) == (0.03125, 0.0625, 0.0625)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([1], "with 1 seed no difference can be significant at 5 % (the smallest possible p is 1); 6 are needed"),
        ([3], "with 3 seeds no difference can be significant at 5 % (the smallest possible p is 0.25); 6 are needed"),
        ([6], "with 6 seeds the smallest possible p is 0.031"),
        (
            [6, 5, 6],
            "with 6 seeds no difference can be significant at 5 % (the smallest possible p is 0.031, "
            "0.094 after Holm's correction over 3 comparisons); 7 are needed",
        ),
        ([7] * 3, "with 7 seeds the smallest possible p is 0.016, 0.047 after Holm's correction over 3 comparisons"),
        (
            [40] * 5000,
            "with 40 seeds no difference can be significant at 5 % (the smallest possible p is 1.5e-05, "
            "0.076 after Holm's correction over 5000 comparisons)",
        ),
    ],
    ids=["1", "3", "6", "6 for 3", "7 for 3", "5000"],
)
def test_what_a_number_of_seeds_can_show(counts, words):
    assert paired.can_show(counts) == [words]


def test_comparisons_with_different_seeds_have_a_line_for_too_few_and_one_for_enough():
    assert paired.can_show([3, 4, 9, 10]) == [
        "with 4 seeds no difference can be significant at 5 % (the smallest possible p is 0.12, "
        "0.25 after Holm's correction over 4 comparisons); 8 are needed",
        "with 9 seeds the smallest possible p is 0.0039, 0.012 after Holm's correction over 4 comparisons",
    ]
    # behind three that are beyond doubt, the last one needs no correction any more
    assert paired.can_show([6, 20, 20, 20]) == [
        "with 6 seeds the smallest possible p is 0.031, 0.031 after Holm's correction over 4 comparisons"
    ]
    assert paired.can_show([]) == []


@pytest.mark.parametrize("comparisons", [1, 2, 3, 5, 12])
def test_the_seeds_that_are_needed_suffice_and_one_less_does_not(comparisons):
    needed = paired.seeds_needed(comparisons)
    for seeds, enough in ((needed, True), (needed - 1, False)):
        one = paired.compare({seed: 1.0 + seed for seed in range(seeds)}, dict.fromkeys(range(seeds), 0.0))
        assert (paired.corrected([one] * comparisons)[0].p_holm <= paired.ALPHA) is enough
        assert ("no difference" in paired.can_show([seeds] * comparisons)[0]) is not enough
