"""The unit step and the straight-through estimators that carry its gradient."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STE = Callable[[jax.Array], jax.Array]


def identity(s: jax.Array) -> jax.Array:
    """Return the proxy gradient of the identity, p(s) = 1: the default.

    Args:
      s: mask variables, any shape, floating.

    Returns:
      Ones in the shape and dtype of `s`. Positive everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> identity(jnp.array([-1.0, 2.0])).tolist()
      [1.0, 1.0]
    """
    return jnp.ones_like(s)


def unit_step(x: jax.Array, ste: STE = identity) -> jax.Array:
    r"""Compute the unit step, with the gradient of a straight-through estimator.

    .. math::
      H(x) = 1 \text{ if } x \ge 0 \text{ else } 0, \qquad
      \frac{\partial H}{\partial x} := p(x)

    where `p` is the proxy gradient. The true derivative is zero almost
    everywhere; as long as p > 0, `x` moves toward the side with the lower loss.

    Args:
      x: mask variables, any shape, any floating dtype.
      ste: the proxy gradient `p`: a hashable callable from an array to an array
        of the same shape, such as `identity` (the default), `LeakyReLU(0.1)`
        or `Softplus(4.0)`. Equal estimators share one compilation.

    Returns:
      Exactly 0 or 1, in the shape and dtype of `x`. NaN stays NaN, so that it
      shows in the loss instead of passing for a mask.

    Raises:
      TypeError: if `x` is not floating or `ste` is not a hashable callable.
      ValueError: if the proxy gradient has another shape than `x`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([-2.0, 0.0, 3.0])
      >>> unit_step(x).tolist()
      [0.0, 1.0, 1.0]
      >>> jax.grad(lambda x: unit_step(x, LeakyReLU(0.5)).sum())(x).tolist()
      [0.5, 1.0, 1.0]

    Reference:
      Bengio, Leonard, Courville, "Estimating or propagating gradients through
      stochastic neurons for conditional computation", arXiv 1308.3432, 2013.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"unit_step: x must be floating, got dtype {x.dtype}")
    return _step(x, checked_ste(ste, "unit_step"))


def checked_ste(ste: Any, caller: str) -> Any:
    """Return `ste`, or raise TypeError where it is no hashable callable."""
    try:
        hash(ste)  # a frozen dataclass with a list inside only says here that it can't
        if callable(ste) and not isinstance(ste, type):
            return ste
    except TypeError:
        pass
    raise TypeError(
        f"{caller}: ste must be a hashable callable from s to the proxy gradient, "
        f"such as scl_jax.identity, LeakyReLU(0.1) or Softplus(4.0); got {ste!r}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _step(x: jax.Array, ste: STE) -> jax.Array:
    del ste
    # Two selects and no arithmetic: exact in every dtype, and NaN passes through.
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    return jnp.where(jnp.isnan(x), x, jnp.where(x >= 0, one, zero))


def _step_forward(x: jax.Array, ste: STE) -> tuple[jax.Array, jax.Array]:
    return _step(x, ste), x


def _step_backward(ste: STE, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g * proxy_gradient(ste, x),)


_step.defvjp(_step_forward, _step_backward)


def proxy_gradient(ste: STE, x: jax.Array) -> jax.Array:
    """Return p(x) in the dtype of `x`; raise ValueError where its shape differs."""
    p = jnp.asarray(ste(x))
    if p.shape != x.shape:
        raise ValueError(
            f"{ste!r} must return a proxy gradient of the shape of its argument, "
            f"{x.shape}; got shape {p.shape}"
        )
    return p.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LeakyReLU:
    """Return the proxy gradient of a leaky ReLU: 1 for s >= 0, else the slope.

    Positive everywhere. Called on mask variables of any shape, it returns an
    array of the same shape and dtype.

    Attributes:
      negative_slope: p(s) for s < 0, a positive finite number.

    Raises:
      ValueError: if the slope is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> LeakyReLU(0.25)(jnp.array([-1.0, 2.0])).tolist()
      [0.25, 1.0]
    """

    negative_slope: float = 0.1

    def __post_init__(self):
        _check_positive("LeakyReLU: negative_slope", self.negative_slope)

    def __call__(self, s: jax.Array) -> jax.Array:
        one = jnp.ones_like(s)
        return jnp.where(s >= 0, one, self.negative_slope * one)


@dataclasses.dataclass(frozen=True)
class Softplus:
    """Return the proxy gradient of softplus: sigmoid(sharpness * s).

    The derivative of log(1 + exp(k s)) / k, with k the sharpness. Positive
    everywhere in the reals; in float32 it underflows to zero at about
    k * s < -100. Called on mask variables of any shape, it returns an array of
    the same shape and dtype.

    Attributes:
      sharpness: k, a positive finite number, in units of 1 / s.

    Raises:
      ValueError: if the sharpness is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> Softplus(2.0)(jnp.array([-100.0, 0.0, 100.0])).round(3).tolist()
      [0.0, 0.5, 1.0]
    """

    sharpness: float = 1.0

    def __post_init__(self):
        _check_positive("Softplus: sharpness", self.sharpness)

    def __call__(self, s: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.sharpness * s)


@dataclasses.dataclass(frozen=True)
class ReLU:
    """Return the proxy gradient of ReLU: 1 for s >= 0, else 0.

    A counter-example, for ablations: it is not positive. A connection that was
    cut gets no gradient and never returns.

    Example:
      >>> import jax.numpy as jnp
      >>> ReLU()(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 1.0]
    """

    def __call__(self, s: jax.Array) -> jax.Array:
        return jnp.where(s >= 0, jnp.ones_like(s), jnp.zeros_like(s))


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Return the proxy gradient of the clipped identity: 1 for abs(s) <= 1, else 0.

    A counter-example, for ablations: it is not positive. A mask variable
    outside [-1, 1] is in a dead zone and does not move any more.

    Example:
      >>> import jax.numpy as jnp
      >>> Clipped()(jnp.array([-2.0, 0.5, 2.0])).tolist()
      [0.0, 1.0, 0.0]
    """

    def __call__(self, s: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(s) <= 1, jnp.ones_like(s), jnp.zeros_like(s))


def nonpositive_intervals(
    ste: STE, low: float = -10.0, high: float = 10.0, *, points: int = 20_001
) -> tuple[tuple[float, float], ...]:
    """Find where a proxy gradient is not positive.

    The method's principle is p(s) > 0 everywhere: a mask variable then always
    moves toward the side with the lower loss.

    Args:
      ste: the estimator to look at.
      low: the left end of the range, in units of s.
      high: the right end of the range.
      points: how many equally spaced values of s, both ends included, are
        tried. A gap narrower than their distance can be missed.

    Returns:
      The intervals (first, last) of tried values at which p is zero, negative
      or NaN. Empty where p is positive on the whole range.

    Raises:
      TypeError: if `ste` is not a hashable callable.
      ValueError: if the range is empty or not finite, or `points` is below 2.

    Example:
      >>> nonpositive_intervals(LeakyReLU(0.1))
      ()
      >>> nonpositive_intervals(Clipped(), -3.0, 3.0, points=13)
      ((-3.0, -1.5), (1.5, 3.0))
    """
    checked_ste(ste, "nonpositive_intervals")
    if not (math.isfinite(low) and math.isfinite(high) and low < high and points >= 2):
        raise ValueError(
            "nonpositive_intervals: low < high must be finite and points >= 2, "
            f"got low={low}, high={high}, points={points}"
        )
    s = np.linspace(low, high, points, dtype=np.float32)
    bad = ~(np.asarray(proxy_gradient(ste, jnp.asarray(s))) > 0)
    edges = np.diff(np.concatenate([[0], bad.astype(np.int8), [0]]))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    pairs = zip(first, last, strict=True)
    return tuple((float(s[i]), float(s[j])) for i, j in pairs)


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, numbers.Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
