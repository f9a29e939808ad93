"""The one spelling of leaf paths: `Dense_0/kernel`, in every framework."""

from collections.abc import Iterable
from typing import Any

import jax

PyTree = Any
KeyPath = tuple[Any, ...]


def is_none(x: Any) -> bool:
    """Tell whether `x` is the None that stands for an unmasked leaf."""
    return x is None


def leaf_path(key_path: KeyPath) -> str:
    """Return the "/"-joined path of a leaf.

    Args:
      key_path: the key path that `jax.tree_util.tree_flatten_with_path` gives.

    Returns:
      The keys joined by "/". The last key is dropped where it is the attribute
      `value` that flax.nnx puts behind each Variable, so that a path is the
      same on Variables and on raw arrays.

    Example:
      >>> import jax
      >>> tree = {"layers": [{"weight": 1.0}]}
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path(tree)[0]
      >>> leaf_path(path)
      'layers/0/weight'
    """
    # A parameter that is itself called "value" sits behind a dictionary key
    # (attention's value projection, say), not behind an attribute.
    attribute = jax.tree_util.GetAttrKey("value")
    if len(key_path) > 1 and key_path[-1] == attribute:
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of `tree` by path, None included, in the tree's order.

    Raises:
      ValueError: if two leaves have the same path (a key that contains "/").
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    by_path = {leaf_path(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        paths = [leaf_path(path) for path, _ in leaves]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"paths must be unique; two leaves are at {listed(twice)}")
    return by_path


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join names for an error message, the first `most` of them."""
    names = list(names)
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
