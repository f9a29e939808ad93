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
# # Which features the mask gradients favour
#
# **Claim: the mask gradients of the output layer are more than five times those of the
# input layer. Normalization makes those of all features about alike, and at the same
# budget the output layer then keeps at least one and a half times as many connections.
# Over the features of the input layer they stay about as unevenly spread.**
#
# Run it from a checkout of the repository, after `pip install -e '.[notebooks]'`.

# %%
import dataclasses
import os

import matplotlib.pyplot as plt
import numpy as np

from experiments.anatomy import connections_per_feature, decades, gradient_norms
from experiments.configs import load_config
from experiments.data import load
from experiments.outcome import as_text, make_report, make_result, mean_std
from experiments.snapshots import snapshots
from experiments.train import train

FULL = bool(os.environ.get("FULL"))  # the whole experiment instead of a short one
config = load_config("fashion_mnist_lenet300" if FULL else "mnist5k_lenet300")
config = dataclasses.replace(config, sparsity=0.98, seeds=5 if FULL else 3)
if not FULL:
    config = dataclasses.replace(config, epochs=12, validation=1000)
data = load(config.dataset, validation=config.validation)
LAYERS = ("input", "hidden", "output")

# %% [markdown]
# ## The gradients, feature by feature
#
# The gradient of a mask variable is G * W: that of the task loss with respect to the
# weight in use, times the weight. Its root mean square over the inputs of a feature
# says how strongly a batch pushes that feature. Here it is in the mean over eight
# batches, without the penalty, in a network that is trained as usual: at the start,
# early, in the middle and at the end. A feature that is zero for every image, or that
# nothing reads, has no gradient.

# %%
EPOCHS = [0, config.epochs // 6, config.epochs // 2, config.epochs]


def norms_by_layer(network, norm):
    norms = gradient_norms(
        config, data.train, network.trained, network.statistics, norm=norm
    )
    return list(norms.values())


before, after = [], []  # an epoch: for each layer the norms of its features
rows = [["epoch", "layer", "median", "spread", "normalized", "without gradient"]]
for network in snapshots(config, data, "scl", EPOCHS):
    before.append(norms_by_layer(network, "none"))
    after.append(norms_by_layer(network, config.norm))
    for layer, x, y in zip(LAYERS, before[-1], after[-1], strict=True):
        spread = f"{10 ** decades(x):.1f}", f"{10 ** decades(y):.1f}"
        none = f"{np.sum(x == 0)} of {x.size}"
        median = f"{np.median(x[x > 0]):.1e}"
        rows.append([str(network.epoch), layer, median, *spread, none])
print(as_text(rows))
print("of the features with a gradient: median in nats; spread, the 90th over the 10th")
print("percentile; normalized, the same after normalization")

# %% [markdown]
# The nearer to the loss, the larger the gradients; within a layer they differ less than
# between input and output. Normalized they are about 1 for each feature.

# %% [markdown]
# ## The same budget, with and without normalization
#
# Only the norm and the mask learning rate differ. With rms a step is about as large as
# the rate; without, as the rate times the gradient, so that no rate is the same. There
# are two with rms, the first of them the default, and three without. A rate that is too
# small lets go of too many connections early, and they do not come back in time; the
# table says how far that is from the path of the first setting, in connections after
# each epoch up to the cut to the budget.

# %%
RATES = {"rms": (3e-4, 1e-3), "none": (3.0, 10.0, 30.0)}  # change me

settings = {
    f"{norm}, rate {rate:g}": (norm, rate)
    for norm, rates in RATES.items()
    for rate in rates
}
runs, reports, accuracies = {}, {}, {}
for name, (norm, rate) in settings.items():
    changed = dataclasses.replace(config, norm=norm, mask_learning_rate=rate)
    runs[name] = list(train(changed, data, "scl"))
    reports[name] = [make_report(changed, run) for run in runs[name]]
    accuracies[name] = [
        100 * make_result(changed, run, data.validation).accuracy for run in runs[name]
    ]
densities = {  # %, (seeds, layers)
    name: np.array(
        [[100 * r.connections / r.weights for r in one.rows] for one in many]
    )
    for name, many in reports.items()
}

# %%
moving = int(config.freeze_at * config.epochs) - 1  # epochs before that of the cut
paths = {
    name: np.log([[epoch.nnz for epoch in run.history[:moving]] for run in many])
    for name, many in runs.items()
}
first = next(iter(paths.values()))
rows = [
    ["masks", "accuracy (%)", *(f"{layer} (%)" for layer in LAYERS), "off the path"]
]
for name in runs:
    mean, deviation = mean_std(accuracies[name])
    cells = [f"{x:.1f}" for x in densities[name].mean(axis=0)]
    off = np.exp(np.mean(np.abs(paths[name] - first)))
    rows.append([name, f"{mean:.1f} ± {deviation:.1f}", *cells, f"x {off:.2f}"])
print(as_text(rows))
print(f"accuracy on {len(data.validation.labels)} validation images, ± over the seeds;")
print("input, hidden, output: connections left of each layer, mean over the seeds")

# %% [markdown]
# Left: boxes from the first to the third quartile of the features of a layer, whiskers
# from the 10th to the 90th percentile. Right: medians over the seeds, with bars from
# the lowest to the highest; each setting keeps the same number in all.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for i, (layer, grey) in enumerate(zip(LAYERS, ("0.8", "0.55", "0.3"), strict=True)):
    boxes = left.boxplot(
        [norms[i][norms[i] > 0] for norms in before],
        positions=np.arange(len(EPOCHS)) + 0.27 * (i - 1),
        widths=0.22,
        whis=(10, 90),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": grey},
        medianprops={"color": "white" if i == 2 else "black"},
    )
    boxes["boxes"][0].set_label(layer)
left.set_yscale("log")
left.set_xticks(range(len(EPOCHS)), [str(epoch) for epoch in EPOCHS])
left.set(xlabel="epochs trained", ylabel="mask gradient, rms per feature (nats)")
left.set_title("Before normalization", fontsize="medium")
left.legend(title="layer", ncols=3, frameon=False, loc="upper right")
left.set_ylim(top=7 * left.get_ylim()[1])
for i, (name, (norm, _)) in enumerate(settings.items()):
    low, middle, high = np.quantile(densities[name], [0, 0.5, 1], axis=0)
    right.errorbar(
        np.arange(len(LAYERS)) + 0.12 * (i - 2),
        middle,
        (middle - low, high - middle),
        fmt="os^Dv"[i],
        color="black",
        markerfacecolor="black" if norm == "rms" else "white",
        capsize=4,
        label=name,
    )
budget = 100 * (1 - config.sparsity)
right.axhline(budget, color="0.4", linestyle="--", label=f"all layers, {budget:g} %")
right.set_yscale("log")
right.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
weights = [row.weights for row in next(iter(reports.values()))[0].rows]
names = [f"{layer}\n{n:,}" for layer, n in zip(LAYERS, weights, strict=True)]
right.set_xticks(range(len(LAYERS)), names)
right.set(xlabel="layer, weights", ylabel="connections left (% of the layer)")
right.set_title("At the same budget", fontsize="medium")
right.legend(title="norm of the mask gradients", frameon=False, loc="upper left")
figure.savefig("gradient_imbalance.png", dpi=150)
plt.show()

# %% [markdown]
# ## Connections per feature
#
# Deviation over mean within a layer: 0 would be as many for each feature. One could
# think that features that are pushed alike keep as many connections. They do not: what
# normalization evens out is the layers.

# %%
unevenness = {}  # (seeds, layers)
rows = [["masks", *LAYERS, "without input: of input layer", "of hidden layer"]]
for name in runs:
    counts = [connections_per_feature(run.trained).values() for run in runs[name]]
    unevenness[name] = np.array([[n.std() / n.mean() for n in seed] for seed in counts])
    lost = [[np.sum(n == 0) for n in seed] for seed in counts]
    cells = [f"{x:.2f}" for x in unevenness[name].mean(axis=0)]
    rows.append([name, *cells, *(f"{x:.0f}" for x in np.mean(lost, axis=0)[:2])])
print(as_text(rows))
print("without input: features that have lost all connections, mean over the seeds")

# %% [markdown]
# ## What was seen


# %%
def of_norm(values, layer):
    """Return norm -> the mean over the seeds at each of its rates."""
    return {
        norm: [values[f"{norm}, rate {rate:g}"][:, layer].mean() for rate in rates]
        for norm, rates in RATES.items()
    }


def over_input(norms):
    return [
        np.median(layers[-1][layers[-1] > 0]) / np.median(layers[0][layers[0] > 0])
        for layers in norms
    ]


ratios, normalized = over_input(before), over_input(after)
output, uneven = of_norm(densities, -1), of_norm(unevenness, 0)
most, times = (x / max(output["none"]) for x in (output["rms"][0], min(output["rms"])))
evenness = np.mean(uneven["rms"]) / np.mean(uneven["none"])
means = {name: np.mean(several) for name, several in accuracies.items()}
gain = max(means[name] for name in means if name.startswith("rms")) - max(
    means[name] for name in means if name.startswith("none")
)
words = [f"{r:.0f} after epoch {e}" for r, e in zip(ratios, EPOCHS, strict=True)]
print("Median mask gradient of the output layer over that of the input layer:")
print(f"{', '.join(words)};")
print(f"normalized, {min(normalized):.2f} to {max(normalized):.2f}.")
print(
    f"With normalization the output layer keeps {most:.1f} times as many connections at"
)
print(
    f"the default rate, {times:.1f} times at the other, as without at the rate that is"
)
print(
    f"best for it. The most accurate rate is {gain:+.1f} points from the most accurate"
)
print("without. The deviation of the connections per feature of the input layer is")
print(f"{evenness:.2f} times as large as without, in the mean over the rates.")
assert len({one.totals.connections for many in reports.values() for one in many}) == 1
assert min(ratios) > 5
assert 0.8 < min(normalized) <= max(normalized) < 1.25
assert times > 1.5
assert 2 / 3 < evenness < 3 / 2
