"""Train with what stands around an optimizer and SCL: each in its place.

Clipping by global norm, a learning rate that can be set, and the average of the weights
belong to the weights' optimizer: they stand inside it. To skip batches that are not
finite and to accumulate gradients concern the whole step: they stand around it all, and
what counts steps inside counts updates, of two batches each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import scl_jax
from experiments.recipes.digits import accuracy, batches

model = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(100), nn.relu, nn.Dense(10)])


def end_on_average(rate):
    """Average the weights exponentially; the last step goes to the average."""

    def update(updates, state, params: Any = None, *, last=False, **_):
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state, rate)
        to_average = jax.tree.map(jnp.subtract, average, params)
        return optax.tree.where(last, to_average, updates), average

    return optax.GradientTransformationExtraArgs(lambda params: params, update)


def logits(params, images) -> Any:
    """Return a row for each image, (batch, 10)."""
    params = scl_jax.apply_masks(params)
    return model.apply({"params": params}, images.reshape(len(images), -1))


def loss_fn(params, images, labels):
    """Return the mean cross entropy."""
    scores = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train, and return test accuracy and parameters."""
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))["params"]
    params = scl_jax.mask_params(params)
    adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=2e-3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw, end_on_average(0.1))
    masks = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-2, 0.9))
    tx = scl_jax.partition(tx, scl_jax.meet_budget(masks, 0.1, freeze_step=steps // 3))
    tx = optax.apply_if_finite(tx, max_consecutive_errors=5)
    tx = optax.MultiSteps(tx, every_k_schedule=2)

    @jax.jit
    def step(params, opt_state, images, labels, last):
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, params, last=last)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for i, (images, labels) in enumerate(batches(steps)):
        if i == steps * 3 // 4:
            rate = jnp.float32(5e-4)
            opt_state = optax.tree.set(opt_state, learning_rate=rate)
        last = i == steps - 1
        params, opt_state = step(params, opt_state, images, labels, last)
    return accuracy(lambda images: logits(params, images)), params


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
