"""How a budget falls from everything to its target."""

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Callable[..., float | jax.Array]  # step -> fraction

_POWERS = {"cubic": 3, "linear": 1}
_LOOKED_AT = 1001  # steps at which a user's schedule is looked at
_TOLERANCE = 0.005  # relative, between where it ends and the target


class Allowance:
    """What may be spent at each step, as arguments say that are checked here.

    Args:
      target: a float in (0, 1]: the fraction that is left; an int >= 1: the cost.
      schedule: "cubic", "linear", "constant", or a function step -> fraction.
      begin_step: from here it falls.
      end_step: here it is at the target; None: nine tenths of `freeze_step`.
      freeze_step: from here on nothing changes.
      caller: whom to name in errors.

    Raises:
      TypeError: if the target is no number, a step no int, or the schedule is neither.
      ValueError: as `meet_budget` says.
    """

    def __init__(
        self,
        target: float | int,
        schedule: str | Schedule,
        begin_step: int,
        end_step: int | None,
        freeze_step: int,
        caller: str,
    ):
        _check_target(target, caller)
        if end_step is None:
            end_step = max(1, freeze_step * 9 // 10) if type(freeze_step) is int else 0
        steps = (begin_step, end_step, freeze_step)
        if any(type(step) is not int for step in steps):
            raise TypeError(
                f"{caller}: begin_step, end_step and freeze_step must be ints, got "
                f"{', '.join(map(repr, steps))}"
            )
        if not 0 <= begin_step < end_step <= freeze_step:
            raise ValueError(
                f"{caller}: steps must be 0 <= begin_step < end_step <= freeze_step, "
                f"got {begin_step}, {end_step}, {freeze_step}"
            )
        if callable(schedule):
            values = _values(schedule, freeze_step, caller)
            self._ends_at = float(values[-1])
        elif not isinstance(schedule, str) or schedule not in (*_POWERS, "constant"):
            error = ValueError if isinstance(schedule, str) else TypeError
            raise error(
                f"{caller}: schedule must be one of {', '.join(_POWERS)}, constant, or "
                f"a function step -> fraction; got {schedule!r}"
            )
        self._target, self._schedule, self._caller = target, schedule, caller
        self._begin, self._end, self._freeze = steps
        self.falls_for = end_step - begin_step  # steps

    def fraction(self, total: float) -> float:
        """Return the target as a fraction of the cost of all connections."""
        if isinstance(self._target, numbers.Integral):
            # Costs are floats, whose sum may be a hair less than it should.
            if self._target > total * (1 + 1e-9):
                raise ValueError(
                    f"{self._caller}: the target must be at most the cost of all "
                    f"connections, {total:,.0f}; got {self._target:,}"
                )
            fraction = min(float(self._target) / total, 1.0)
        else:
            fraction = float(self._target)
        away = abs(self._ends_at - fraction) if callable(self._schedule) else 0.0
        if away > _TOLERANCE * fraction:
            raise ValueError(
                f"{self._caller}: the schedule must have come to the target, "
                f"{fraction:g}, by freeze_step; at step {self._freeze} it is at "
                f"{self._ends_at:g}"
            )
        return fraction

    def at(self, step: jax.Array, total: float) -> jax.Array:
        """Return the fraction that is allowed at a step, shape ()."""
        fraction = self.fraction(total)
        if callable(self._schedule):
            return jnp.asarray(self._schedule(step), jnp.float32)
        if self._schedule == "constant":
            return jnp.where(step < self._begin, jnp.float32(1), jnp.float32(fraction))
        falling = optax.polynomial_schedule(
            1.0, fraction, _POWERS[self._schedule], self.falls_for, self._begin
        )
        # Compiled, it may be rounded to a little below its end.
        return jnp.maximum(jnp.float32(fraction), falling(step))


def _check_target(target: float | int, caller: str) -> None:
    if not isinstance(target, numbers.Real) or isinstance(target, bool | np.bool_):
        raise TypeError(
            f"{caller}: target must be a float, the fraction that is left, or an int, "
            f"its cost; got {target!r}"
        )
    if isinstance(target, numbers.Integral):
        if target < 1:
            raise ValueError(f"{caller}: a target cost must be >= 1, got {target}")
    elif not 0 < target <= 1:
        raise ValueError(
            f"{caller}: a target fraction must be in (0, 1], got {target}; an absolute "
            "cost is an int"
        )


def _values(schedule: Schedule, freeze_step: int, caller: str) -> np.ndarray:
    """Return a user's schedule at steps up to the freeze; raise where it is none."""
    steps = np.unique(np.linspace(0, freeze_step, _LOOKED_AT).astype(np.int32))
    with jax.ensure_compile_time_eval():
        values = np.asarray(jax.vmap(schedule)(steps), np.float64)
    for step, value, before in zip(steps, values, [math.inf, *values], strict=False):
        if not 0 < value <= 1:
            raise ValueError(
                f"{caller}: a schedule must give fractions in (0, 1]; at step {step} "
                f"it is {value:g}"
            )
        if value > before:
            raise ValueError(
                f"{caller}: a schedule must not grow; it is {value:g} at step {step}, "
                f"after {before:g}"
            )
    return values
