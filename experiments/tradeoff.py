"""The figure of a finished study: what sparsity costs, and where the weights go."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.figures import COLOURS, styled
from experiments.outcome import mean_std

_WORDS = re.compile(r"(\D+)(\d*)")
Runs = list[dict[str, Any]]  # that differ in their seeds
_LOOKS: tuple[dict[str, Any], ...] = (
    {"fmt": "o-", "color": COLOURS[1]},
    {"fmt": "s--", "color": COLOURS[0]},
    {"fmt": "^:", "color": COLOURS[2]},
)


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
    tested: list[Runs] = []
    kinds: dict[str, list[Runs]] = {}
    for row in rows:
        if row["method"] == "scl":
            tested.append([_run(book, row, seed) for seed in row["seeds"]])
            kinds.setdefault(_kind(row), []).append(tested[-1])
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
        for (kind, many), look in zip(kinds.items(), _LOOKS, strict=False):
            points = sorted(
                (
                    *mean_std([run[remaining] / run[whole] for run in runs]),
                    *mean_std([100 * run["accuracy"] for run in runs]),
                )
                for runs in many
            )
            x, dx, y, dy = zip(*points, strict=True)
            axes.errorbar(x, y, dy, dx, capsize=4, label=kind, **look)
        log_fractions(axes)
        axes.set(xlabel=f"fraction of {name} remaining", ylabel="test accuracy (%)")
        if i == 0:  # of both, and above: curves and the dense line may be anywhere
            axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    axes = figure.add_subplot(grid[:, 1])
    paths = [layer["path"] for layer in tested[0][0]["layers"]]
    order = sorted(range(len(paths)), key=lambda i: _numbered(paths[i]))
    names = [paths[i].removesuffix("/kernel") for i in order]
    first = next(iter(kinds.values()))
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(first)))
    for runs, colour in zip(first, shades, strict=True):
        kept = np.array(
            [[layer["nnz"] / layer["weights"] for layer in r["layers"]] for r in runs]
        )
        total = 1 - np.mean([run["nnz"] / run["weights"] for run in runs])
        axes.plot(
            kept.mean(axis=0)[order], names, "o-", color=colour, label=f"{total:.3f}"
        )
    log_fractions(axes)
    axes.invert_yaxis()
    axes.set(xlabel="fraction of weights remaining per kernel")
    of = f"{next(iter(kinds))}\n" if len(kinds) > 1 else ""
    axes.legend(title=f"{of}sparsity, mean of the seeds")
    return figure


def _numbered(path: str) -> list[tuple[str, int]]:
    """Return a key that sorts Conv_2 before Conv_10."""
    return [(word, int(number or 0)) for word, number in _WORDS.findall(path)]


def _kind(row: dict[str, Any]) -> str:
    """Return what a row of SCL belongs to."""
    budget = row.get("budget")
    if not budget or budget["costs"] == "connections":
        return "SCL"
    penalized = "MACs" if budget["weigh"] else "connections"
    return f"SCL to a budget of MACs, {penalized} penalized"


def log_fractions(axes: Any) -> None:
    """Scale the x axis by logarithms, and write 0.02 instead of 2 x 10^-2."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _run(book: dict[str, Any], row: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the tested run of a row and a seed."""
    fields = ("method", "penalty", "budget", "learning_rate", "pixels")
    return next(
        run
        for run in book["runs"].values()
        if run["stage"] == "test"
        and run["seed"] == seed
        and all(run.get(field) == row.get(field) for field in fields)
    )
