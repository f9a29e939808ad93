"""Train Linen with TrainState, BatchNorm and dropout, with a tenth left."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.training import train_state

import scl_jax
from experiments.recipes.digits import accuracy, batches


class Net(nn.Module):
    """A perceptron with BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        """Return the logits (n, 10) of images (n, 28, 28, 1)."""
        x = x.reshape(len(x), -1)
        for width in (300, 100):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x))
            x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """The state of a training with BatchNorm."""

    batch_stats: Any


def predict(state, params, x, **options):
    """Return what the network makes of images."""
    params = scl_jax.apply_masks(params)
    variables = {"params": params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, x, **options)


@jax.jit
def train_step(state, x, y, key):
    """Take a step, of parameters and of BatchNorm's averages."""

    def loss_fn(params):
        logits, stats = predict(
            *(state, params, x),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, stats["batch_stats"]

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def main(steps: int = 1000) -> tuple[float, Any]:
    """Train; return the test accuracy, 0..1, and the parameters."""
    model, key = Net(), jax.random.key(0)
    variables = model.init(key, next(batches(1))[0], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    tx = optax.adamw(1e-3, weight_decay=1e-2)
    masks = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(1e-2, 0.9))
    masks = scl_jax.meet_budget(masks, 0.1, freeze_step=steps // 2)
    tx, params = scl_jax.partition(tx, masks), scl_jax.mask_params(params)
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=tx, batch_stats=batch_stats
    )
    for x, y in batches(steps):
        state = train_step(state, x, y, key)
    evaluate = jax.jit(lambda x: predict(state, state.params, x, train=False))
    return accuracy(evaluate), state.params


if __name__ == "__main__":
    print(f"test accuracy {main()[0]:.3f}")
