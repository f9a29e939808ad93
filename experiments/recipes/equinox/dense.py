"""Train an Equinox network on digits.

The layers of Equinox map one example, and keep their kernels as (outputs, inputs). The
model is a pytree that holds functions too, which the filters leave alone.
"""

from typing import Any

import equinox as eqx
import jax
import optax

from experiments.recipes.digits import accuracy, batches


def logits(model, images):
    """Return a row for each image, (batch, 10)."""
    return jax.vmap(model)(images.reshape(len(images), -1))


def loss_fn(model, images, labels):
    """Return the mean cross entropy."""
    scores = logits(model, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train, and return test accuracy and parameters."""
    model = eqx.nn.MLP(784, 10, width_size=100, depth=2, key=jax.random.key(0))
    tx = optax.adam(1e-3)

    @eqx.filter_jit
    def step(model, opt_state, images, labels):
        gradient = eqx.filter_grad(loss_fn)(model, images, labels)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for images, labels in batches(steps):
        model, opt_state = step(model, opt_state, images, labels)
    return accuracy(lambda images: logits(model, images)), model


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
