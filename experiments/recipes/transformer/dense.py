"""Train a vision transformer on digits.

Its layers are a scanned stack, it computes in bfloat16, and whatever has two axes or
more decays, as is the habit. Beside it, `vit.py` is the model.
"""

from typing import Any

import jax
import optax

from experiments.recipes.digits import accuracy, batches
from experiments.recipes.transformer import vit

model = vit.Transformer()


def logits(params, images) -> Any:
    """Return a row for each image, (batch, 10)."""
    return model.apply({"params": params}, images)


def loss_fn(params, images, labels):
    """Return the mean cross entropy."""
    scores = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def decays(params):
    """Tell which parameters decay."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train, and return test accuracy and parameters."""
    images, _ = next(batches(1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    tx = optax.adamw(5e-3, weight_decay=0.05, mask=decays)

    @jax.jit
    def step(params, opt_state, images, labels):
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in batches(steps):
        params, opt_state = step(params, opt_state, images, labels)
    return accuracy(jax.jit(lambda images: logits(params, images))), params


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
