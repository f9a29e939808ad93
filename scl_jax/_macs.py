"""MACs per parameter, read off the traced program."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from scl_jax._follow import Tally, Value, interpret
from scl_jax._masked import MaskedParams, check_masked
from scl_jax._paths import PyTree, leaf_path, listed


@dataclass(frozen=True)
class UnknownMacs:
    """The entry of a parameter whose MACs could not be read off the program.

    It is no number and adds to none: a total over it fails instead of being low.

    Attributes:
      reason: the primitive where the parameter was lost, and why.
    """

    reason: str


def count_macs(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *example_args: PyTree,
    batch_size: int = 1,
) -> PyTree:
    """Count the multiply-accumulates (MACs) that each parameter takes part in.

    The program is traced, not run, and nothing is known of layers or their names:
    a parameter used twice counts twice, one inside `lax.scan` counts `length`
    times, one that is not used counts 0. FLOPs = 2 x MACs.

    - Matrix products (`dot_general`) and convolutions of a parameter with the
      example, or with what was computed from it, are counted, through casts,
      reshapes, masks and scales that do not depend on the example.
    - A product of two activations, such as q @ k^T, belongs to no parameter. What
      is added to an activation (bias, position embedding) has no MACs.
    - Padding is computed with: its taps count. A transposed convolution counts
      each input position times each tap; the zeros put between are no MACs.
    - Masks are no zeros here: the count is that of the dense layer.

    Args:
      apply_fn: the model as a function (params, *example_args) -> anything.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`; or a `MaskedParams`,
        of which the weights are counted.
      *example_args: what the model computes from: pytrees of arrays or
        `jax.ShapeDtypeStruct`, holding `batch_size` examples. Everything in here
        is the example; let `apply_fn` close over flags, keys and statistics.
      batch_size: the number of examples, by which the counts are divided.

    Returns:
      A pytree like `params` (like `params.weights` of a `MaskedParams`): at each
      leaf the MACs per example, an int, or `UnknownMacs` where the program uses
      the leaf in a way that is not followed (embedding lookups, scales of
      normalization layers, weights computed from weights, `while` loops).

    Raises:
      TypeError: if `apply_fn` is not callable or a leaf of `params` is no array.
      ValueError: if `params` or `example_args` hold no array, `batch_size` is no
        positive int, or a count is not divisible by it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def net(params, x):
      ...     hidden = jax.nn.relu(x @ params["hidden"] + params["bias"])
      ...     return params["scale"] * (hidden @ params["out"])
      >>> params = {"hidden": jnp.ones((784, 300)), "bias": jnp.zeros(300),
      ...           "out": jnp.ones((300, 10)), "scale": jnp.ones(10)}
      >>> macs = count_macs(net, params, jnp.ones(784))
      >>> macs["hidden"], macs["out"], macs["bias"]
      (235200, 3000, 0)
      >>> print(macs["scale"].reason)
      mul: an elementwise operation with the example is no matrix product
    """
    if not callable(apply_fn):
        raise TypeError(
            f"count_macs: apply_fn must be callable, got {type(apply_fn).__name__}"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(
            f"count_macs: batch_size must be a positive int, got {batch_size!r}"
        )
    if not jax.tree.leaves(example_args):
        raise ValueError("count_macs: example_args must hold an array, got none")
    if isinstance(params, MaskedParams):
        check_masked(params, "count_macs")
    weights = params.weights if isinstance(params, MaskedParams) else params
    leaves = jax.tree_util.tree_flatten_with_path(weights)[0]
    paths = [leaf_path(path) for path, _ in leaves]
    wrong = [leaf_path(path) for path, leaf in leaves if not hasattr(leaf, "shape")]
    if wrong:
        raise TypeError(
            "count_macs: params must hold arrays or jax.ShapeDtypeStruct; these are "
            f"neither: {listed(wrong)}"
        )
    if not paths:
        raise ValueError(f"count_macs: params must hold an array, got {params!r}")

    program = jax.make_jaxpr(apply_fn)(params, *example_args)
    # The weights come first in MaskedParams, too; mask variables are no data.
    others = len(jax.tree.leaves(params)) - len(paths)
    args = [Value(frozenset({leaf})) for leaf in range(len(paths))]
    args += [Value()] * others
    args += [Value(data=True)] * (len(program.jaxpr.invars) - len(args))
    tally = Tally()
    interpret(program.jaxpr, args, tally)

    entries = []
    for leaf, path in enumerate(paths):
        macs, rest = divmod(tally.macs[leaf], batch_size)
        if leaf in tally.unknown:
            entries.append(UnknownMacs(tally.unknown[leaf]))
        elif rest:
            raise ValueError(
                f"count_macs: example_args must hold batch_size={batch_size} "
                f"examples; at {path} the count {tally.macs[leaf]} is not divisible"
            )
        else:
            entries.append(macs)
    return jax.tree.structure(weights).unflatten(entries)
