"""Statistics of normalization layers, estimated anew once the masks rest.

A layer keeps m * old + (1 - m) * value, and shows neither m nor the value of a batch.
Both are found by giving it old statistics of our own.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from scl_jax._paths import PyTree, is_none, leaves_by_path, listed

_NAME = "reestimate_statistics"

# Old statistics that are larger than a batch's by this leave nothing of it in float32:
# what comes back is m times them, to the last bit of m.
_LOUDER_BITS = 30
# 1 - m is known to 3e-8 in float32: to one percent down to here.
_LEAST_SHARE = 3e-6
_ROUNDING = 1e-6  # relative; what two programs of the same formula may differ by
_TOLERANCE = 1e-2  # of what a batch moves the statistics by


def reestimate_statistics(
    update: Callable[[PyTree, Any], PyTree], statistics: PyTree, batches: Iterable[Any]
) -> PyTree:
    r"""Replace the moving averages of a network by plain averages over batches.

    BatchNorm keeps moving averages of the means and variances that it met in training.
    Some of the networks that it met had other connections: with m = 0.99 the averages
    are those of a few hundred steps. Once the masks rest, this makes them those of the
    network as it is, without training it:

    .. math::
      u(x, b) = m \, x + (1 - m) \, v_b, \qquad
      m = u(c, b_1) / c, \qquad
      v_b = u(0, b) / (1 - m)

    with c so large that v does not count. Nothing is known of layers: any that keeps
    such averages is served, each number with an m of its own in [0, 1).

    Args:
      update: what the trainer does with the statistics in a step: a function
        (statistics, batch) -> new statistics. In Flax Linen:
        `lambda s, x: model.apply({"params": params, "batch_stats": s}, x, train=True,
        mutable=["batch_stats"])[1]["batch_stats"]`, with params = `fold_masks(masked)`.
        It is called once a batch, and four times for the first: jit it, without
        donating, and give it a fixed key where it needs one.
      statistics: a pytree of arrays, as they are after training. Leaves that are not
        floating (counters) are given to `update` and returned as they are.
      batches: any iterable of what `update` takes; one is held at a time. They count
        alike, so they should be of one size.

    Returns:
      A pytree like `statistics` of the v averaged over the batches, in float32; where
      there are no floating statistics, `statistics` itself, and no batch is read. They
      are known to about 3e-8 / (1 - m), relatively: 3e-6 at m = 0.99. Variances are the
      averages of those within batches, as moving averages are: with n independent
      examples a batch they are too small by one part in n.

      A counter of how far the average has come from its zero start (Equinox's
      BatchNorm in mode "batch", Haiku's moving average) stays as it is: the result is
      right where that no longer matters, after 20 / (1 - m) steps of training.

    Raises:
      ValueError: if there is no batch; if m is not in [0, 1), or 1 - m is lost in
        float32; if statistics are not finite; if they are not such averages, or depend
        on each other; if `update` returns other leaves or shapes. The leaf is named.
        Equinox's BatchNorm in mode "ema" is refused where one is behind another: in
        training, too, it normalizes with the moving averages.
      TypeError: if `update` is not callable, or floating statistics have less than 32
        bits, or other dtypes when they come back: of bfloat16, 1 - m cannot be known.
        Cast them to float32, and what is returned back.

    Example:
      >>> def update(statistics, x):
      ...     return {"mean": 0.5 * statistics["mean"] + 0.5 * x.mean(0)}
      >>> batches = (jnp.array([[1.0, 8.0], [3.0, 8.0]]) * size for size in (1, 2))
      >>> old = {"mean": jnp.array([50.0, -1.0])}
      >>> print(reestimate_statistics(update, old, batches)["mean"])
      [ 3. 12.]

    Reference:
      The practice: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576,
      where it is called PreciseBN. Finding m and v from outside is our own.
    """
    if not callable(update):
        raise TypeError(
            f"{_NAME}: update must be a function (statistics, batch) -> statistics, "
            f"got {type(update).__name__}"
        )
    given = leaves_by_path(statistics)
    structure = jax.tree.structure(statistics, is_leaf=is_none)
    floating = {p: jnp.asarray(x) for p, x in given.items() if _is_floating(x)}
    for path, leaf in floating.items():
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"{_NAME}: statistics must have 32 bits or more; {path} is {leaf.dtype}"
            )
    if not floating:
        return statistics

    def updated(old, batch):
        """Return what `update` makes of other floating statistics, by path."""
        new = leaves_by_path(update(structure.unflatten((given | old).values()), batch))
        _check_like(new, given, floating)
        return {path: new[path] for path in floating}

    average, share, count = {}, {}, 0
    for count, batch in enumerate(batches, 1):
        of_batch = functools.partial(updated, batch=batch)
        new = of_batch({p: jnp.zeros_like(x) for p, x in floating.items()})
        if count == 1:
            average, share = new, _shares(of_batch, new, floating)
        else:
            average = {p: x + (new[p] - x) / count for p, x in average.items()}
    if not count:
        raise ValueError(f"{_NAME}: there must be a batch; batches held none")
    values = {p: x / share[p] for p, x in average.items()}
    return structure.unflatten((given | values).values())


def _shares(
    update: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    fresh: dict[str, jax.Array],
    given: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Return 1 - m for every number, after making sure that it means something.

    Args:
      update: from old statistics to new ones, always with the same batch.
      fresh: what it makes of zeros.
      given: the statistics after training.
    """
    for path in given:
        for x, origin in ((given[path], "given"), (fresh[path], "of the first batch")):
            if not jnp.isfinite(x).all():
                raise ValueError(
                    f"{_NAME}: statistics must be finite; those {origin} are not at "
                    f"{path}"
                )
    _, exponent = math.frexp(max(float(_largest(x)) for x in fresh.values()))
    loud = math.ldexp(1.0, exponent + _LOUDER_BITS)
    new = update({p: jnp.full_like(x, loud) for p, x in given.items()})
    memory = {p: (new[p] - x) / loud for p, x in fresh.items()}
    for path, m in memory.items():
        if not jnp.all((m >= -_ROUNDING) & (m <= 1 - _LEAST_SHARE)):
            raise ValueError(
                f"{_NAME}: update must keep moving averages, m * old + (1 - m) * value "
                f"with m in [0, 1), and 1 - m at least {_LEAST_SHARE}; at {path} m is "
                f"{float(m.min()):.7g} to {float(m.max()):.7g}"
            )
    share = {p: 1 - m for p, m in memory.items()}

    values = {p: x / share[p] for p, x in fresh.items()}
    for old in (given, values):
        new = update(old)
        for path, m in memory.items():
            gap = jnp.abs(new[path] - (m * old[path] + fresh[path]))
            size = jnp.maximum(_largest(old[path]), _largest(values[path]))
            if not jnp.all(gap <= (_TOLERANCE * share[path] + _ROUNDING) * size):
                raise ValueError(
                    f"{_NAME}: update must keep moving averages, m * old + (1 - m) * "
                    "value, in which m and value do not depend on any old statistics; "
                    f"at {path} it does not"
                )
    return share


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _check_like(
    new: dict[str, Any], given: dict[str, Any], floating: dict[str, jax.Array]
) -> None:
    """Raise where what `update` returned does not fit what it was given."""
    if new.keys() != given.keys():
        raise ValueError(
            f"{_NAME}: update must return the statistics that it is given, and no "
            f"other; they differ at {listed(sorted(new.keys() ^ given.keys()))}"
        )
    for path, leaf in floating.items():
        shape, dtype = jnp.shape(new[path]), jnp.result_type(new[path])
        if shape != leaf.shape:
            raise ValueError(
                f"{_NAME}: update must keep the shapes of the statistics; {path} of "
                f"{leaf.shape} became {shape}"
            )
        if dtype != leaf.dtype:
            raise TypeError(
                f"{_NAME}: update must keep the dtypes of the statistics; {path} of "
                f"{leaf.dtype} became {dtype}"
            )
