"""Following parameters through a traced program to where they are multiplied.

The jaxpr is interpreted forward. Of every variable two things are known: which
leaves it is, up to layout, precision and constant factors, and whether it depends
on the example. A rule per primitive, in the table `_RULES`, says what becomes of
both; where a leaf meets the example in a matrix product or a convolution, the rule
counts. A primitive without a rule loses the leaves that enter it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal


class Value(NamedTuple):
    """What is known of a variable: never both a leaf and data."""

    leaves: frozenset[int] = frozenset()  # the leaves that it elementwise is
    data: bool = False  # whether it depends on the example


class Tally:
    """The counts of a piece of program, and the leaves that it lost."""

    def __init__(self):
        self.macs: Counter[int] = Counter()
        self.unknown: dict[int, str] = {}

    def lose(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            self.unknown.setdefault(leaf, reason)

    def add(self, part: "Tally", times: int = 1) -> None:
        self.macs.update({leaf: times * macs for leaf, macs in part.macs.items()})
        self.unknown = part.unknown | self.unknown


def interpret(jaxpr: Jaxpr, args: Sequence[Value], tally: Tally) -> Sequence[Value]:
    """Follow the leaves through a program; return what is known of its results."""
    known = dict.fromkeys(jaxpr.constvars, Value())
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return Value() if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _unfollowed)
        results = rule(eqn, [read(atom) for atom in eqn.invars], tally)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _body(jaxpr: Any) -> Jaxpr:
    """Return the program itself; since JAX 0.11 both types are one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _leaves(values: Iterable[Value]) -> frozenset[int]:
    return frozenset().union(*(value.leaves for value in values))


def _depends(values: Iterable[Value]) -> bool:
    return any(value.data for value in values)


def _plain(eqn: JaxprEqn, args: Sequence[Value]) -> list[Value]:
    """Return results that are no leaves."""
    return [Value(data=_depends(args))] * len(eqn.outvars)


def _unfollowed(
    eqn: JaxprEqn,
    args: Sequence[Value],
    tally: Tally,
    why: str = "its result is not the parameter elementwise",
) -> list[Value]:
    """Lose the leaves among the operands: the rule of all unlisted primitives."""
    tally.lose(_leaves(args), f"{eqn.primitive.name}: {why}")
    return _plain(eqn, args)


def _same(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> Sequence[Value]:
    """Each result is its operand, in another layout, precision or place."""
    del tally
    return args[: len(eqn.outvars)]


# The operand of an elementwise rule that must not be a leaf, where there is one.
_NO_LEAF = {"mul": None, "div": 1, "select_n": 0}


def _scale(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> list[Value]:
    """A leaf times (or divided by, or selected by) a constant remains that leaf."""
    leaves, position = _leaves(args), _NO_LEAF[eqn.primitive.name]
    if leaves and _depends(args):
        why = "an elementwise operation with the example is no matrix product"
        return _unfollowed(eqn, args, tally, why)
    if position is not None and args[position].leaves:
        return _unfollowed(eqn, args, tally)
    return [Value(leaves, _depends(args))]


def _shift(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> list[Value]:
    """A leaf plus an activation is an activation, and the leaf has no MACs in it."""
    if _depends(args):
        return _plain(eqn, args)
    why = "a sum with what is not computed from the example is another parameter"
    return _unfollowed(eqn, args, tally, why)


def _product(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> list[Value]:
    """A matrix product or convolution: where the MACs are."""
    if all(value.leaves for value in args):
        why = "the product of two parameters is not followed"
        return _unfollowed(eqn, args, tally, why)
    if not _depends(args):
        why = "the product with a constant is another parameter"
        return _unfollowed(eqn, args, tally, why)
    macs = _MACS[eqn.primitive.name](eqn)
    if macs is None:
        why = "its MACs are not defined with both strides and input dilation"
        return _unfollowed(eqn, args, tally, why)
    tally.macs.update(dict.fromkeys(_leaves(args), macs))
    return _plain(eqn, args)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _dot_macs(eqn: JaxprEqn) -> int:
    """Count every element of the result times the contracted size."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = [_shape(eqn.invars[0])[axis] for axis in contracted]
    return math.prod((*_shape(eqn.outvars[0]), *depth))


def _conv_macs(eqn: JaxprEqn) -> int | None:
    """Count every element of the result times the part of the kernel it sees.

    The kernel's own shape makes groups come out right. An axis with input dilation
    (a transposed convolution) counts input size x taps, not output size x taps;
    with strides on top of that nothing simple holds.
    """
    lhs, rhs, out = map(_shape, (*eqn.invars, *eqn.outvars))
    lhs_axes, rhs_axes, out_axes = eqn.params["dimension_numbers"]
    dilation, strides = eqn.params["lhs_dilation"], eqn.params["window_strides"]
    if any(d > 1 and s > 1 for d, s in zip(dilation, strides, strict=True)):
        return None
    macs = out[out_axes[0]] * out[out_axes[1]] * rhs[rhs_axes[1]]
    axes = zip(lhs_axes[2:], rhs_axes[2:], out_axes[2:], dilation, strict=True)
    for lhs_axis, rhs_axis, out_axis, d in axes:
        macs *= rhs[rhs_axis] * (lhs[lhs_axis] if d > 1 else out[out_axis])
    return macs


_MACS = {"dot_general": _dot_macs, "conv_general_dilated": _conv_macs}


def _call(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> Sequence[Value]:
    """A program inside the program."""
    name = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    return interpret(_body(eqn.params[name]), args, tally)


def _scan(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> list[Value]:
    """The body counts `length` times, once it is known what depends on the example.

    A leaf in the carry must come back from the body as it went in.
    """
    body = _body(eqn.params["jaxpr"])
    # Operands are (consts, carry, xs), results (carry, ys); xs and ys have one axis
    # more than in the body. The parameters that number them differ between versions.
    carried = _same_rank(eqn.outvars, body.outvars)
    consts = _same_rank(eqn.invars, body.invars) - carried
    start = carry = list(args[consts : consts + carried])
    while True:
        part = Tally()
        inputs = [*args[:consts], *carry, *args[consts + carried :]]
        results = interpret(body, inputs, part)
        back, ys = results[:carried], results[carried:]
        widened = [_widen(*pair) for pair in zip(carry, back, strict=True)]
        if widened == carry:
            break
        carry = widened
    tally.add(part, times=eqn.params["length"])
    for first, last, result in zip(start, carry, back, strict=True):
        if not first.leaves == last.leaves == result.leaves:
            why = "scan: the parameter is in the carry and the body changes it"
            tally.lose(first.leaves | result.leaves, why)
    return [*carry, *ys]


def _same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """Count the pairs of variables that have equally many axes."""
    pairs = zip(map(_shape, outer), map(_shape, inner), strict=True)
    return sum(len(o) == len(i) for o, i in pairs)


def _widen(before: Value, after: Value) -> Value:
    """What holds of a variable that is now the one value, now the other."""
    same = before.leaves == after.leaves
    return Value(before.leaves if same else frozenset(), before.data or after.data)


def _cond(eqn: JaxprEqn, args: Sequence[Value], tally: Tally) -> list[Value]:
    """All branches must count the same for a leaf, and give the same leaf back."""
    index, *operands = args
    tally.lose(index.leaves, "cond: the parameter chooses the branch")
    parts, results = [], []
    for branch in eqn.params["branches"]:
        parts.append(Tally())
        results.append(interpret(_body(branch), operands, parts[-1]))
    for part in parts:  # the counts of the first stand for all
        tally.add(part, times=1 if part is parts[0] else 0)
    for leaf in _leaves(operands):
        counts = [part.macs[leaf] for part in parts]
        if len(set(counts)) > 1:
            tally.lose([leaf], f"cond: its branches count {counts} MACs")
    merged = []
    for values in zip(*results, strict=True):
        leaves, data = _leaves(values), index.data or _depends(values)
        if leaves and (data or any(value.leaves != leaves for value in values)):
            tally.lose(leaves, "cond: its result is not always the same parameter")
            leaves = frozenset()
        merged.append(Value(leaves, data))
    return merged


# Primitives by name; some names differ between versions of JAX.
_LAYOUT = ("broadcast_in_dim", "reshape", "rev", "squeeze", "transpose")
_VALUE = ("convert_element_type", "neg", "reduce_precision")
_PLACE = ("copy", "device_put", "reshard", "sharding_constraint")
_MARK = ("name", "optimization_barrier", "stop_gradient")
_CALLS = ("closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")
_REMAT = ("checkpoint", "remat", "remat2")

_RULES: dict[str, Callable[..., Sequence[Value]]] = {
    **dict.fromkeys(_LAYOUT + _VALUE + _PLACE + _MARK, _same),
    **dict.fromkeys(_NO_LEAF, _scale),
    **dict.fromkeys(("add", "add_any", "sub"), _shift),
    **dict.fromkeys(_MACS, _product),
    **dict.fromkeys(_CALLS + _REMAT, _call),
    "scan": _scan,
    "cond": _cond,
    "while": partial(_unfollowed, why="the number of iterations is not known"),
}
