"""The figure of a finished study: what sparsity costs, and where the weights go."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.figures import COLOURS, styled
from experiments.outcome import mean_std


@styled
def draw_tradeoff(book: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the weights and MACs that remain, and each layer's share.

    Points are means over the seeds, with error bars of one standard deviation; the
    dense network that is best is a line in a band of one standard deviation.

    Args:
      book: what `experiments.study` wrote for a finished study.
      path: the PNG file to write.

    Raises:
      ValueError: if the study is not finished, or its runs have no layers.
    """
    _figure(book).savefig(path, format="png", dpi=150)


def _figure(book: dict[str, Any]) -> Figure:
    rows = book.get("summary", [])
    tested = [
        [_run(book, row, seed) for seed in row["seeds"]]
        for row in rows
        if row["method"] == "scl"
    ]
    if not tested or not all("layers" in run for runs in tested for run in runs):
        raise ValueError(
            "draw_tradeoff: needs a finished study whose runs have layers; got "
            f"{book.get('name')!r} with {len(tested)} settings of SCL"
        )
    dense = max(
        (row for row in rows if row["method"] == "dense"), key=lambda r: r["accuracy"]
    )
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    wholes = ("nnz", "weights", "weights"), ("macs_remaining", "macs", "MACs")
    for i, (remaining, whole, name) in enumerate(wholes):
        axes = figure.add_subplot(grid[i, 0])
        level, spread = 100 * dense["accuracy"], 100 * dense["accuracy_std"]
        axes.axhline(level, color="k", linestyle="--", label="dense")
        axes.axhspan(level - spread, level + spread, color="k", alpha=0.12, lw=0)
        for runs in tested:
            x = mean_std([run[remaining] / run[whole] for run in runs])
            y = mean_std([100 * run["accuracy"] for run in runs])
            axes.errorbar(
                *(x[0], y[0], y[1], x[1]),
                fmt="o",
                color=COLOURS[1],
                capsize=4,
                label="SCL" if runs is tested[0] else None,
            )
        _log_fractions(axes)
        axes.set(xlabel=f"fraction of {name} remaining", ylabel="test accuracy (%)")
        axes.legend(loc="lower right")
    axes = figure.add_subplot(grid[:, 1])
    names = [layer["path"].removesuffix("/kernel") for layer in tested[0][0]["layers"]]
    for runs, colour in zip(tested, (COLOURS[0], *COLOURS[2:]), strict=False):
        kept = np.array(
            [[layer["nnz"] / layer["weights"] for layer in r["layers"]] for r in runs]
        )
        total = 1 - np.mean([run["nnz"] / run["weights"] for run in runs])
        axes.plot(kept.mean(axis=0), names, "o-", color=colour, label=f"{total:.3f}")
    _log_fractions(axes)
    axes.invert_yaxis()
    axes.set(xlabel="fraction of weights remaining per kernel")
    axes.legend(title="sparsity, mean of the seeds")
    return figure


def _log_fractions(axes: Any) -> None:
    """Scale the x axis by logarithms, and write 0.02 instead of 2 x 10^-2."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _run(book: dict[str, Any], row: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the tested run of a row and a seed."""
    fields = ("method", "penalty", "learning_rate", "pixels")
    return next(
        run
        for run in book["runs"].values()
        if run["stage"] == "test"
        and run["seed"] == seed
        and all(run[field] == row[field] for field in fields)
    )
