"""Train an NNX network on digits, in the functional style, with a tenth left.

`nnx.split` and `nnx.merge` under `jax.jit`, with plain Optax; BatchNorm's averages and
dropout's random stream are passed on from step to step.
"""

from typing import Any

import jax
import optax
from flax import nnx

import scl_jax
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


def merged(graph, params, others) -> Network:
    """Return the network that is called."""
    return nnx.merge(graph, scl_jax.apply_masks(params), others, copy=True)


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train; return the test accuracy, 0..1, and the parameters."""
    graph, params, others = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
    tx = optax.adamw(1e-3, weight_decay=1e-4)
    params = scl_jax.mask_params(params)
    masks = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-2, 0.9))
    tx = scl_jax.partition(tx, scl_jax.meet_budget(masks, 0.1, freeze_step=steps // 2))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, others, opt_state, images, labels):
        def loss_fn(params):
            network = merged(graph, params, others)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            loss = cross_entropy(network(images), labels).mean()
            return loss, nnx.state(network, nnx.Not(nnx.Param))

        gradient, others_after = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), others_after, opt_state

    for images, labels in batches(steps):
        params, others, opt_state = step(params, others, opt_state, images, labels)
    network = merged(graph, params, others)
    network.eval()
    return accuracy(network), params


if __name__ == "__main__":
    print(f"test accuracy: {main()[0]:.4f}")
