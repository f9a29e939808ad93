"""Train Linen with a trainer that stays as it is."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from experiments.recipes.digits import accuracy, batches


class Net(nn.Module):
    """Two convolutions with strides and a dense layer."""

    @nn.compact
    def __call__(self, x):
        """Return the logits (n, 10) of images (n, 28, 28, 1)."""
        x = nn.relu(nn.Conv(16, (5, 5), strides=3)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(100)(x.reshape(len(x), -1))))


def decayed(params):
    """Say which parameters decay: the kernels, by the usual habit."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


@jax.jit
def train_step(state, x, y):
    """Take a step."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def train(model, tx, steps):
    """Return the state after training."""
    params = model.init(jax.random.key(0), next(batches(1))[0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for x, y in batches(steps):
        state = train_step(state, x, y)
    return state


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train; return the test accuracy, 0..1, and the parameters."""
    model, tx = Net(), optax.adamw(1e-3, weight_decay=1e-2, mask=decayed)
    state = train(model, tx, steps)
    evaluate = jax.jit(lambda x: model.apply({"params": state.params}, x))
    return accuracy(evaluate), state.params


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
