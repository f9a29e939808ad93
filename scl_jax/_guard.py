"""The Optax transform that keeps a layer from losing its last connections."""

import jax
import jax.numpy as jnp
import optax

from scl_jax._masked import map_masks
from scl_jax._paths import leaf_path


def keep_connections(minimum: int = 1) -> optax.GradientTransformation:
    r"""Keep at least `minimum` connections in every masked leaf.

    An update that would leave a leaf with fewer is changed for the mask variables
    that it would leave largest, `minimum` of them: those that it would prune end at
    the threshold 0, where they connect. All others move as they would have. A layer
    without a connection cuts the network in two: this is what it costs to make that
    impossible.

    It must be the last transform of the mask variables: what follows it could prune
    again.

    Args:
      minimum: connections per leaf, at least 1. Equal mask variables are kept
        together, so that there can be more.

    Returns:
      A stateless `optax.GradientTransformation` for a tree of mask variables (or a
      `MaskedParams`, of which the weights are left alone). `update` needs params.
      It counts the connections of each leaf in every step, and searches only when a
      leaf has too few; across devices it sends counts, never mask variables. NaN is
      no connection, and is left where it is.

    Raises:
      TypeError: if `minimum` is no int. (Under `optax.inject_hyperparams` name it
        among `static_args`: Optax makes an array of every other number.)
      ValueError: if it is less than 1; at init and update, if a leaf has fewer
        entries; at update, if params is None.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = keep_connections(1)
      >>> masks = {"kernel": jnp.array([[0.5], [0.25]])}
      >>> pruning_all = {"kernel": jnp.array([[-1.0], [-1.0]])}
      >>> updates, _ = tx.update(pruning_all, tx.init(masks), masks)
      >>> updates["kernel"].tolist()
      [[-0.5], [-1.0]]

    Reference:
      Our choice. Layer collapse: Tanaka et al., "Pruning neural networks without any
      data by iteratively conserving synaptic flow", arXiv 2006.05467.
    """
    if type(minimum) is not int:
        raise TypeError(f"keep_connections: minimum must be an int, got {minimum!r}")
    if minimum < 1:
        raise ValueError(f"keep_connections: minimum must be >= 1, got {minimum}")

    def check(key_path, s):
        if s.size < minimum:
            raise ValueError(
                f"keep_connections: minimum must be at most the size of every masked "
                f"leaf; {leaf_path(key_path)} has {s.size} entries, got {minimum}"
            )
        return s

    def keep(key_path, u, s):
        check(key_path, s)
        moved = (s + u).astype(s.dtype)  # what optax.apply_updates makes of it

        def revive():
            # NaN is lowest here, so that it takes no number's place.
            ranked = jnp.where(jnp.isnan(moved), -jnp.inf, moved)
            largest = moved >= kth_largest(ranked, minimum)
            back = (-s).astype(u.dtype)
            # In fewer bits than s has, -s may be rounded to below the threshold.
            back = jnp.where(s + back < 0, jnp.nextafter(back, jnp.inf), back)
            return jnp.where(largest & (moved < 0), back, u)

        return jax.lax.cond(jnp.sum(moved >= 0) < minimum, revive, lambda: u)

    def init_fn(params):
        map_masks(check, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "keep_connections: reads the mask variables; call "
                "update(updates, state, params)"
            )
        return map_masks(keep, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """Return the k-th largest entry, shape (), without sorting or gathering.

    Bits of the answer are decided from the highest down by how many entries are at
    least as large: as many counts as a number has bits, which add up over devices.
    """
    width = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    sign = unsigned.type(1 << (width - 1))
    # In this order of unsigned integers lie the floats, the negative ones reversed.
    ordered = jnp.where(bits & sign, ~bits, bits | sign)

    def decide(i, answer):
        candidate = answer | (sign >> i.astype(unsigned))
        return jnp.where(jnp.sum(ordered >= candidate) >= k, candidate, answer)

    answer = jax.lax.fori_loop(0, width, decide, unsigned.type(0))
    bits = jnp.where(answer & sign, answer ^ sign, ~answer)
    return jax.lax.bitcast_convert_type(bits, x.dtype)
