"""What the tests of baselines share: random parameters; a schedule, by hand too."""

import jax.numpy as jnp
import numpy as np
from tiny import config as tiny_config

STEPS = 40
BEGIN, END, FREEZE = 4, 28, 32
EVERY = 5


def config(**changes):
    """Return a config whose fractions of STEPS are BEGIN, END and FREEZE."""
    defaults = {
        "sparsity": 0.85,
        "schedule_begin": BEGIN / STEPS,
        "schedule_end": END / STEPS,
        "freeze_at": FREEZE / STEPS,
        "prune_every": EVERY,
    }
    return tiny_config(**{**defaults, **changes})


def sparsity_by_hand(taken, final=0.85, begin=BEGIN, end=END):
    """Return equation 1 of Zhu & Gupta, from 0, in double precision."""
    if taken <= begin:
        return 0.0
    return final - final * (1 - (min(taken, end) - begin) / (end - begin)) ** 3


def random_params(seed, shapes):
    """Return a kernel of each shape, and a bias for its last axis, by name."""
    random = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.float32(random.normal(size=shape)),
            "bias": jnp.float32(random.normal(size=shape[-1])),
        }
        for name, shape in shapes.items()
    }
