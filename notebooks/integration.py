# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # SCL in a trainer that is there
#
# **Claim: a trainer needs three visible changes, and the network that it leaves with a
# tenth of its connections is plain again, and at most three points worse.**
#
# Run it from a checkout of the repository, after `pip install -e '.[notebooks]'`. Whole
# scripts for Linen, NNX, Equinox and others are in `experiments/recipes`.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

import scl_jax
from experiments.recipes.digits import accuracy, batches

STEPS = 4000 if os.environ.get("FULL") else 800

# %% [markdown]
# ## Before
#
# A network, a loss, an optimizer, and a loop. `use` is what the model is called with;
# without SCL that is the parameters as they are.

# %%
model = nn.Sequential([nn.Dense(300), nn.relu, nn.Dense(100), nn.relu, nn.Dense(10)])


def logits(params, images):
    return model.apply({"params": params}, images.reshape(len(images), -1))


def train(params, tx, use=lambda params: params):
    def loss_fn(params, images, labels):
        outputs = logits(use(params), images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels):
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in batches(STEPS):
        params, opt_state = step(params, opt_state, images, labels)
    return params, opt_state


start = model.init(jax.random.key(0), jnp.ones((1, 784)))["params"]
tx = optax.adamw(1e-3)
dense, _ = train(start, tx)
of_dense = accuracy(lambda images: logits(dense, images))
print(f"dense: {100 * of_dense:.1f} % of the test digits")

# %% [markdown]
# ## After
#
# 1. `mask_params` puts a mask variable beside every kernel.
# 2. `partition` gives the weights to the optimizer that was there, and the mask
#    variables to one of their own: normalized by feature, and driven to a budget.
# 3. `apply_masks` is what the model is called with.
#
# Change this cell: the budget, the mask learning rate, the estimator.

# %%
LEFT = 0.1

masks_tx = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(3e-3, 0.9))
masks_tx = scl_jax.meet_budget(masks_tx, LEFT, freeze_step=STEPS * 3 // 4)
both = scl_jax.partition(tx, masks_tx)
masked, state = train(scl_jax.mask_params(start), both, scl_jax.apply_masks)

folded = scl_jax.fold_masks(masked)
of_scl = accuracy(lambda images: logits(folded, images))
print(f"SCL: {100 * of_scl:.1f} % of the test digits")
print(scl_jax.report(masked, scl_jax.count_macs(logits, start, jnp.ones((1, 784)))))

# %% [markdown]
# ## What the optimizer of the weights never saw
#
# Mask variables are neither decayed, nor clipped, nor averaged with the weights.
# AdamW's averages have the shapes of the parameters, and of nothing else.

# %%
seen = jax.tree.map(jnp.shape, optax.tree_utils.tree_get(state, "mu"))
print(seen)

# %% [markdown]
# ## From a trained network
#
# `mask_params` takes any parameters: here those of the dense network.

# %%
tuned, _ = train(scl_jax.mask_params(dense), both, scl_jax.apply_masks)
of_tuned = accuracy(lambda images: logits(scl_jax.fold_masks(tuned), images))
bars = {"dense": of_dense, "SCL": of_scl, "SCL from dense": of_tuned}
plt.bar(list(bars), [100 * value for value in bars.values()], color="0.5")
plt.ylim(80, 100)
plt.ylabel("test digits classified (%)")
plt.show()

# %% [markdown]
# ## What was seen

# %%
kernels = [np.asarray(layer["kernel"]) for layer in folded.values()]
left = sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)
print(
    f"{100 * left:.2f} % of the connections are left; {100 * (of_scl - of_dense):+.1f}"
)
print("points from dense. The folded parameters are those of the model, with zeros.")
assert abs(left / LEFT - 1) < 0.005
assert of_scl > of_dense - 0.03
assert jax.tree.structure(folded) == jax.tree.structure(start)
assert "masks" not in str(seen)
