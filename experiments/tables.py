"""Write the results into the pages, from the committed files in experiments/results.

python -m experiments.tables
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.book import RESULTS, machines
from experiments.estimators import estimator_cells
from experiments.models import MODELS
from experiments.outcome import as_markdown
from experiments.side_by_side import (
    NAMES,
    comparison_cells,
    comparison_tables,
    draw_comparison,
    lead_cells,
)
from experiments.step_cost import allowed_bytes, scaling_cells
from experiments.tradeoff import draw_tradeoff

README = Path(__file__).parent.parent / "README.md"
PAGE = Path(__file__).parent / "README.md"  # the lab book: what is shown in full


def render(folder: Path = RESULTS) -> str:
    """Return the results in Markdown: a table for each finished study, the costs."""
    books = [json.loads(path.read_text()) for path in _studies(folder)]
    parts = [_study(book) for book in books if "summary" in book]
    parts += [_comparison(book, accuracy_alone=True) for book in _comparisons(folder)]
    zoo = folder / "zoo.json"
    if zoo.exists():
        parts.append(_zoo(json.loads(zoo.read_text())))
    benches = [
        json.loads(path.read_text()) for path in sorted(folder.glob("bench*.json"))
    ]
    return "\n\n".join([*parts, *map(_bench, benches)])


def render_leads(folder: Path = RESULTS) -> str:
    """Return how far SCL is ahead of the best other method in each comparison."""
    return as_markdown(lead_cells(_comparisons(folder)))


def render_comparisons(folder: Path = RESULTS) -> str:
    """Return all tables of each comparison, as far as it has been run."""
    return "\n\n".join(map(_comparison, _comparisons(folder)))


def render_costs(folder: Path = RESULTS) -> str:
    """Return what a training step of each method costs, a table per benchmark."""
    paths = sorted(folder.glob("methods_*.json"))
    return "\n\n".join(_costs(json.loads(path.read_text())) for path in paths)


def render_estimators(folder: Path = RESULTS) -> str:
    """Return the table of each network that all estimators have trained."""
    paths = [folder / f"estimators_{name}.json" for name in configs.names()]
    books = [json.loads(path.read_text()) for path in paths if path.exists()]
    return "\n\n".join(_estimators(book) for book in books if "summary" in book)


def between_markers(text: str, name: str = "results") -> str:
    """Return what a page has between two markers.

    Raises:
      ValueError: if it has not both markers.
    """
    return _parts(text, name)[1].strip()


def _parts(text: str, name: str) -> tuple[str, str, str]:
    """Return what is before, between and behind two markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(start)
    inside, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page must contain {start} and {end}")
    return head, inside, tail


def has_layers(book: dict[str, Any]) -> bool:
    """Tell whether a study kept what is left of each layer."""
    tested = [run for run in book["runs"].values() if run["stage"] == "test"]
    return all("layers" in run for run in tested)


def _studies(folder: Path) -> list[Path]:
    paths = [folder / f"{name}.json" for name in configs.names()]
    return [path for path in paths if path.exists()]


def _comparisons(folder: Path) -> list[dict[str, Any]]:
    """Return the comparisons of which something has been run."""
    paths = [folder / f"compare_{name}.json" for name in configs.names()]
    books = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [book for book in books if book.get("summary")]


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
    config, rows = book["config"], book["summary"]
    seeds = len(rows[0]["seeds"])
    figure = (
        f"; [figure](experiments/results/{book['name']}.png)"
        if has_layers(book)
        else ""
    )
    return (
        f"**{configs.summary(book['name'])}** {config['epochs']} epochs, {seeds} "
        f"seeds, {machines(book)}; "
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


def _comparison(book: dict[str, Any], *, accuracy_alone: bool = False) -> str:
    config, name = book["config"], book["name"]
    cells = comparison_cells(book["summary"], "accuracy")
    seeds = max(len(row["seeds"]) for row in book["summary"])
    if accuracy_alone:
        tables = f"Test accuracy in % at each sparsity:\n\n{as_markdown(cells)}\n\n"
        tables += f"![the same as a figure](experiments/results/compare_{name}.png)"
    else:
        tables = f"![accuracy](results/compare_{name}.png)\n\n"
        tables += comparison_tables(book)
    return (
        f"**{configs.summary(name).rstrip('.')}, methods side by side.** "
        f"{config['epochs']} epochs, {seeds} seeds, {machines(book)}; "
        f"`python -m experiments.study {name} --compare`\n\n"
        f"{tables}{_of_macs(book['summary'])}"
    )


def _of_macs(rows: Sequence[dict[str, Any]]) -> str:
    """Say what the targets of a budget of MACs are, if there is one."""
    if all(row["method"] != "scl_macs" for row in rows):
        return ""
    return f'\n\n"{NAMES["scl_macs"]}": that part of the MACs is pruned.'


def _estimators(book: dict[str, Any]) -> str:
    config, name = book["config"], book["name"]
    return (
        f"**{configs.summary(name).rstrip('.')}.** {config['epochs']} epochs, "
        f"{100 * config['sparsity']:g} % pruned, validation, {config['seeds']} seeds, "
        f"{machines(book)}; `python -m experiments.estimators {name}`\n\n"
        f"{as_markdown(estimator_cells(book['summary']))}"
    )


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
    """Return what steps cost beside dense, or devices beside one."""
    if "scaling" in bench:
        return _timed("Several devices", bench, scaling_cells(bench["scaling"]))
    cells = _step_cells(bench["steps"])
    return _timed("What a training step costs", bench, cells)


def _timed(title: str, bench: dict[str, Any], cells: list[list[str]]) -> str:
    """Return the table of a benchmark, with how it was made."""
    first = (bench.get("steps") or bench["scaling"])[0]
    versions, arguments = bench["versions"], bench["arguments"]
    command = f'make bench ARGS="{arguments}"' if arguments else "make bench"
    note = f"; {bench['note']}" if "note" in bench else ""
    return (
        f"**{title}.** {first['compute']}, {versions['device']}, "
        f"jax {versions['jax']}, median of {first['repeats']} repeats, commit "
        f"{versions['commit'][:7]}; "
        f"`{command}`{note}\n\n{as_markdown(cells)}"
    )


def _costs(bench: dict[str, Any]) -> str:
    """Return a row per method with its step over the dense one, in each network."""
    rows = bench["steps"]
    header = ["method", *(f"{row['network']}, batch {row['batch']}" for row in rows)]
    # SCL as it is beside other methods: to a budget, and then with masks at rest.
    names = {"budget": "SCL, to a budget", "frozen": "SCL, masks at rest", **NAMES}
    told = [name for name in rows[0]["timed"] if name not in ("dense", "scl")]
    cells = [
        [names[name], *(_ratio(row["timed"].get(name)) for row in rows)]
        for name in told
    ]
    title = "A training step of each method, over the dense step"
    return _timed(title, bench, [header, *cells])


def _step_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row per network: steps over the dense step, the least bytes, memory."""
    cells = [["network", "batch", "images", "dense step", "SCL / dense"]]
    cells[0] += ["to a budget", "masks at rest", "floor", "memory, of allowed"]
    for row in rows:
        timed = row["timed"]
        told = ""
        if "bytes" in timed.get("scl", {}):
            memory, allowed = timed["scl"]["bytes"], allowed_bytes(row)
            told = f"{memory / 1e6:,.1f} of {allowed / 1e6:,.1f} MB"
        cells.append(
            [
                row["network"],
                str(row["batch"]),
                f"{row['side']}x{row['side']}",
                f"{timed['dense']['us'] / 1000:.2f} ms",
                *(_ratio(timed.get(name)) for name in ("scl", "budget", "frozen")),
                f"{row['floor_bytes'] / 1e6:,.1f} MB",
                told,
            ]
        )
    return cells


def _ratio(one: dict[str, Any] | None) -> str:
    """Return a ratio to the dense step, with its spread where that was kept."""
    if one is None:
        return ""
    spread = one.get("spread")
    told = " ({:.2f} to {:.2f})".format(*spread) if spread else ""
    return f"{one['ratio']:.3f}{told}"


def main() -> None:
    """Put the results into the two pages, and draw their figures."""
    for path in _studies(RESULTS):
        book = json.loads(path.read_text())
        if "summary" in book and has_layers(book):
            draw_tradeoff(book, path.with_suffix(".png"))
    for book in _comparisons(RESULTS):
        draw_comparison(book, RESULTS / f"compare_{book['name']}.png")
    _put(README, "leads", render_leads())
    _put(README, "results", render())
    _put(PAGE, "comparisons", render_comparisons())
    _put(PAGE, "costs", render_costs())
    _put(PAGE, "estimators", render_estimators())


def _put(page: Path, name: str, content: str) -> None:
    """Put content between the markers of a page."""
    head, _, tail = _parts(page.read_text(), name)
    page.write_text(f"{head}<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->{tail}")


if __name__ == "__main__":
    main()
