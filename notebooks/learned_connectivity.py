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
# # What SCL keeps
#
# **Claim: with one budget for the whole network and nothing set per layer or pixel, SCL
# keeps more of the output layer than ERK's formula would, and less of the input layer;
# it reads the pixels that vary least less than half as often as those that vary most;
# and more than a sixth of the features lose all their inputs.**
#
# Run it from a checkout of the repository, after `pip install -e '.[notebooks]'`.

# %%
import dataclasses
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import scl_jax
from experiments.anatomy import connections_per_feature
from experiments.baselines.rigl import erk
from experiments.configs import load_config
from experiments.data import load
from experiments.figures import draw_inputs
from experiments.outcome import as_text, make_report, make_result, mean_std
from experiments.train import train

FULL = bool(os.environ.get("FULL"))  # the whole experiment instead of a short one
config = load_config("fashion_mnist_lenet300" if FULL else "mnist5k_lenet300")
SPARSITY = 0.98  # change me
config = dataclasses.replace(config, sparsity=SPARSITY, seeds=5 if FULL else 3)
if not FULL:
    config = dataclasses.replace(config, epochs=12, validation=1000)
data = load(config.dataset, validation=config.validation)
LAYERS = ("input", "hidden", "output")

# %% [markdown]
# ## Layer by layer
#
# One report, of the first seed, and the layers of all seeds beside two rules for the
# same budget. *Uniform* keeps the same fraction of every layer. *ERK*, which RigL uses,
# makes the density of a layer proportional to the sum of its dimensions over their
# product: small layers are denser.

# %%
runs = list(train(config, data, "scl"))
reports = [make_report(config, run) for run in runs]
accuracies = [100 * make_result(config, r, data.validation).accuracy for r in runs]
mean, deviation = mean_std(accuracies)
print(
    f"accuracy on {len(data.validation.labels)} validation images, {len(runs)} seeds:"
)
print(f"{mean:.1f} ± {deviation:.1f} %; the first of them:\n")
print(reports[0])

# %%
kernels = reports[0].rows
shapes = {row.path: row.shape for row in kernels}
weights = np.array([row.weights for row in kernels])
learned = np.array([[row.connections for row in one.rows] for one in reports])
by_erk = np.array(list(erk(shapes, 1 - SPARSITY).values()))
uniform = (1 - SPARSITY) * weights

rows = [["layer", "SCL", "ERK", "uniform", "SCL (%)", "ERK (%)", "uniform (%)"]]
columns = zip(LAYERS, weights, learned.mean(axis=0), by_erk, uniform, strict=True)
for layer, size, *kept in columns:
    percent = [f"{100 * n / size:.1f}" for n in kept]
    rows.append([layer, *(f"{n:,.0f}" for n in kept), *percent])
print(as_text(rows))

# %% [markdown]
# ## The input layer as an image
#
# Where in the image it is connected: connections per pixel, mean over the seeds.

# %%
masks = [np.asarray(scl_jax.binary_masks(r.trained)["Dense_0"]["kernel"]) for r in runs]
draw_inputs(masks, (28, 28, 1), Path("learned_connectivity_inputs.png"))
Image("learned_connectivity_inputs.png", width=560)

# %% [markdown]
# Do the images decide? The quarter of the pixels with the smallest deviation over the
# training images, beside the quarter with the largest.

# %%
pixels = data.train.inputs.reshape(len(data.train.labels), -1)
order = np.argsort(pixels.std(axis=0), kind="stable")
per_pixel = np.mean([mask.sum(axis=1) for mask in masks], axis=0)
quarter = len(order) // 4
least, most = per_pixel[order[:quarter]].mean(), per_pixel[order[-quarter:]].mean()
cut = [np.mean(mask.sum(axis=1) == 0) for mask in masks]
print(
    f"connections per pixel: {least:.2f} where the images vary least, {most:.2f} where"
)
print(f"they vary most; {100 * np.mean(cut):.0f} % of the pixels are not read at all")

# %% [markdown]
# ## Feature by feature
#
# A feature without input is a constant: SCL has switched it off, or made a bias of it.
# Connections that still read one of them do no more than a bias would, and are a waste
# of the budget. `scl_jax.mask_statistics` counts such features inside a jitted step.

# %%
counts = [list(connections_per_feature(run.trained).values()) for run in runs]
kept = [
    [np.asarray(mask["kernel"]) for mask in scl_jax.binary_masks(run.trained).values()]
    for run in runs
]
rows = [["layer", "features", "without input", "quartiles of connections", "read one"]]
wasted = []  # (layers, seeds)
for i, layer in enumerate(LAYERS):
    features = counts[0][i].size
    lost = [np.sum(seed[i] == 0) for seed in counts]
    quartiles = np.quantile([seed[i] for seed in counts], [0.25, 0.5, 0.75])
    waste = [
        seed[i][count[i - 1] == 0].sum() / seed[i].sum() if i else 0.0
        for seed, count in zip(kept, counts, strict=True)
    ]
    wasted.append(waste)
    cells = [str(features), f"{min(lost)} to {max(lost)}"]
    cells.append(" / ".join(f"{q:.0f}" for q in quartiles))
    rows.append([layer, *cells, f"{100 * np.mean(waste):.1f} %"])
print(as_text(rows))
print("without input: over the seeds; read one: connections that read such a feature")

constant = [
    float(scl_jax.mask_statistics(run.trained).features_without_input) for run in runs
]
print(f"of all features, mask_statistics: {', '.join(f'{x:.3f}' for x in constant)}")

# %% [markdown]
# Left: points are medians over the seeds, with bars from the lowest to the highest.
# Right: four features of the input layer, first seed, from the most connected one down;
# positive weights are black, negative ones grey, white is not connected.

# %%
figure, grid = plt.subplot_mosaic(
    [["layers", "features", "a", "b"], ["layers", "features", "c", "d"]],
    figsize=(12, 4),
    width_ratios=(1.5, 1.5, 0.7, 0.7),
    layout="constrained",
)
axes = grid["layers"]
low, middle, high = np.quantile(100 * learned / weights, [0, 0.5, 1], axis=0)
axes.errorbar(
    LAYERS, middle, (middle - low, high - middle), fmt="ko-", capsize=5, label="SCL"
)
axes.plot(LAYERS, 100 * by_erk / weights, "s--", color="0.35", label="ERK")
axes.plot(LAYERS, 100 * uniform / weights, "^:", color="0.35", label="uniform")
axes.set_yscale("log")
axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
axes.set(xlabel="layer", ylabel="connections left (% of the layer)")
axes.margins(x=0.15)
handles, names = axes.get_legend_handles_labels()
axes.legend(handles[::-1], names[::-1], frameon=False)

axes = grid["features"]
for i, (layer, line) in enumerate(zip(LAYERS, ("-", "--", ":"), strict=True)):
    descending = np.sort(np.ravel([seed[i] for seed in counts]))[::-1]
    share = 100 * (np.arange(descending.size) + 0.5) / descending.size
    axes.plot(share, descending, line, color="black", label=layer)
axes.set_yscale("symlog", linthresh=1)
axes.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
axes.set(xlabel="features, most connected first (%)", ylabel="connections per feature")
axes.legend(title="layer", frameon=False, loc="lower left")

folded = np.asarray(runs[0].folded["Dense_0"]["kernel"])
ranked = np.argsort(-counts[0][0], kind="stable")
alive = ranked[: np.sum(counts[0][0] > 0)]
for name, place in zip("abcd", (0.0, 0.1, 0.3, 0.5), strict=True):
    feature = alive[int(place * len(alive))]
    signs = np.sign(folded[:, feature]).reshape(28, 28)
    axes = grid[name]
    axes.imshow(
        np.choose(signs.astype(int) + 1, [0.55, 1.0, 0.0]), "gray", vmin=0, vmax=1
    )
    axes.set(xticks=[], yticks=[], title=f"{counts[0][0][feature]} of 784")
    axes.title.set_size("medium")
grid["a"].set_ylabel("28 pixels")
grid["c"].set(xlabel="28 pixels", ylabel="28 pixels")
grid["d"].set(xlabel="28 pixels")
figure.savefig("learned_connectivity.png", dpi=150)
plt.show()

# %% [markdown]
# ## What was seen

# %%
output, entry = learned[:, -1] / by_erk[-1], learned[:, 0] / by_erk[0]
unread, low, high = 100 * np.array([np.mean(cut), min(constant), max(constant)])
_, hidden_waste, output_waste = 100 * np.mean(wasted, axis=1)
print(
    f"SCL keeps {output.min():.2f} to {output.max():.2f} times as many connections of"
)
print(
    f"the output layer as ERK, and {entry.min():.2f} to {entry.max():.2f} times as many"
)
print(f"of the input layer. Pixels that vary least have {least:.1f} connections, those")
print(f"that vary most {most:.1f}; {unread:.0f} % of all are not read. {low:.0f} to")
print(f"{high:.0f} % of the features have lost all inputs; {hidden_waste:.0f} % of the")
print(
    f"connections of the hidden layer and {output_waste:.0f} % of those of the output"
)
print("layer still read one of those.")
budget = round((1 - SPARSITY) * weights.sum())
assert {one.totals.connections for one in reports} == {budget}
assert (output > 1.2).all()
assert entry.mean() < 1
assert least < most / 2
assert min(constant) > 1 / 6
for count, fraction in zip(counts, constant, strict=True):
    assert np.isclose(np.mean(np.concatenate(count) == 0), fraction)
