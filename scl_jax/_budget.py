"""The Optax transform that meets a budget of connections, or of what they cost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scl_jax._costs import CostOf, cost_of
from scl_jax._features import FeatureAxes
from scl_jax._guard import Guard, Places, after, settled
from scl_jax._masked import MaskedParams, mask_leaves, with_mask_leaves
from scl_jax._paths import PyTree, is_none, leaf_path
from scl_jax._rank import FIRST, LAST, Border, above, affordable, count, ranks
from scl_jax._schedule import Allowance, Schedule
from scl_jax._step import STE, checked_ste, identity, proxy_gradient

_NAME = "meet_budget"

# The controller's gains, the same for every network, budget and optimizer: one percent
# too many connections raise the coefficient by ten percent, and by ten percent more
# while they stay for an eighth of the steps in which the budget falls.
_GAIN, _INTEGRAL_TIME = 10.0, 1 / 8
# Of the coefficient, in units of the mean absolute mask gradient, of the largest leaf.
# Below the first the penalty does nothing; above the second nothing else is left of a
# normalized gradient.
_LOWEST, _HIGHEST = 1e-3, 1e2
_LEAST = 1e-9  # of all connections, so that the logarithm of none is finite
_STEEPEST = 80.0  # whose exponential is finite

# How often it looks at the mask variables while the budget falls, and the most steps
# between two looks: each costs some kernels for every leaf.
_LOOKS, _MOST_STEPS = 64, 50


class BudgetState(NamedTuple):
    """State of `meet_budget`."""

    step: jax.Array  # shape (), int32: steps taken; it stays at freeze_step
    penalty: jax.Array  # shape (), float32: the coefficient, loss per unit of cost
    excess: jax.Array  # shape (), float32: log of what was spent over what was allowed
    held: Places  # of the connections that the guard keeps until the next look
    inner: PyTree  # the state of the wrapped transform


def meet_budget(
    masks_tx: optax.GradientTransformation,
    target: float | int,
    *,
    freeze_step: int,
    end_step: int | None = None,
    begin_step: int = 0,
    schedule: str | Schedule = "cubic",
    costs: PyTree | None = None,
    weigh: bool = True,
    minimum: int = 1,
    feature_axes: FeatureAxes | None = None,
    ste: STE = identity,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap the optimizer of the mask variables so that they meet a budget.

    The penalty's coefficient, which is otherwise to be found by trial, becomes the
    multiplier of the constraint "connections <= allowed(step)", and is found while
    training:

    .. math::
      g \leftarrow g + \lambda_t \, c \, p(S), \qquad
      \log \lambda_{t+1} = \log \lambda_t + K \, (e_t - e_{t-1}) + K \, e_t / T,
      \qquad e_t = \log \frac{\sum c \, H(S)}{\mathrm{allowed}(t)}

    `masks_tx` then normalizes the sum, so that the penalty is the coupled one; do not
    add another to the loss. It is found anew 64 times while the budget falls, or every
    50 steps if that is more often, and stays within limits that are multiples of the
    mean gradient of the largest leaf: where that one has none, nothing is pruned before
    the cut. The last step before `freeze_step` moves no mask variable, but ranks them,
    all layers together, and cuts the connections to the budget exactly; from there on
    the masks rest, and the weights train on.

    Args:
      masks_tx: the optimizer of the mask variables, as it is without a budget:
        `optax.chain(normalize_by_feature(), optax.sgd(3e-4, 0.9))`.
      target: what is left at the freeze: a float in (0, 1] is a fraction of the cost
        of all connections, an int >= 1 the cost itself. Without `costs` that is the
        number of connections.
      freeze_step: the number of steps in which masks change. Leave a quarter of the
        training, or more, to the weights alone.
      end_step: the step from which the target is allowed; nine tenths of
        `freeze_step` by default, since what falls late costs ResNets least.
      begin_step: the step from which the allowed falls.
      schedule: how it falls from everything to the target: "cubic" (fast first),
        "linear", "constant" (at once); or a function from the step to the fraction
        that is allowed, which must not grow and ends at the target.
      costs: a pytree like the parameters with what one connection of a leaf costs, or
        an array with the cost of each: `macs_per_connection(macs, params)` makes it a
        budget of MACs, the size of a weight in bytes one of memory. 1 by default.
      weigh: whether the penalty of a connection is in proportion to its cost; False
        penalizes all alike, and only the budget is in `costs`.
      minimum: connections that every masked leaf keeps, at every step: those with the
        largest mask variables when the coefficient was found last.
      feature_axes: where it is given, the minimum is that of each feature.
      ste: the straight-through estimator p; use the one given to `apply_masks`.

    Returns:
      An `optax.GradientTransformation` for a tree of mask variables: the `masks_tx` of
      `partition`. Its state has three numbers of its own, and one for each connection
      that the minimum keeps; `optax.tree_utils.tree_get(state, "penalty")` is the
      coefficient, a first guess for a fixed penalty that is to come to as many
      connections. Nothing goes to the host; across devices it sends counts, and the
      largest mask variable of each leaf, never a leaf. Mask variables and gradients are
      read once more where the coefficient is found, not in other steps.

      At the freeze the cost is at most the target, and less by no more than that of
      a few connections, or else that of the dearest one. Costs are added in float32:
      a number of connections is exact to 2**24.

    Raises:
      TypeError: if the target is neither float nor int, or an argument has another
        type than is said here; at init and update, if it is given a `MaskedParams`.
        (Under `optax.inject_hyperparams` name all arguments among `static_args`, or
        use it on the `masks_tx` alone.)
      ValueError: if the target is not in (0, 1], or below 1, or more than the cost of
        all connections, or less than the guard's minimum; if the steps are not
        0 <= begin_step < end_step <= freeze_step; if a schedule grows, or has not
        come to the target by `freeze_step`; if costs do not fit; at update, if params
        is None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from scl_jax import normalize_by_feature
      >>> masks_tx = optax.chain(normalize_by_feature(), optax.sgd(1e-2))
      >>> tx = meet_budget(masks_tx, 0.25, freeze_step=4)
      >>> masks = {"kernel": jnp.full((4, 2), 0.1)}
      >>> gradient = {"kernel": jnp.arange(8.0).reshape(4, 2) - 4}
      >>> state, update = tx.init(masks), jax.jit(tx.update)
      >>> for _ in range(5):
      ...     updates, state = update(gradient, state, masks)
      ...     masks = optax.apply_updates(masks, updates)
      >>> print((masks["kernel"] >= 0).astype(int))
      [[1 1]
       [0 0]
       [0 0]
       [0 0]]

    Reference:
      Our choice. Shifting all mask variables so that the allowed number is met at
      every step follows the schedule exactly, but is the decoupled penalty: 1 point
      worse on LeNet-300-100 and Fashion-MNIST at 1 % of the connections. The
      candidates are compared in experiments/README.md.
    """
    checked_ste(ste, _NAME)
    guard = Guard(minimum, feature_axes, _NAME)
    find_cost = cost_of(costs, _NAME)
    allowance = Allowance(
        target, schedule, begin_step, end_step, freeze_step, caller=_NAME
    )
    every = max(1, min(allowance.falls_for // _LOOKS, _MOST_STEPS))
    masks_tx = optax.with_extra_args_support(masks_tx)

    def leaves_of(params):
        if isinstance(params, MaskedParams):
            raise TypeError(
                "meet_budget: updates mask variables alone; give it to partition "
                "as its masks_tx"
            )
        return _Leaves(mask_leaves(params), guard, find_cost)

    def init_fn(params):
        leaves = leaves_of(params)
        zero, step = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        # optax.tree_map_params asks with a placeholder, in which not even a None is.
        if not jax.tree.leaves(params, is_leaf=is_none):
            return BudgetState(step, zero, zero, zero, masks_tx.init(params))
        leaves.check(allowance)
        return BudgetState(step, zero, zero, leaves.first_held(), masks_tx.init(params))

    def adapted(state, leaves, gradient):
        """Return the coefficient from now on, and the excess that it answers."""
        spent = leaves.spent([s >= 0 for s in leaves.masks])
        allowed = leaves.total * allowance.at(state.step + 1, leaves.total)
        excess = jnp.log(jnp.maximum(spent, _LEAST * leaves.total) / allowed)
        time = _INTEGRAL_TIME * allowance.falls_for / every
        change = excess - state.excess + excess / time
        steep = jnp.exp(jnp.minimum(_GAIN * change, _STEEPEST))
        # The coefficient at which a connection of mean cost feels the mean gradient.
        unit = jnp.mean(jnp.abs(gradient), dtype=jnp.float32)
        if weigh:
            unit *= leaves.size / leaves.total
        penalty = jnp.clip(state.penalty * steep, _LOWEST * unit, _HIGHEST * unit)
        return penalty, excess

    def looked(state, leaves, gradient):
        """Return coefficient, excess, places that are held, and the border of the cut.

        Small results, all of them: what a branch returns is copied where it is not
        taken.
        """
        nowhere = Border(jnp.uint32(LAST), jnp.uint32(LAST))

        def as_before():
            return state.penalty, state.excess, state.held, nowhere

        def look():
            penalty, excess = adapted(state, leaves, gradient)
            return penalty, excess, leaves.largest(), nowhere

        def find_border():
            *found, held, _ = look()
            return *found, held, leaves.border(held, allowance)

        due = (state.step % every == 0) & (state.step < freeze_step)
        branch = jnp.where(state.step == freeze_step - 1, 2, due.astype(jnp.int32))
        return jax.lax.switch(branch, (as_before, look, find_border))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "meet_budget: reads the mask variables; call "
                "update(updates, state, params)"
            )
        leaves = leaves_of(params)
        gradients = [g for _, g in mask_leaves(updates)]
        # Of the largest leaf alone. What a branch reads is written to memory in every
        # step, and it waits for it: the GPU for the host, with the other gradients
        # still to come.
        largest = max(gradients, key=jnp.size, default=jnp.zeros(()))
        penalty, excess, held, border = looked(state, leaves, largest)

        def penalized(g, s, cost):
            weight = penalty * cost if weigh else penalty
            return g + (weight * proxy_gradient(ste, s)).astype(g.dtype)

        penalized_gradients = map(penalized, gradients, leaves.masks, leaves.costs)
        updates = with_mask_leaves(updates, penalized_gradients)
        updates, inner = masks_tx.update(updates, state.inner, params, **extra_args)

        # The last step cuts, instead of moving; those after it do neither. Element by
        # element in every step: that fuses with the update, which a branch would not.
        moves, cuts = state.step < freeze_step - 1, state.step == freeze_step - 1

        def settle(u, s, held, kept):
            u = jnp.where(moves, u, jnp.zeros_like(u))
            connected = jnp.where(cuts, kept, held | (after(u, s) >= 0))
            return jnp.where(moves | cuts, settled(u, s, connected), u)

        moved = map(
            settle,
            [u for _, u in mask_leaves(updates)],
            leaves.masks,
            leaves.marked(held),
            leaves.kept(held, border),
        )
        updates = with_mask_leaves(updates, moved)
        step = jnp.minimum(state.step + 1, freeze_step)
        return updates, BudgetState(step, penalty, excess, held, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Leaves:
    """The mask variables of all layers, and what their connections cost."""

    def __init__(self, named: list[tuple[Any, Any]], guard: Guard, find_cost: CostOf):
        self.named, self.guard = named, guard
        self.masks = [s for _, s in named]
        self.axes = [guard.axes(key_path, s) for key_path, s in named]
        # NumPy's and Python's: what is allowed can be checked, whatever is traced.
        costs = [find_cost(leaf_path(key_path), s) for key_path, s in named]
        self.costs = [np.asarray(c) if np.ndim(c) else float(c) for c in costs]
        self.size = sum(s.size for s in self.masks)
        self.total = sum(
            float(np.sum(cost, dtype=np.float64)) * (s.size // np.size(cost))
            for cost, s in zip(self.costs, self.masks, strict=True)
        )

    def check(self, allowance: Allowance) -> None:
        """Raise where the budget cannot be met."""
        if not self.total:
            raise ValueError(
                "meet_budget: there must be connections that cost something; there "
                f"are {self.size} mask variables"
            )
        budget = allowance.fraction(self.total) * self.total
        least = 0.0
        for s, axes, cost in zip(self.masks, self.axes, self.costs, strict=True):
            # The guard keeps the largest mask variables, were they the dearest.
            dearest = np.max(np.broadcast_to(cost, s.shape), axes)
            least += self.guard.minimum * float(np.sum(dearest, dtype=np.float64))
        if budget < least:
            raise ValueError(
                f"meet_budget: a budget must pay for the guard's minimum, "
                f"{least:,.0f}; it is {budget:,.1f} of {self.total:,.0f}"
            )

    def spent(self, marked: list[jax.Array]) -> jax.Array:
        """Return what marked connections cost, shape (), float32."""
        terms = []
        for m, cost in zip(marked, self.costs, strict=True):
            if np.ndim(cost):
                terms.append(jnp.sum(jnp.where(m, cost, 0.0)))
            else:
                terms.append(count(m, tuple(range(m.ndim))) * jnp.float32(cost))
        return sum(terms, start=jnp.zeros((), jnp.float32))

    def largest(self) -> Places:
        """Return where the connections are that the guard keeps."""
        return self.guard.largest(self.masks, self.axes)

    def first_held(self) -> Places:
        """Return what `largest` does, but that of shapes it is none."""

        def largest(masks):
            return self.guard.largest(masks, self.axes)

        if any(isinstance(s, jax.ShapeDtypeStruct) for s in self.masks):
            shapes = jax.eval_shape(largest, self.masks)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # XLA would compute it while compiling, slowly, where it knows the start value.
        return largest(jax.lax.optimization_barrier(self.masks))

    def marked(self, held: Places) -> list[jax.Array]:
        """Mark the connections that are held."""
        return self.guard.marks(held, self.masks, self.axes)

    def ranked(self, held: Places) -> list[jax.Array]:
        """Return the ranks, those that are held before all others."""
        return [
            jnp.where(marks, jnp.uint32(FIRST), ranks(s))
            for marks, s in zip(self.marked(held), self.masks, strict=True)
        ]

    def border(self, held: Places, allowance: Allowance) -> Border:
        """Return the border of what the target pays for."""
        return affordable(self.ranked(held), self.spent, self.target(allowance))

    def kept(self, held: Places, border: Border) -> list[jax.Array]:
        """Mark what is above the border."""
        return above(self.ranked(held), border)

    def target(self, allowance: Allowance) -> jax.Array:
        """Return the budget at the freeze, shape (), float32, rounded down."""
        # A fraction of a number of connections may be a hair less than a whole number.
        exact = allowance.fraction(self.total) * self.total * (1 + 1e-9)
        rounded = np.float32(exact)
        if float(rounded) > exact:
            rounded = np.nextafter(rounded, np.float32(0))
        return jnp.asarray(rounded)
