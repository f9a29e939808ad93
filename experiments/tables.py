"""Write the README's results from the committed files in experiments/results.

python -m experiments.tables
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.models import MODELS
from experiments.outcome import as_markdown
from experiments.study import RESULTS
from experiments.tradeoff import draw_tradeoff

README = Path(__file__).parent.parent / "README.md"
_START, _END = "<!-- results -->", "<!-- /results -->"


def render(folder: Path = RESULTS) -> str:
    """Return the results in Markdown: a table for each finished study, the costs."""
    books = [json.loads(path.read_text()) for path in _studies(folder)]
    parts = [_study(book) for book in books if "summary" in book]
    zoo = folder / "zoo.json"
    if zoo.exists():
        parts.append(_zoo(json.loads(zoo.read_text())))
    benches = [
        json.loads(path.read_text()) for path in sorted(folder.glob("bench*.json"))
    ]
    return "\n\n".join([*parts, *map(_bench, benches)])


def between_markers(text: str) -> str:
    """Return what the README has between its markers.

    Raises:
      ValueError: if it has not both markers.
    """
    if _START not in text or _END not in text:
        raise ValueError(f"README.md must contain {_START} and {_END}")
    return text.partition(_START)[2].partition(_END)[0].strip()


def has_layers(book: dict[str, Any]) -> bool:
    """Tell whether a study kept what is left of each layer."""
    tested = [run for run in book["runs"].values() if run["stage"] == "test"]
    return all("layers" in run for run in tested)


def _studies(folder: Path) -> list[Path]:
    paths = [folder / f"{name}.json" for name in configs.names()]
    return [path for path in paths if path.exists()]


def study_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table of a study: a header, and its rows."""
    header = ["method", "pixels", "learning rate", "asked for"]
    header += ["test accuracy (%)", "sparsity", "connections", "MACs"]
    cells = [header]
    for row in rows:
        method = {"dense": "dense", "scl": "SCL"}[row["method"]]
        cells.append(
            [
                method,
                row["pixels"],
                f"{row['learning_rate']:g}",
                _asked(row),
                f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_std']:.2f}",
                f"{row['sparsity']:.4f} ± {row['sparsity_std']:.4f}",
                f"{row['nnz']:,.0f}",
                f"{row['macs_remaining']:,.0f}",
            ]
        )
    return cells


def _study(book: dict[str, Any]) -> str:
    config, versions, rows = book["config"], book["versions"], book["summary"]
    seeds = len(rows[0]["seeds"])
    figure = (
        f"; [figure](experiments/results/{book['name']}.png)"
        if has_layers(book)
        else ""
    )
    return (
        f"**{configs.summary(book['name'])}** {config['epochs']} epochs, {seeds} "
        f"seeds, {versions['device']}, jax {versions['jax']}; "
        f"`python -m experiments.study {book['name']}`{figure}\n\n"
        f"{as_markdown(study_cells(rows))}"
    )


def _asked(row: dict[str, Any]) -> str:
    """Return what SCL was given: a budget, or a fixed penalty."""
    budget = row.get("budget")
    if budget:
        of = {"connections": "", "macs": " of the MACs"}[budget["costs"]]
        alike = "" if budget["weigh"] else ", penalized alike"
        return f"{budget['sparsity']:g} pruned{of}{alike}"
    return "" if row["penalty"] is None else f"penalty {row['penalty']:g}"


def _zoo(zoo: dict[str, Any]) -> str:
    """Return what each network was asked for, what it reached, and what it missed."""
    runs = list(zoo["runs"].values())
    asked = list(dict.fromkeys(run["remaining"] for run in runs))
    header = ["network", "connections", *(f"{100 * x:g} % asked" for x in asked)]
    cells = [[*header, "missed by at most"]]
    done = {run["model"] for run in runs}
    for model in [model for model in MODELS if model in done]:
        own = {run["remaining"]: run for run in runs if run["model"] == model}
        missed = max(
            abs(run["reached"] / (x * run["connections"]) - 1) for x, run in own.items()
        )
        total = next(iter(own.values()))["connections"]
        reached = [f"{own[x]['reached']:,}" if x in own else "" for x in asked]
        cells.append([model, f"{total:,}", *reached, f"{100 * missed:.3f} %"])
    versions, config = zoo["versions"], runs[0]["config"]
    steps = config["epochs"] * config["look_every"]
    return (
        "**Budgets of connections, one setting for every network.** "
        f"{steps} steps on 28x28 images or texts, {versions['device']}, jax "
        f"{versions['jax']}; `python -m experiments.zoo`\n\n{as_markdown(cells)}"
    )


def _bench(bench: dict[str, Any]) -> str:
    header = ["network", "batch", "dense step", "SCL step", "SCL / dense", "spread"]
    cells = [[*header, "to a budget / dense"]]
    for row in bench["steps"]:
        cells.append(
            [
                row["network"],
                str(row["batch"]),
                f"{row['dense_us'] / 1000:.2f} ms",
                f"{row['scl_us'] / 1000:.2f} ms",
                f"{row['ratio']:.3f}",
                "{:.2f} to {:.2f}".format(*row["ratio_spread"]),
                f"{row['budget_ratio']:.3f}",
            ]
        )
    versions, first = bench["versions"], bench["steps"][0]
    arguments = bench.get("arguments")  # not there in files of before they were kept
    command = f'make bench ARGS="{arguments}"' if arguments else "make bench"
    return (
        f"**What a training step costs.** {first['compute']}, {versions['device']}, "
        f"jax {versions['jax']}, median of {first['repeats']} repeats; "
        f"`{command}`\n\n{as_markdown(cells)}"
    )


def main() -> None:
    """Put the results into the README, and draw their figures."""
    for path in _studies(RESULTS):
        book = json.loads(path.read_text())
        if "summary" in book and has_layers(book):
            draw_tradeoff(book, path.with_suffix(".png"))
    text = README.read_text()
    between_markers(text)
    head, _, rest = text.partition(_START)
    tail = rest.partition(_END)[2]
    README.write_text(f"{head}{_START}\n\n{render()}\n\n{_END}{tail}")


if __name__ == "__main__":
    main()
