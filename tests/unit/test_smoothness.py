"""Smoothness of paths with known answers, the edit distance against its definition, rank correlation against scipy."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from vae_dist.evaluate.smoothness import (
    _rank_correlation,
    changed_fraction,
    edit_distance,
    neighbour_distance,
    nll_bump,
    order_correlation,
    path_length_ratio,
    smoothness,
)

EOS = 2
# One word after another: aaaa -> baaa -> bbaa -> bbba -> bbbb, in ids.
STRAIGHT = [[6] * i + [5] * (4 - i) + [EOS] for i in range(5)]
JUMP = [[5, 5, 5, 5, EOS]] * 2 + [[6, 6, 6, 6, EOS]] * 3
# There, too far, and back.
DETOUR = [[5, EOS], [6, 6, 6, EOS], [7, EOS]]


def slow_edit_distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


ROW = st.lists(st.integers(3, 6), max_size=7)


@given(ROW, ROW, ROW)
def test_edit_distance_is_its_recursion_and_a_metric(a: list[int], b: list[int], c: list[int]) -> None:
    assert edit_distance(a, b) == slow_edit_distance(tuple(a), tuple(b)) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_a_straight_path_by_hand() -> None:
    assert neighbour_distance(STRAIGHT) == pytest.approx(1 / 5)
    assert changed_fraction(STRAIGHT) == 1.0
    assert path_length_ratio(STRAIGHT) == 1.0
    assert order_correlation(STRAIGHT) == pytest.approx(1.0)


def test_a_jump_changes_at_one_step_only() -> None:
    assert neighbour_distance(JUMP) == pytest.approx(4 / 5 / 4)
    assert changed_fraction(JUMP) == 1 / 4
    assert path_length_ratio(JUMP) == 1.0
    # Distances 0 0 4 4 4 from the one end: ranks 1.5 1.5 4 4 4 against 1 2 3 4 5, and the same from the other.
    assert order_correlation(JUMP) == pytest.approx(np.corrcoef([1.5, 1.5, 4, 4, 4], range(5))[0, 1])


def test_a_detour_is_longer_than_the_way() -> None:
    # d(5, 666) = 3, d(666, 7) = 3, d(5, 7) = 1.
    assert path_length_ratio(DETOUR) == 6.0
    assert neighbour_distance(DETOUR) == pytest.approx((3 / 4 + 3 / 4) / 2)
    # Distances 0 3 1 from the one end, 1 3 0 from the other: ranks 1 3 2 against 1 2 3, twice.
    assert order_correlation(DETOUR) == pytest.approx(0.5)


def test_a_path_that_goes_back_between_its_ends_is_out_of_order() -> None:
    back = [STRAIGHT[i] for i in (0, 3, 2, 1, 4)]
    # Ranks 1 4 3 2 5 against 1 2 3 4 5, from either end: 1 - 6 * (4 + 4) / (5 * 24).
    assert order_correlation(back) == pytest.approx(0.6)
    assert path_length_ratio(back) == (3 + 1 + 1 + 3) / 4


def test_a_path_without_change_defines_no_ratio_and_no_order() -> None:
    still = [[5, EOS]] * 4
    assert (neighbour_distance(still), changed_fraction(still)) == (0.0, 0.0)
    assert math.isnan(path_length_ratio(still)) and math.isnan(order_correlation(still))
    assert neighbour_distance([[], [], []]) == 0.0


def test_the_bump_is_the_middle_less_the_ends() -> None:
    assert nll_bump([2.0, 9.0, 5.0, 9.0, 3.0]) == pytest.approx(2.5)
    assert nll_bump([2.0, 5.0, 6.0, 3.0]) == pytest.approx(3.0)
    assert nll_bump([3.0, 1.0, 3.0]) == pytest.approx(-2.0)


def test_means_leave_out_the_paths_that_do_not_define_a_value() -> None:
    still = [[5, EOS]] * 5
    found = smoothness([STRAIGHT, still, JUMP], [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, [0.0, 0.0, 6.0, 0.0, 0.0]])
    assert (found["pairs"], found["steps"]) == (3, 4)
    assert found["neighbour_distance"] == pytest.approx((1 / 5 + 0 + 1 / 5) / 3)
    assert found["changed_fraction"] == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert found["path_length_ratio"] == pytest.approx(1.0)
    assert found["order_correlation"] == pytest.approx((1 + order_correlation(JUMP)) / 2)
    assert found["nll_bump"] == pytest.approx((0 + 0 + 6) / 3)
    assert math.isnan(smoothness([still], [[1.0] * 5])["path_length_ratio"])


def test_paths_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of points, at least 3, .* got \[3, 5\]"):
        smoothness([STRAIGHT, DETOUR], [[0.0] * 5, [0.0] * 3])
    with pytest.raises(ValueError, match=r"got \[2\]"):
        smoothness([STRAIGHT[:2]], [[0.0] * 2])
    with pytest.raises(ValueError, match="NLL for each"):
        smoothness([STRAIGHT], [])


@given(st.lists(ROW, min_size=3, max_size=6))
def test_values_lie_where_they_are_said_to(path: list[list[int]]) -> None:
    assert 0 <= neighbour_distance(path) <= 1
    assert changed_fraction(path) == sum(a != b for a, b in pairwise(path)) / (len(path) - 1)
    ratio, order = path_length_ratio(path), order_correlation(path)
    assert math.isnan(ratio) == (path[0] == path[-1])
    assert math.isnan(ratio) or ratio >= 1
    assert math.isnan(order) or -1 - 1e-12 <= order <= 1 + 1e-12


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    x, y = map(np.array, zip(*pairs, strict=True))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    assert _rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
