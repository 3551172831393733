"""Intervals of proportions: against formulas written out another way, and by the share of samples that they cover."""

from __future__ import annotations

import math
from itertools import product

import pytest
from scipy import optimize
from scipy import stats as distributions

from compress.stats.proportions import clustered_mcnemar, mcnemar, paired_change, proportion

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (350, 381), (10, 10), (1, 1)])
def test_the_score_interval_holds_the_shares_that_the_score_test_does_not_reject(hits: int, trials: int) -> None:
    value, found = proportion(hits, trials)

    def excess(share: float) -> float:
        return abs(hits / trials - share) - Z * math.sqrt(share * (1 - share) / trials)

    assert value == hits / trials
    low = 0.0 if hits == 0 else optimize.brentq(excess, 1e-12, value - 1e-9)
    high = 1.0 if hits == trials else optimize.brentq(excess, value + 1e-9, 1 - 1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_a_change_counts_discordant_pairs_and_its_interval_adds_half_a_trial_to_each_cell() -> None:
    value, found = paired_change(132, 107, 1144)
    assert value == pytest.approx(25 / 1144)
    cells = {(1, 1): 227.5, (0, 1): 132.5, (1, 0): 107.5, (0, 0): 678.5}
    whole = sum(cells.values())
    mean = sum(count * (after - before) for (before, after), count in cells.items()) / whole
    square = sum(count * (after - before) ** 2 for (before, after), count in cells.items()) / whole
    half = Z * math.sqrt((square - mean**2) / whole)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert (round(found.low, 3), round(found.high, 3)) == (-0.005, 0.048)


def test_no_change_at_all_still_has_a_width() -> None:
    value, found = paired_change(0, 0, 381)
    assert value == 0 and -found.low == found.high and 0.004 < found.high < 0.006


@pytest.mark.parametrize(("more", "less"), [(0.05, 0.05), (0.02, 0.1), (0.01, 0.01), (0.3, 0.2)])
def test_the_interval_of_a_change_covers_the_truth_about_as_often_as_it_says(more: float, less: float) -> None:
    """Summed over every outcome of 40 trials, so nothing is drawn."""
    trials, covered = 40, 0.0
    for gained, lost in product(range(trials + 1), repeat=2):
        if gained + lost > trials:
            continue
        found = paired_change(gained, lost, trials)[1]
        if found.low <= more - less <= found.high:
            cells = [gained, lost, trials - gained - lost]
            covered += float(distributions.multinomial.pmf(cells, trials, [more, less, 1 - more - less]))
    assert 0.93 < covered <= 1.0


@pytest.mark.parametrize("counts", [(5, 4), (-1, 4), (0, 0)])
def test_counts_that_are_no_proportion_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        proportion(*counts)


@pytest.mark.parametrize("counts", [(3, 2, 4), (-1, 0, 4), (0, 0, 0)])
def test_pairs_that_do_not_fit_together_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        paired_change(*counts)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 9), (9, 3), (6, 6), (40, 71)])
def test_mcnemars_exact_test_is_the_two_sided_binomial_one(gained: int, lost: int) -> None:
    expected = distributions.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)
    with pytest.raises(ValueError, match="begin at 0"):
        mcnemar(-1, lost)


def test_the_clustered_test_is_mcnemars_where_every_cluster_is_one_trial() -> None:
    gained, lost = [1] * 14 + [0] * 36, [0] * 14 + [1] * 27 + [0] * 9
    assert clustered_mcnemar(gained, lost) == pytest.approx(distributions.chi2.sf((14 - 27) ** 2 / 41, 1))


def test_changes_that_come_together_count_less() -> None:
    apart = clustered_mcnemar([1] * 12, [0] * 12)
    together = clustered_mcnemar([6, 6, 0, 0], [0, 0, 0, 0])
    assert apart is not None and together is not None and apart < 0.01 < 0.1 < together


def test_one_cluster_gives_no_test_and_no_change_is_no_evidence() -> None:
    assert clustered_mcnemar([5], [1]) is None
    assert clustered_mcnemar([0, 0], [0, 0]) == 1.0
    with pytest.raises(ValueError, match="do not fit"):
        clustered_mcnemar([1, 2], [1])
