"""Which leaves are masked: rules over paths."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scl_jax._paths import PyTree, is_none, leaf_path, leaves_by_path, listed

Rule = Callable[[str, Any], bool]


def kernels(path: str, leaf: Any) -> bool:
    """Select the kernels: leaves called kernel, weight or w with two axes or more.

    That is what Flax (`kernel`), Equinox (`weight`) and Haiku (`w`) call the
    weights of dense, convolution and attention layers. Biases, normalization
    scales and Flax embeddings are left alone; an Equinox embedding is called
    `weight` too and is left out with `exclude`.

    Args:
      path: the "/"-joined path of the leaf.
      leaf: the leaf; only its number of axes is read.

    Returns:
      True where the leaf is to be masked.

    Example:
      >>> import numpy as np
      >>> kernels("Dense_0/kernel", np.zeros((3, 2)))
      True
      >>> kernels("LayerNorm_0/weight", np.zeros(3))
      False
    """
    name = path.rpartition("/")[2]
    return name in ("kernel", "weight", "w") and getattr(leaf, "ndim", 0) >= 2


@dataclasses.dataclass(frozen=True, init=False)
class select:  # noqa: N801  (used as a function: select("head/kernel"))
    """Select the leaves whose path matches one of the patterns in full.

    Args:
      *patterns: regular expressions over "/"-joined paths. `mask_params` raises
        where one of them matches no parameter.

    Raises:
      ValueError: if there is no pattern, or one is no regular expression.
      TypeError: if a pattern is not a string.

    Example:
      >>> rule = select("block_[0-9]/kernel")
      >>> rule("block_1/kernel", None), rule("head/block_1/kernel", None)
      (True, False)
    """

    patterns: tuple[str, ...]

    def __init__(self, *patterns: str):
        object.__setattr__(self, "patterns", _checked("select", patterns))

    def __call__(self, path: str, leaf: Any) -> bool:
        del leaf
        return any(re.fullmatch(pattern, path) for pattern in self.patterns)

    def __repr__(self) -> str:
        return f"select({', '.join(map(_quoted, self.patterns))})"


@dataclasses.dataclass(frozen=True, init=False)
class exclude:  # noqa: N801
    """Select what `among` selects, but no leaf whose path matches a pattern.

    Args:
      *patterns: regular expressions over "/"-joined paths, matched in full.
        `mask_params` raises where one of them matches no parameter.
      among: the rule to take from; the kernels by default.

    Raises:
      ValueError: if there is no pattern, or one is no regular expression.
      TypeError: if a pattern is not a string.

    Example:
      >>> import numpy as np
      >>> rule = exclude("head/.*")
      >>> kernel = np.zeros((3, 2))
      >>> rule("block_1/kernel", kernel), rule("head/kernel", kernel)
      (True, False)
    """

    patterns: tuple[str, ...]
    among: Rule = kernels

    def __init__(self, *patterns: str, among: Rule = kernels):
        if not callable(among):
            raise TypeError(
                f"exclude: among must be a rule (path, leaf) -> bool, got {among!r}"
            )
        object.__setattr__(self, "patterns", _checked("exclude", patterns))
        object.__setattr__(self, "among", among)

    def __call__(self, path: str, leaf: Any) -> bool:
        excluded = any(re.fullmatch(pattern, path) for pattern in self.patterns)
        return not excluded and self.among(path, leaf)

    def __repr__(self) -> str:
        among = "" if self.among is kernels else f", among={self.among!r}"
        return f"exclude({', '.join(map(_quoted, self.patterns))}{among})"


def selected(params: PyTree, rule: Rule, caller: str) -> PyTree:
    """Return a tree of bool: which leaves of `params` the rule selects.

    Raises:
      ValueError: if `params` has no leaf, the rule selects none, or one of its
        patterns matches none.
      TypeError: if the rule is not callable or a selected leaf is not floating.
    """
    if not callable(rule):
        raise TypeError(
            f"{caller}: select must be a rule (path, leaf) -> bool, such as "
            f'scl_jax.kernels or scl_jax.select("head/kernel"); got {rule!r}'
        )
    by_path = leaves_by_path(params)
    paths = [path for path, leaf in by_path.items() if leaf is not None]
    if not paths:
        raise ValueError(f"{caller}: params has no leaves, got {params!r}")

    patterns = _patterns(rule)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            which = repr(rule) if len(patterns) == 1 else f'"{pattern}" of {rule!r}'
            raise ValueError(
                f"{caller}: {which} matched no parameter; "
                f"parameters are: {listed(paths)}"
            )
    chosen = {path for path in paths if rule(path, by_path[path])}
    if not chosen:
        name = getattr(rule, "__name__", repr(rule))
        raise ValueError(
            f"{caller}: {name} matched no parameter; parameters are: {listed(paths)}"
        )
    for path in sorted(chosen):
        dtype = getattr(by_path[path], "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{caller}: a masked leaf must be a floating array, "
                f"{path} is {dtype or type(by_path[path]).__name__}"
            )
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: leaf_path(key_path) in chosen, params, is_leaf=is_none
    )


def _patterns(rule: Rule) -> tuple[str, ...]:
    """Return the patterns of a rule and of the rules it is built from."""
    own = rule.patterns if isinstance(rule, select | exclude) else ()
    return own + (_patterns(rule.among) if isinstance(rule, exclude) else ())


def _checked(name: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not patterns:
        raise ValueError(f"{name}: give at least one pattern")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{name}: a pattern must be a string, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f'{name}: "{pattern}" is not a regular expression: {error}'
            ) from error
    return patterns


def _quoted(pattern: str) -> str:
    return f'"{pattern}"'
