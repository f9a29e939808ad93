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
# # A budget, and the penalty that meets it
#
# **Claim: one number, the budget, sets how many connections are left, exactly, from a
# tenth to a hundredth of them. The penalty that this takes grows more than tenfold, and
# is found while training. Fixed, it is a first guess and no more: it comes to as many
# connections within a factor of five at 2 % and 1 %; at larger budgets it may leave
# several times as many.**
#
# Run it from a checkout of the repository, after `pip install -e '.[notebooks]'`.

# %%
import dataclasses
import os

import matplotlib.pyplot as plt
import numpy as np

from experiments.configs import load_config
from experiments.data import load
from experiments.outcome import as_text, make_result, mean_std
from experiments.tradeoff import log_fractions
from experiments.train import train

FULL = bool(os.environ.get("FULL"))  # the whole experiment instead of a short one
config = load_config("fashion_mnist_lenet300" if FULL else "mnist5k_lenet300")
config = dataclasses.replace(config, seeds=5 if FULL else 2)
if not FULL:
    config = dataclasses.replace(config, epochs=12, validation=1000)
data = load(config.dataset, validation=config.validation)

# %% [markdown]
# ## One run a budget
#
# `sparsity` is the fraction of the connections that is to go; nothing else differs. Its
# controller raises the penalty, the loss per connection, while there are more
# connections than a falling schedule allows, and lowers it while there are fewer. At
# three quarters of the training the masks are cut to the budget, and rest.

# %%
SPARSITIES = (0.9, 0.95, 0.98, 0.99)  # change me


def trained(method, **changes):
    """Return the runs of all seeds, and what they come to on the validation split."""
    changed = dataclasses.replace(config, **changes)
    runs = list(train(changed, data, method))
    return runs, [make_result(changed, run, data.validation) for run in runs]


_, dense = trained("dense")
histories, budgets = {}, {}
for sparsity in SPARSITIES:
    runs, budgets[sparsity] = trained("scl", sparsity=sparsity)
    histories[sparsity] = np.array([[e.penalty for e in run.history] for run in runs])

# %%
total = dense[0].weights


def percent(results):
    mean, deviation = mean_std([100 * result.accuracy for result in results])
    return f"{mean:.1f} ± {deviation:.1f}"


rows = [["sparsity asked", "connections asked", "left, each seed", "accuracy (%)"]]
rows.append(["dense", f"{total:,}", "", percent(dense)])
for sparsity, results in budgets.items():
    left = ", ".join(f"{result.nnz:,}" for result in results)
    asked = f"{(1 - sparsity) * total:,.0f}"
    rows.append([f"{sparsity:g}", asked, left, percent(results)])
print(as_text(rows))
print(f"accuracy on {len(data.validation.labels)} validation images, mean ± deviation")

# %% [markdown]
# ## The penalty that was found, put in by hand
#
# What the controller had come to when the masks were cut is the first guess for a fixed
# penalty: the mean over the seeds (of the logarithms) is now given to each of them, for
# the whole training, and no budget. What differs is the way down: the controller was at
# times far stronger, a fixed penalty is as strong at the start as at the end, and
# nothing cuts at the freeze.

# %%
found = {s: np.exp(np.log(history[:, -1]).mean()) for s, history in histories.items()}
fixed = {
    sparsity: trained("scl", sparsity=0.0, penalty=float(penalty))[1]
    for sparsity, penalty in found.items()
}
factors = {
    sparsity: [
        one.nnz / other.nnz
        for one, other in zip(fixed[sparsity], budgets[sparsity], strict=True)
    ]
    for sparsity in SPARSITIES
}
rows = [["sparsity asked", "penalty found", "it leaves, each seed", "times the budget"]]
rows[0].append("accuracy (%)")
for sparsity in SPARSITIES:
    left = ", ".join(f"{result.nnz:,}" for result in fixed[sparsity])
    times = ", ".join(f"{factor:.2f}" for factor in factors[sparsity])
    cells = [f"{sparsity:g}", f"{found[sparsity]:.1e}", left, times]
    rows.append([*cells, percent(fixed[sparsity])])
print(as_text(rows))

# %% [markdown]
# Left: points are means over the seeds, with bars of one standard deviation; the band
# is dense. Middle: the penalty after each epoch, geometric mean of the seeds, for each
# budget; the masks rest from the vertical line on. Right: a filled point is a budget
# and the penalty found for it, the open one what that penalty leaves when it is fixed.

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 4), layout="constrained"
)
level, deviation = mean_std([100 * result.accuracy for result in dense])
left.axhline(level, color="0.4", linestyle="--", label="dense")
left.axhspan(level - deviation, level + deviation, color="0.9")
kinds = {"budget": (budgets, "o-", "black"), "fixed penalty": (fixed, "s:", "white")}
for label, (results, look, face) in kinds.items():
    points = [
        (
            *mean_std([result.nnz / total for result in several]),
            *mean_std([100 * result.accuracy for result in several]),
        )
        for several in results.values()
    ]
    x, dx, y, dy = zip(*points, strict=True)
    left.errorbar(
        x, y, dy, dx, fmt=look, color="black", mfc=face, capsize=4, label=label
    )
log_fractions(left)
left.set(xlabel="fraction of connections left", ylabel="validation accuracy (%)")
left.legend(frameon=False)

epochs = np.arange(1, config.epochs + 1)
for (sparsity, history), marker in zip(histories.items(), "os^Dv", strict=False):
    mean = np.exp(np.log(history).mean(axis=0))
    label = f"{100 * (1 - sparsity):.3g} %"
    middle.plot(epochs, mean, marker=marker, color="black", mfc="0.8", markevery=0.15)
    middle.annotate(label, (1.02 * epochs[-1], mean[-1]), va="center")
middle.axvline(config.freeze_at * config.epochs, color="0.4", linestyle="--")
middle.set_yscale("log")
middle.grid(alpha=0.3)
middle.set(xlabel="epoch", ylabel="penalty (nats per connection)")
middle.set_xlim(right=1.2 * epochs[-1])

for sparsity, penalty in found.items():
    asked = budgets[sparsity][0].nnz / total
    came = np.mean([result.nnz for result in fixed[sparsity]]) / total
    right.plot([asked, came], [penalty, penalty], color="0.5")
    right.plot(asked, penalty, "o", color="black")
    right.plot(came, penalty, "s", color="black", mfc="white")
log_fractions(right)
right.set_yscale("log")
right.set(xlabel="fraction of connections left", ylabel="penalty (nats per connection)")
right.plot([], [], "o", color="black", label="budget, penalty found")
right.plot([], [], "s", color="black", mfc="white", label="left by it, fixed")
right.legend(frameon=False)
figure.savefig("budget.png", dpi=150)
plt.show()

# %% [markdown]
# ## What was seen

# %%
every = np.array(list(factors.values()))
sizes = np.array(list(found.values()))
exact = [
    result.nnz == round((1 - sparsity) * total)
    for sparsity, results in budgets.items()
    for result in results
]
print(f"{sum(exact)} of {len(exact)} runs left exactly what was asked. The penalties")
print(
    f"found go from {sizes[0]:.1e} to {sizes[-1]:.1e} nats per connection. Fixed, they"
)
print(
    "left these multiples of the budget, mean over the seeds; validation accuracy (%):"
)
print(f"dense: {percent(dense)}")
for sparsity, times in zip(SPARSITIES, every.mean(axis=1), strict=True):
    accuracy = percent(budgets[sparsity])
    print(f"{100 * (1 - sparsity):.3g} %: {times:.2f} times; {accuracy} at the budget")
assert all(exact)
assert (np.diff(sizes) > 0).all()
assert sizes[-1] / sizes[0] > 10
assert (np.diff(every.mean(axis=1) * (1 - np.array(SPARSITIES))) < 0).all()
assert (every[-2:] > 1 / 5).all()
assert (every[-2:] < 5).all()
