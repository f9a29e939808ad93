"""The table and the figure of a comparison: methods beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import COLOURS, styled
from experiments.outcome import as_markdown
from experiments.tradeoff import log_fractions

NAMES = {
    "dense": "dense",
    "scl": "SCL",
    "scl_macs": "SCL, a budget of MACs",
    "gmp": "magnitude, global",
    "gmp_uniform": "magnitude, uniform",
    "magnitude_ste": "magnitude, straight-through",
    "rigl": "RigL, ERK",
    "str": "STR",
    "dst": "DST",
    "autoprune": "AutoPrune",
    "st3": "ST-3",
}
_MARKERS = "os^vDP<>X"
# Colour, marker and line of each method: the same in every figure.
_LOOKS = {
    name: (
        COLOURS[i % len(COLOURS)],
        f"{_MARKERS[i]}{'-' if i < len(COLOURS) else ':'}",
    )
    for i, name in enumerate(n for n in NAMES if n not in ("dense", "scl_macs"))
}
_LOOKS["scl_macs"] = (COLOURS[0], "*--")
Rows = Sequence[dict[str, Any]]


def comparison_cells(rows: Rows, field: str) -> list[list[str]]:
    """Return the cells of a table: a row per method, a column per sparsity.

    Args:
      rows: the summary of a comparison.
      field: what a cell shows: "accuracy" (%), "macs_remaining" (thousands),
        "least_density" (%) or "nnz" (thousands). Where the sparsity was not reached,
        it says at which it ended. That of a budget of MACs is of the MACs.
    """
    unit = {"macs_remaining": 1e-3, "nnz": 1e-3}.get(field, 100)
    targets = sorted({row["target"] for row in rows if row["method"] != "dense"})
    header = ["method", *(f"{100 * target:g} %" for target in targets)]
    cells = [header]
    for method in [name for name in NAMES if any(r["method"] == name for r in rows)]:
        own = {row["target"]: row for row in rows if row["method"] == method}
        told = {target: _cell(row, field, unit) for target, row in own.items()}
        # A dense network is the same at every sparsity.
        columns = [told.get(0.0 if method == "dense" else t, "") for t in targets]
        cells.append([NAMES[method], *columns])
    return cells


def _cell(row: dict[str, Any], field: str, unit: float) -> str:
    spread = f"{unit * row[field]:,.2f} ± {unit * row[f'{field}_std']:,.2f}"
    return spread if row["reached"] else f"{spread} (at {100 * row['sparsity']:.2f} %)"


def lead_cells(books: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of a table: how far SCL is ahead of the best of the others.

    A row per comparison, a column per sparsity: points of mean accuracy, ± the larger
    of the two standard deviations, and whose the best is, of those that reached the
    sparsity. Empty where SCL or all others are missing.
    """
    own = ("dense", "scl", "scl_macs")
    lead: dict[str, dict[float, str]] = {}
    for book in books:
        told = lead.setdefault(book["config"]["model"], {})
        rows = [row for row in book["summary"] if row["reached"]]
        for scl in [row for row in rows if row["method"] == "scl"]:
            others = [
                row
                for row in rows
                if row["method"] not in own and row["target"] == scl["target"]
            ]
            if others:
                best = max(others, key=lambda row: row["accuracy"])
                ahead = 100 * (scl["accuracy"] - best["accuracy"])
                std = 100 * max(scl["accuracy_std"], best["accuracy_std"])
                name = NAMES[best["method"]]
                told[scl["target"]] = f"{ahead:+.2f} ± {std:.2f}, {name}"
    targets = sorted({target for told in lead.values() for target in told})
    return [
        ["network", *(f"{100 * target:g} %" for target in targets)],
        *(
            [network, *(told.get(target, "") for target in targets)]
            for network, told in lead.items()
        ),
    ]


def comparison_tables(book: dict[str, Any]) -> str:
    """Return all tables of a comparison in Markdown."""
    titles = {
        "accuracy": "Test accuracy (%), last epoch",
        "nnz": "Connections (thousands)",
        "macs_remaining": "MACs remaining (thousands)",
        "least_density": "Weights remaining in the sparsest layer (%)",
    }
    return "\n\n".join(
        f"{title}:\n\n{as_markdown(comparison_cells(book['summary'], field))}"
        for field, title in titles.items()
    )


@styled
def draw_comparison(book: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the weights and the MACs that remain, a line per method.

    Points are means over the seeds, with error bars of one standard deviation; the
    dense network is a line in a band of one standard deviation. The axis ends where
    SCL's own fall from dense would be twice as deep, and a point below dense at the
    least: what lies lower is in the table alone, so that one collapsed method does not
    flatten all others into a line. What did not reach its sparsity stands where it is.

    Args:
      book: what a comparison wrote, with a summary.
      path: the PNG file to write.

    Raises:
      ValueError: if nothing but dense has been compared yet.
    """
    _figure(book).savefig(path, format="png", dpi=150)


def _figure(book: dict[str, Any]) -> Figure:
    rows = book["summary"]
    runs = book["runs"].values()
    methods = [name for name in NAMES if any(r["method"] == name for r in rows)]
    methods = [name for name in methods if name != "dense"]
    if not methods:
        raise ValueError(
            f"draw_comparison: nothing of {book.get('name')!r} has been compared yet"
        )
    whole = next(iter(runs))
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = ("nnz", "weights", "weights"), ("macs_remaining", "macs", "MACs")
    for axes, (remaining, total, name) in zip(panels, shown, strict=True):
        for row in rows:
            if row["method"] == "dense":
                level, spread = 100 * row["accuracy"], 100 * row["accuracy_std"]
                axes.axhline(level, color="k", linestyle="--", label="dense")
                axes.axhspan(
                    level - spread, level + spread, color="k", alpha=0.12, lw=0
                )
        for method in methods:
            colour, form = _LOOKS[method]
            own = sorted(
                (row for row in rows if row["method"] == method),
                key=lambda row: row[remaining],
            )
            axes.errorbar(
                [row[remaining] / whole[total] for row in own],
                [100 * row["accuracy"] for row in own],
                [100 * row["accuracy_std"] for row in own],
                [row[f"{remaining}_std"] / whole[total] for row in own],
                color=colour,
                fmt=form,
                linewidth=3 if method == "scl" else 1.5,
                zorder=3 if method == "scl" else 2,
                capsize=3,
                label=NAMES[method],
            )
        log_fractions(axes)
        axes.set_ylim(_limits(rows))
        axes.set(xlabel=f"fraction of {name} remaining")
    panels[0].set(ylabel="test accuracy (%)")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _limits(rows: Rows) -> tuple[float, float] | None:
    """Return the ends of the axis of accuracies in %, where SCL and dense are shown."""
    dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
    own = [row["accuracy"] for row in rows if row["method"] == "scl"]
    if not (dense and own):
        return None
    fall = max(max(dense) - min(own), 0.005)
    top = max(row["accuracy"] + row["accuracy_std"] for row in rows) + fall / 10
    return 100 * (max(dense) - 2 * fall), 100 * top
