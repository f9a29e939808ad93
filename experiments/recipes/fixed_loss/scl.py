"""Train with a trainer whose loss cannot be changed, with a fixed penalty by SCL.

`fit` stands for a trainer that comes from elsewhere: it takes a function, parameters
and an optimizer; its loss is its own. With SCL the penalty therefore goes into the
optimizer. Before `normalize_by_feature` it is coupled, the same as in the loss; between
that and the momentum it would be decoupled, in units of a normalized gradient. The
masks come to rest as the weights do: their learning rate ends at zero, too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import scl_jax
from experiments.recipes.digits import accuracy, batches


def fit(logits, params, tx, data):
    """Train, as the trainer from elsewhere does."""

    def loss_fn(params, images, labels):
        scores = logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels):
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in data:
        params, opt_state = step(params, opt_state, images, labels)
    return params


model = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(100), nn.relu, nn.Dense(10)])


def logits(params, images) -> Any:
    """Return a row for each image, (batch, 10)."""
    params = scl_jax.apply_masks(params)
    return model.apply({"params": params}, images.reshape(len(images), -1))


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train, and return test accuracy and parameters."""
    rate = optax.cosine_decay_schedule(3e-3, steps)
    params = model.init(jax.random.key(0), jnp.ones((1, 784)))["params"]
    tx = optax.adam(rate)
    masks = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(rate, 0.9))
    tx = scl_jax.partition(tx, optax.chain(scl_jax.add_connection_penalty(3e-5), masks))
    params = fit(logits, scl_jax.mask_params(params), tx, batches(steps))
    return accuracy(functools.partial(logits, params)), params


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
