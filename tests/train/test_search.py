"""The length of a step along functions whose lowest point is known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_viz.train.search import LENGTHS_TRIED, SEARCHES, line_search


@settings(max_examples=60, deadline=None)
@given(best=st.floats(1e-3, 15), curvature=st.floats(0.1, 10))
def test_a_parabola_is_searched_to_its_lowest_point(best, curvature):
    def at(t):
        return curvature * (t - best) ** 2

    length, tried = line_search(at, at(0), "parabola")
    assert length == pytest.approx(best, rel=0.01) and tried <= 4 + abs(math.log2(best))
    for rule in ("first", "least"):
        length, tried = line_search(at, at(0), rule)
        assert length in LENGTHS_TRIED and at(length) < at(0) and tried <= len(LENGTHS_TRIED)


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.sampled_from([0.0, 0.5, 1.5, math.nan, math.inf]), min_size=40, max_size=40))
def test_the_result_is_the_best_of_what_was_seen_whatever_that_is(numbers):
    for rule in SEARCHES:
        seen, values = {0.0: 1.0}, iter(numbers)

        def at(t):
            seen[t] = next(values)  # noqa: B023
            return seen[t]  # noqa: B023

        length, tried = line_search(at, 1.0, rule)
        assert tried == len(seen) - 1
        assert seen[length] == min(x for x in seen.values() if x == x)
        assert (length == 0) == (not any(x < 1.0 for x in seen.values()))


def test_the_parabola_is_never_longer_to_find_a_decrease_and_never_higher_than_the_first():
    for at in (lambda t: -t, lambda t: math.exp(-5 * t) + t, lambda t: (t - 0.01) ** 2 * (1 + 100 * t)):
        first, tried = line_search(at, at(0), "first")
        best, also = line_search(at, at(0), "parabola")
        assert at(best) <= at(first) and also <= tried + 7


def test_where_every_length_is_worse_nothing_is_taken():
    for rule in SEARCHES:
        tried = 16 if rule == "parabola" else 31
        assert line_search(lambda t: 1.0 + t, 1.0, rule) == (0.0, tried)
        assert line_search(lambda t: math.nan, 1.0, rule) == (0.0, tried)
