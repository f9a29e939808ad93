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
# # Quick start
#
# **Claim: LeNet-300-100 on 5,000 real digits, asked to prune 98 of 100 connections,
# chooses them by itself and stays within three points of the dense network.**
#
# Run it from a checkout of the repository, after `pip install -e '.[notebooks]'`.

# %%
import dataclasses
import os

import matplotlib.pyplot as plt
import numpy as np

import scl_jax
from experiments.configs import load_config
from experiments.data import load
from experiments.outcome import as_text, comparison, make_report, make_result
from experiments.train import train

FULL = bool(os.environ.get("FULL"))  # the whole experiment instead of a short one
config = load_config("mnist5k_lenet300")
if not FULL:
    config = dataclasses.replace(config, epochs=12, seeds=1)
data = load(config.dataset, validation=config.validation)

# %% [markdown]
# ## Dense and SCL, side by side
#
# Both start from the same weights and see the digits in the same order. Nothing is set
# per layer: there is one budget for the whole network, and one penalty, the loss per
# connection, which is found while training so that the budget is met.

# %%
trained = {method: list(train(config, data, method)) for method in ("dense", "scl")}
results = [
    make_result(config, run, data.validation)
    for runs in trained.values()
    for run in runs
]
print(as_text(comparison(results)))
penalties = [epoch.penalty for epoch in trained["scl"][0].history]
print("penalty, epoch by epoch:", " ".join(f"{p:.0e}" for p in penalties))

# %% [markdown]
# ## What is left, layer by layer
#
# The output layer keeps the largest part of its connections, the input layer the
# smallest; features without input are units that SCL switched off.

# %%
report = make_report(config, trained["scl"][0])
print(report)

# %% [markdown]
# Connections per pixel of the first layer: the border, where digits have no ink, is
# cut.

# %%
masks = scl_jax.binary_masks(trained["scl"][0].trained)
per_pixel = np.asarray(masks["Dense_0"]["kernel"]).sum(axis=1).reshape(28, 28)
image = plt.imshow(per_pixel, cmap="cividis")
plt.colorbar(image, label="connections per pixel")
plt.xlabel("column (pixels)")
plt.ylabel("row (pixels)")
plt.show()

# %% [markdown]
# ## Ablate the straight-through estimator
#
# Change this cell. The first three have a positive proxy gradient everywhere, which is
# the method's principle; the last two have not.

# %%
ESTIMATORS = ("identity", "leaky_relu(0.3)", "softplus(5.0)", "relu", "clipped")

rows = [["estimator", "accuracy (%)", "sparsity"]]
for name in ESTIMATORS:
    changed = dataclasses.replace(config, ste=name)
    (run,) = train(changed, data, "scl", seeds=[0])
    outcome = make_result(changed, run, data.validation)
    rows.append([name, f"{100 * outcome.accuracy:.1f}", f"{outcome.sparsity:.4f}"])
print(as_text(rows))

# %% [markdown]
# ## What was seen

# %%
dense, scl = (
    [result for result in results if result.method == method]
    for method in ("dense", "scl")
)
sparsity = np.mean([result.sparsity for result in scl])
difference = np.mean([r.accuracy for r in scl]) - np.mean([r.accuracy for r in dense])
border = per_pixel[[0, -1]].sum() + per_pixel[1:-1, [0, -1]].sum()
print(f"sparsity {sparsity:.4f}, accuracy {100 * difference:+.1f} points from dense,")
print(f"{border} of {per_pixel.sum()} input connections at the image border")
assert abs(sparsity - config.sparsity) < 1e-4
assert difference > -0.03
assert border < 0.01 * per_pixel.sum()
