"""Train an NNX network on digits, in the object style, with a tenth left.

`nnx.Optimizer`, `nnx.value_and_grad` and `nnx.jit`; BatchNorm's averages and dropout's
random stream change as the network is called.
"""

from typing import Any

import optax
from flax import nnx

import scl_jax.nnx
from experiments.recipes.digits import accuracy, batches


class Network(nnx.Module):
    """Two hidden layers, the first normalized, with dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden_1 = nnx.Linear(784, 300, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(300, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.hidden_2 = nnx.Linear(300, 100, rngs=rngs)
        self.head = nnx.Linear(100, 10, rngs=rngs)

    def __call__(self, images):
        """Return logits, (n, 10), of images, (n, 28, 28, 1)."""
        x = images.reshape(len(images), -1)
        x = self.dropout(nnx.relu(self.norm(self.hidden_1(x))))
        return self.head(nnx.relu(self.hidden_2(x)))


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train; return the test accuracy, 0..1, and the parameters."""
    model, trained = scl_jax.nnx.Masked(Network(nnx.Rngs(0))), scl_jax.nnx.TRAINED
    drop = 2 * steps // 3
    rate = optax.piecewise_constant_schedule(1e-3, {drop: 0.1})
    tx = optax.adamw(rate, weight_decay=1e-4)
    masks = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-2, 0.9))
    tx = scl_jax.nnx.partition(tx, scl_jax.meet_budget(masks, 0.1, freeze_step=drop))
    optimizer = nnx.Optimizer(model, tx, wrt=trained)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_fn(model):
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(model(images), labels).mean()

        argnums = nnx.DiffState(0, trained)
        loss, gradient = nnx.value_and_grad(loss_fn, argnums=argnums)(model)
        optimizer.update(model, gradient)
        return loss

    for images, labels in batches(steps):
        step(model, optimizer, images, labels)
    model.eval()
    return accuracy(model), model.masked_params()


if __name__ == "__main__":
    print(f"test accuracy: {main()[0]:.4f}")
