"""What is connected, what is zero and what it costs, counted kernel by kernel."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from scl_jax._features import FeatureAxes, reduced_axes
from scl_jax._macs import UnknownMacs
from scl_jax._masked import MaskedParams, check_masked, check_no_nan
from scl_jax._paths import PyTree, leaves_by_path, listed
from scl_jax._table import Macs, Report, Row, Totals

Leaves = dict[str, tuple[Any, Any]]  # path -> weight, mask variable

_LARGEST_COUNT = np.iinfo(np.int32).max


def report(
    masked: MaskedParams,
    macs: PyTree | None = None,
    *,
    feature_axes: FeatureAxes = -1,
    next_layer: Mapping[str, str] | None = None,
) -> Report:
    """Count connections, nonzeros, features and MACs, kernel by kernel.

    Counted in integers and on the devices where the arrays are: only counts per
    feature come to the host.

    Args:
      masked: what `mask_params` made; concrete arrays, sharded or not.
      macs: what `count_macs` returned, to show MACs per example. Those of leaves
        that are not masked are left out.
      feature_axes: the axes of a kernel that tell its features apart: an int, a
        tuple, or a function (path, leaf) -> axes, as in `normalize_by_feature`.
      next_layer: path of a masked kernel -> path of the masked kernel that reads
        its features, to count features without output. The latter's input axis is
        -2, as in Dense and Conv; input i is feature i modulo the number of
        features, as channels-last flattening between Conv and Dense has it.

    Returns:
      A `Report`.

    Raises:
      TypeError: if `masked` is no MaskedParams or not concrete, a mask variable is
        not floating, or `feature_axes` is no int, tuple of ints or callable.
      ValueError: if the trees do not fit, no leaf is masked or a masked one is
        empty, a mask variable is NaN, a feature axis is out of range or given
        twice, MACs are no int that is a multiple of the kernel's size,
        `next_layer` names a path that is not masked or a kernel with other
        inputs, or 2**31 weights belong to one feature.

    Example:
      >>> weight = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
      >>> mask = jnp.array([[0.1, -0.1, -0.1], [0.1, -0.1, 0.1]])
      >>> masked = MaskedParams({"bias": jnp.zeros(3), "kernel": weight},
      ...                       {"bias": None, "kernel": mask})
      >>> print(report(masked))
      path    shape   weights  connections  nnz  sparsity  features  without input
      ----------------------------------------------------------------------------
      kernel  (2, 3)        6            3    2    0.6667         3              2
      ----------------------------------------------------------------------------
      total                 6            3    2    0.6667         3              2
      ----------------------------------------------------------------------------
      sparsity over the masked kernels: 0.6667 = 4 zeros / 6 weights in masked kernels
      sparsity over all parameters: 0.4444 = 4 zeros in masked kernels / 9 parameters
      MACs per example in the masked kernels: not counted
      FLOPs = 2 x MACs
      >>> totals = report(masked, macs={"bias": 0, "kernel": 6}).totals
      >>> totals.macs, totals.macs_remaining, totals.flops_remaining
      (6, 2, 4)
    """
    check_masked(masked, "report")
    weights = leaves_by_path(masked.weights)
    masks = leaves_by_path(masked.masks)
    leaves = {p: (w, masks[p]) for p, w in weights.items() if masks[p] is not None}
    for path, pair in leaves.items():
        for leaf in pair:
            if isinstance(leaf, Tracer) or not hasattr(leaf, "__array__"):
                raise TypeError(
                    "report: needs concrete arrays, outside of jitted functions; "
                    f"{path} is a {type(leaf).__name__}"
                )
    if not leaves or not all(mask.size for _, mask in leaves.values()):
        shapes = listed(f"{path} {mask.shape}" for path, (_, mask) in leaves.items())
        raise ValueError(
            "report: there must be masked leaves, and none of them empty; "
            f"masked are: {shapes or 'none'}"
        )
    check_no_nan(masked.masks, "report")
    entries = leaves_by_path(masked.weights if macs is None else macs)
    if list(entries) != list(weights):
        raise ValueError(
            "report: macs must have the structure of the weights, as count_macs "
            f"returns it; they are: {listed(weights)}; macs has: {listed(entries)}"
        )
    next_layer = dict(next_layer or {})
    unmasked = sorted({*next_layer, *next_layer.values()} - set(leaves))
    if unmasked:
        raise ValueError(
            f"report: next_layer must name masked leaves; {listed(unmasked)} are "
            f"none; masked are: {listed(leaves)}"
        )

    rows = []
    for path, (_, mask) in leaves.items():
        axes = reduced_axes(feature_axes, path, mask, "report")
        connections, nnz = _counts(path, leaves, axes)
        remaining = int(nnz.sum())
        without_output = macs_of_weight = None
        if path in next_layer:
            reader = next_layer[path]
            without_output = _without_output(path, nnz.size, reader, leaves)
        if macs is not None:
            macs_of_weight = _macs_of_weight(path, entries[path], mask.size)
        row = Row(
            path=path,
            shape=mask.shape,
            weights=mask.size,
            connections=int(connections.sum()),
            nnz=remaining,
            sparsity=(mask.size - remaining) / mask.size,
            features=nnz.size,
            features_without_input=int(np.sum(nnz == 0)),
            features_without_output=without_output,
            macs=_times(macs_of_weight, mask.size),
            macs_remaining=_times(macs_of_weight, remaining),
        )
        rows.append(row)
    # Frameworks keep functions and other things beside the arrays.
    parameters = sum(getattr(leaf, "size", 0) for leaf in weights.values())
    return Report(tuple(rows), _totals(rows, parameters))


def _counts(
    path: str, leaves: Leaves, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return connections and nonzeros, summed over `axes`, as int64 on the host."""
    weight, mask = leaves[path]
    if math.prod(mask.shape[axis] for axis in axes) > _LARGEST_COUNT:
        raise ValueError(
            "report: less than 2**31 weights must belong to a feature; "
            f"{path} has shape {mask.shape}"
        )
    connections, nnz = _device_counts(weight, mask, axes)
    return np.asarray(connections, np.int64), np.asarray(nnz, np.int64)


@functools.partial(jax.jit, static_argnames="axes")
def _device_counts(weight, mask, axes):
    connected = mask >= 0
    nonzero = connected & (weight != 0)
    # Not in float32, whose sums are not exact above 2**24.
    return [jnp.sum(x, axes, dtype=jnp.int32) for x in (connected, nonzero)]


def _without_output(path: str, features: int, reader: str, leaves: Leaves) -> int:
    """Count the features of `path` whose weights in the kernel `reader` are zero."""
    (_, mask), (_, next_mask) = leaves[path], leaves[reader]
    axes = range(next_mask.ndim)
    if len(axes) < 2 or next_mask.shape[-2] % features:
        raise ValueError(
            "report: the input axis (-2) of the next kernel must be a multiple of the "
            f"features; {path} of shape {mask.shape} has {features} features, "
            f"next_layer says that {reader} of shape {next_mask.shape} reads them"
        )
    _, nnz = _counts(reader, leaves, (*axes[:-2], axes[-1]))
    return int(np.sum(nnz.reshape(-1, features).sum(axis=0) == 0))


def _macs_of_weight(path: str, macs: Any, size: int) -> Macs:
    """Return the MACs that each of the kernel's weights takes part in."""
    if isinstance(macs, UnknownMacs):
        return macs
    if not isinstance(macs, int | np.integer) or macs < 0 or macs % size:
        raise ValueError(
            "report: MACs must be UnknownMacs or an int, equal for all weights of a "
            f"kernel and so a multiple of its size; at {path} of size {size} got "
            f"{macs!r}"
        )
    return int(macs) // size


def _times(macs: Macs, count: int) -> Macs:
    return macs * count if isinstance(macs, int) else macs


def _totals(rows: list[Row], parameters: int) -> Totals:
    sums = {
        field.name: _sum([(row.path, getattr(row, field.name)) for row in rows])
        for field in dataclasses.fields(Row)
        if field.name not in ("path", "shape")
    }
    zeros = sums["weights"] - sums["nnz"]
    return Totals(
        **sums | {"sparsity": zeros / sums["weights"]},
        parameters=parameters,
        sparsity_over_all_parameters=zeros / parameters,
        flops=_times(sums["macs"], 2),
        flops_remaining=_times(sums["macs_remaining"], 2),
    )


def _sum(terms: list[tuple[str, Any]]) -> Any:
    """Sum the second of (path, term); it is None or unknown where a term is."""
    if any(term is None for _, term in terms):
        return None
    unknown = [f"{p}: {x.reason}" for p, x in terms if isinstance(x, UnknownMacs)]
    return UnknownMacs(listed(unknown)) if unknown else sum(x for _, x in terms)
