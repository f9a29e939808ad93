"""When baselines change their masks, and how sparse they are then."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.config import Config

AtStep = Callable[[jax.Array], jax.Array]


def sparsity_at(config: Config, steps: int) -> AtStep:
    """Return the cubic schedule from nothing pruned to the config's sparsity.

    From step `begin` to step `end`, the config's fractions of the training, the
    sparsity is `config.sparsity * (1 - (1 - t)**3)` with t from 0 to 1; it is 0
    before and constant after.

    Args:
      config: the experiment; its `sparsity`, `schedule_begin` and `schedule_end`.
      steps: of the whole training.

    Returns:
      A function from the number of steps taken, the present one included, to the
      sparsity of the kernels, 0..1, float32.

    Reference:
      Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
      model compression", ICLR 2018 workshop (arXiv 1710.01878), equation 1.
    """
    begin, end = _interval(config, steps)

    def sparsity(taken):
        done = jnp.clip((taken - begin) / (end - begin), 0, 1)
        return jnp.float32(config.sparsity) * (1 - (1 - done) ** 3)

    return sparsity


def due(config: Config, steps: int) -> AtStep:
    """Return whether masks change at a step.

    They do every `config.prune_every` steps from the schedule's begin, and at its
    end, where the final sparsity is met; never before and never after.

    Args:
      config: the experiment; its `schedule_begin`, `schedule_end`, `prune_every`.
      steps: of the whole training.

    Returns:
      A function from the number of steps taken, the present one included, to a bool
      of shape ().
    """
    begin, end = _interval(config, steps)

    def is_due(taken):
        inside = (begin < taken) & (taken < end)
        return (inside & ((taken - begin) % config.prune_every == 0)) | (taken == end)

    return is_due


def _interval(config: Config, steps: int) -> tuple[int, int]:
    """Return the steps at which the schedule begins and ends, one apart at least."""
    end = max(1, round(config.schedule_end * steps))
    return min(round(config.schedule_begin * steps), end - 1), end
