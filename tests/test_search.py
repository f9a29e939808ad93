"""The search for a setting, as a function of what is known."""

import pytest

from experiments.search import MOST, NOTHING, TRIES, search


def test_between_two_values_a_power_law_is_met_at_once():
    def left(value):
        return 0.02 * value**-0.4

    known = {value: left(value) for value in (0.012, 0.03)}
    found = search(known, 0.1, 0.01, 1e-3)
    assert not found.settled
    assert left(found.value) == pytest.approx(0.1, rel=1e-3)


def test_the_nearest_within_the_tolerance_is_settled_for():
    known = {1e-3: 0.109, 2e-3: 0.097, 3e-3: 0.092}
    assert search(known, 0.1, 0.1, 1e-3) == (2e-3, True)
    assert not search(known, 0.1, 0.01, 1e-3).settled


@pytest.mark.parametrize(
    "known",
    [
        {3e-3: 0.012, 3.02e-3: 0.3},  # denser again with hardly more
        {3e-3: 0.3, 3.002e-3: 0.002},  # a jump
        {MOST: 0.3},  # there is no more of it
        {1e-3 * 1.2**i: 0.3 for i in range(TRIES)},
    ],
)
def test_the_nearest_is_settled_for_where_another_try_would_not_come_nearer(known):
    found = search(known, 0.01, 0.01, 1e-3)
    assert found.settled
    assert found.value == min(known, key=lambda value: abs(known[value] - 0.01))


def test_an_outlier_far_off_does_not_turn_the_search_away():
    # 0.05 was denser by chance; the two that are nearest to 0.1 lie around it.
    known = {1e-2: 0.12, 2e-2: 0.08, 5e-2: 0.6}
    found = search(known, 0.1, 0.01, 1e-3)
    assert 1e-2 < found.value < 2e-2


def test_what_is_denser_again_beyond_the_sparsest_is_passed_over():
    # DST: from 3e-3 on layers starve and are set back, whatever is left then.
    falling = {5e-4: 0.15, 2e-3: 0.02}
    again = {3e-3: 0.3, 4e-3: 0.1, 5e-3: 0.07}
    assert search(falling | again, 0.1, 0.01, 1e-3) == search(falling, 0.1, 0.01, 1e-3)
    assert not search(falling | again, 0.1, 0.01, 1e-3).settled
    # Noise is not: 2.1e-3 is the nearest, though 2e-3 was sparser.
    assert search(falling | {2.1e-3: 0.03}, 0.03, 0.01, 1e-3) == (2.1e-3, True)


def test_denser_again_with_more_is_looked_into_down_to_a_percent():
    known = {3e-3: 0.012, 3.1e-3: 0.3}
    assert 3e-3 < search(known, 0.01, 0.01, 1e-3).value < 3.1e-3


def test_training_that_diverged_tells_nothing_of_what_lies_beyond():
    known = {1e-3: 0.2, 2e-3: NOTHING, 3e-3: 0.1}
    assert search(known, 0.1, 0.01, 1e-3) == (3e-3, True)
    assert search({2e-3: NOTHING}, 0.1, 0.01, 1e-3).value < 2e-3
