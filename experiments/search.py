"""The search for the setting of a method that leaves as many weights as asked for.

It has no state but what is known by now: what was left with each value that has been
tried, whoever tried it and for what. So any process goes on where another one stopped,
and what was tried for one sparsity serves the next.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

MOST = 0.99  # the settings that are searched are below 1
# Where the search gives up: so many values are known, or one is as near to the next.
TRIES = 30
NEAR = 1e-3
# More of the setting makes a network denser again where that leaves so many times what
# the sparsest does.
AGAIN = 2.0
# Next to the sparsest what is left is up to the seeds, and no longer to the setting.
FLAT = 0.01
# What is left where trainings diverged: less than one weight of any network.
NOTHING = 1e-9


class Next(NamedTuple):
    """The value of a setting to go on with."""

    value: float
    settled: bool  # there is none to try: it is what the search comes to


def search(
    left: Mapping[float, float], allowed: float, tolerance: float, first: float
) -> Next:
    """Return the value to try next, or that to settle for.

    Args:
      left: of each value that has been tried, > 0, the fraction of the weights that was
        left, at least `NOTHING`; the larger a value, the sparser, but for noise, and up
        to where more of it makes the network denser again.
      allowed: the fraction that is searched.
      tolerance: how far from it, relative, is near enough.
      first: what to try where nothing is known.

    Returns:
      The nearest of those within the tolerance, if there are; the next to try; or the
      nearest of all, where none is to be expected from another try. What is denser
      again beyond the sparsest is none of them.

    Example:
      >>> search({}, 0.1, 0.01, 3e-4)
      Next(value=0.0003, settled=False)
      >>> search({3e-4: 0.2, 1.2e-3: 0.05}, 0.1, 0.01, 3e-4)
      Next(value=0.0006, settled=False)
      >>> search({3e-4: 0.2, 6e-4: 0.1005, 1.2e-3: 0.05}, 0.1, 0.01, 3e-4)
      Next(value=0.0006, settled=True)
    """
    if not left:
        return Next(first, False)
    falling = _falling(left)
    nearest = min(falling, key=lambda value: abs(math.log(left[value] / allowed)))
    if abs(left[nearest] / allowed - 1) <= tolerance:
        return Next(nearest, True)
    value = min(float(f"{_towards(left, falling, allowed):.4g}"), MOST)
    known = any(abs(value / one - 1) < NEAR for one in left)
    given_up = known or len(left) >= TRIES
    return Next(nearest, True) if given_up else Next(value, False)


def _falling(left: Mapping[float, float]) -> Mapping[float, float]:
    """Return what is known but for what is denser again beyond the sparsest.

    One of those may leave as much as a value on the way there does, and a line between
    the two leads nowhere. What diverged is no such way: who gets past it may be denser.
    """
    finite = [value for value in left if left[value] > NOTHING]
    if not finite:
        return left
    sparsest = min(finite, key=lambda value: left[value])
    most = AGAIN * left[sparsest]
    return {v: one for v, one in left.items() if v <= sparsest or one <= most}


def _around(
    left: Mapping[float, float], allowed: float
) -> tuple[float | None, float | None]:
    """Return the values that left a little too much and a little too little."""
    dense = [value for value in left if left[value] > allowed]
    sparse = [value for value in left if left[value] <= allowed]
    return (
        min(dense, key=lambda value: (left[value], -value), default=None),
        max(sparse, key=lambda value: (left[value], -value), default=None),
    )


def _towards(
    left: Mapping[float, float], falling: Mapping[float, float], allowed: float
) -> float:
    """Return the value from which the fraction allowed is to be expected."""
    dense, sparse = _around(falling, allowed)
    if sparse is None:
        sparsest = min(left, key=lambda value: left[value])
        larger = [value for value in left if value > sparsest]
        if larger:  # too much of it made the network denser again: DST's resets
            flat = min(larger) / sparsest - 1 < FLAT
            return sparsest if flat else math.sqrt(sparsest * min(larger))
    if dense is None or sparse is None:
        # Rather over the other side than just short of it.
        end = max(left) if sparse is None else min(left)
        far = max(left[end] / allowed, allowed / left[end])
        step = min(max(far**1.5, 1.1), 3)
        return end * step if sparse is None else end / step
    if dense >= sparse:  # noise
        return math.sqrt(dense * sparse)
    # Between the two, on a line through their logarithms; in the middle if both are
    # far off, where the line is none. And not on top of either.
    above, below = (
        min(abs(math.log(left[value] / allowed)), 1) for value in (dense, sparse)
    )
    part = min(max(above / (above + below), 0.1), 0.9)
    return dense ** (1 - part) * sparse**part
