"""What SCL costs the host: the time to dispatch a step, whatever it computes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import scl_jax

LAYERS, WIDTH, BATCH, STEPS = 100, 32, 16, 300


def dispatch_times(layers: int = LAYERS, steps: int = STEPS) -> dict[str, Any]:
    """Time the calls of a jitted step of an MLP, without waiting for what they compute.

    Each call begins when the one before is done. Its time grows with the number of
    arrays that the trainer holds: SCL adds a mask variable, its momentum and the norms
    of its features to the kernel, the bias and their momenta. (Tried by hand: a jitted
    identity takes 1.5 times as long for 72 arrays as for 48, so that only fewer arrays
    would be faster.)

    Args:
      layers: dense layers, each a kernel and a bias.
      steps: calls of each trainer, in turns.

    Returns:
      Medians in microseconds, `dense_us`, `scl_us` and `budget_us`, and the ratios to
      dense, `ratio` and `budget_ratio`; how many `arrays` the dense trainer holds, and
      how many that of SCL.
    """
    trainers = [_Trainer(layers, kind) for kind in ("dense", "scl", "budget")]
    times = [[trainer() for trainer in trainers] for _ in range(steps)]
    dense, scl, budget = (
        1e6 * statistics.median(column) for column in zip(*times, strict=True)
    )
    return {
        "dense_us": dense,
        "scl_us": scl,
        "budget_us": budget,
        "ratio": statistics.median(s / d for d, s, _ in times),
        "budget_ratio": statistics.median(b / d for d, _, b in times),
        "arrays": [len(jax.tree.leaves(trainer.state)) for trainer in trainers[:2]],
    }


class _Trainer:
    """A jitted step, and what it trains; called, it says how long the call took."""

    def __init__(self, layers: int, kind: str):
        params = {
            f"Dense_{i}": {
                "kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5,
                "bias": jnp.zeros(WIDTH),
            }
            for i, key in enumerate(jax.random.split(jax.random.key(0), layers))
        }
        tx: Any = optax.sgd(1e-3, 0.9)
        effective: Callable[[Any], Any] = _unchanged
        if kind != "dense":
            masks_tx = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-4, 0.9))
            if kind == "budget":
                masks_tx = scl_jax.meet_budget(masks_tx, 0.1, freeze_step=100_000)
            tx = scl_jax.partition(tx, masks_tx)
            params, effective = scl_jax.mask_params(params), scl_jax.apply_masks
        inputs = jnp.ones((BATCH, WIDTH))

        def loss(trained):
            x = inputs
            for layer in effective(trained).values():
                x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
            penalty = 1e-6 * scl_jax.connection_count(trained) if kind == "scl" else 0
            return jnp.mean(x**2) + penalty

        def step(state):
            trained, opt_state = state
            updates, opt_state = tx.update(jax.grad(loss)(trained), opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        self._step = jax.jit(step, donate_argnums=0)
        self.state = params, jax.jit(tx.init)(params)
        self()  # compiled

    def __call__(self) -> float:
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        self.state = self._step(self.state)
        return time.perf_counter() - start


def _unchanged(params: Any) -> Any:
    return params
