"""SCL beside other methods, each at its best settings and at the same sparsity.

python -m experiments.study fashion_mnist_lenet300 --compare

Every method chooses among as many settings, on the validation split, anew for each
sparsity; then it trains on training and validation examples together, with other seeds,
and sees the test set. Every run is written to experiments/results/compare_NAME.json as
soon as it is done: what was killed goes on, and `--methods` and `--targets` run a part.
"""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.book import RESULTS, SCRATCH, Book, Settings, Task, examples
from experiments.config import Config
from experiments.outcome import mean_std
from experiments.search import NOTHING, search
from experiments.spaces import Comparison

# Of methods that cannot be asked for a sparsity: the setting that it follows from, the
# larger the sparser, and the value that is tried first.
FOLLOWS = {
    "autoprune": ("penalty", 3e-4),
    "dst": ("penalty", 1e-3),
    "str": ("weight_decay", 1e-2),
}
# What a target is of, what is left and what there was: fields of records.
OF_WEIGHTS = ("nnz", "weights")
OF_OTHERS = {"scl_macs": ("macs_remaining", "macs")}
# How far from the connections allowed such a method may end.
TOLERANCE = {"validation": 0.1, "test": 0.01}
SEED = 1000  # the first that settings are chosen with; they are not tested


class ComparisonError(ValueError):
    """A comparison that cannot be run; the message says why."""


Runs = Generator[list[Task], None, Any]  # yields what must be run for it to go on
Row = dict[str, Any]


def run_comparison(
    name: str,
    *,
    methods: Sequence[str] | None = None,
    targets: Sequence[float] | None = None,
    data_dir: str | None = None,
    folder: Path = RESULTS,
    scratch: Path = SCRATCH,
) -> list[Row]:
    """Run a comparison, or what is missing of it; write down what it came to.

    What diverges is written down as such, and is no reason to stop: the search of a
    sparsity steps back from it, and a method without a search has no row there.

    Args:
      name: of the experiment.
      methods: those to run; all of its comparison by default.
      targets: the sparsities to run; all of its comparison by default.
      data_dir: folder of prepared TFDS data sets.
      folder: where the results are.
      scratch: where checkpoints are.

    Returns:
      A row for each pair of method and target of the comparison whose runs are done
      and stayed finite.

    Raises:
      ComparisonError: if the experiment has no comparison, a method or target is not
        in it, or there is no validation split.
    """
    config, comparison = configs.load_config(name), configs.load_comparison(name)
    if comparison is None:
        raise ComparisonError(
            f"{name} has no comparison; these have: {', '.join(configs.compared())}"
        )
    places = _places(comparison, None, None)
    asked = _places(comparison, methods, targets)
    if not config.validation:
        raise ComparisonError(
            "settings are chosen on the validation split; validation is 0"
        )
    book = Book(folder / f"compare_{name}.json", scratch / f"compare_{name}")
    chosen = {field for space in comparison.spaces.values() for field in space}
    chosen |= {field for field, _ in FOLLOWS.values()} | {"sparsity"}
    book.open(config, chosen)
    book.save(name=name, comparison=dataclasses.asdict(comparison))

    data = {
        "validation": examples(config, data_dir),
        "test": examples(dataclasses.replace(config, validation=0), data_dir),
    }

    def replayed(place: tuple[str, float]) -> tuple[list[Task], Row | None]:
        return _replayed(book, _compared(book, config, comparison, *place))

    # Asked anew after each task: what to try next depends on all that is known.
    while book.advance((task for place in asked for task in replayed(place)[0]), data):
        pass
    rows = [row for place in places if (row := replayed(place)[1])]
    book.save(summary=rows)
    return rows


def _places(
    comparison: Comparison,
    methods: Sequence[str] | None,
    targets: Sequence[float] | None,
) -> list[tuple[str, float]]:
    """Return the pairs of method and target; dense has the target 0 alone."""
    for kind, asked, known in (
        ("method", methods, comparison.spaces),
        ("target", targets, comparison.targets),
    ):
        for one in asked or ():
            if one not in known:
                told = ", ".join(map(str, known))
                raise ComparisonError(f"{kind} must be one of {told}; got {one!r}")
    pairs = itertools.product(
        comparison.spaces if methods is None else methods,
        comparison.targets if targets is None else targets,
    )
    return list(dict.fromkeys((m, 0.0 if m == "dense" else t) for m, t in pairs))


def _compared(
    book: Book, config: Config, comparison: Comparison, method: str, target: float
) -> Runs:
    """Choose the settings of a method for a target, test them; return the row.

    None where a training that was tested diverged and no other setting avoids it.
    """
    tried = range(SEED, SEED + comparison.seeds)
    tested = range(config.seed, config.seed + comparison.tested)

    def task(stage: str, settings: Settings) -> Task:
        fields = settings if stage == "validation" else {**settings, "validation": 0}
        return Task(
            stage,
            method,
            dataclasses.replace(config, **fields),
            tried if stage == "validation" else tested,
            settings,
        )

    def known(stage: str, settings: Settings, field: str) -> dict[float, float]:
        """Return what was left with each value of a field that has been tried."""
        tasks = {
            value: task(stage, {**settings, field: value})
            for value in book.tried(task(stage, settings), field)
        }
        return {v: _left(book.records(t)) for v, t in tasks.items() if book.has(t)}

    def placed(stage: str, settings: Settings, first: float | None = None) -> Runs:
        """Bring settings to the target; return them."""
        if method not in FOLLOWS:
            settings = {**settings, "sparsity": target}
            yield [task(stage, settings)]
            return settings
        field, start = FOLLOWS[method]
        while True:
            left = known(stage, settings, field)
            found = search(left, 1 - target, TOLERANCE[stage], first or start)
            settings = {**settings, field: found.value}
            if found.settled:
                return settings
            yield [task(stage, settings)]

    def accuracy(settings: Settings) -> float:
        records = book.records(task("validation", settings))
        return mean_std([record["accuracy"] for record in records])[0]

    def reached(stage: str, settings: Settings) -> bool:
        of = OF_OTHERS.get(method, OF_WEIGHTS)
        left = _left(book.records(task(stage, settings)), of)
        return abs(left / (1 - target) - 1) <= TOLERANCE[stage]

    def worth(settings: Settings) -> tuple[bool, float]:
        # What cannot be made as sparse is no better for being denser.
        return reached("validation", settings), accuracy(settings)

    trials = comparison.trials(method)
    found = yield from _together([placed("validation", trial) for trial in trials])
    best = max(found, key=worth)
    first = None
    if method in FOLLOWS:
        # Validation is only near the target; start where it says that the target is.
        field, _ = FOLLOWS[method]
        left = known("validation", best, field)
        first = search(left, 1 - target, 0, best[field]).value
    final = yield from placed("test", best, first)
    records = book.records(task("test", final))
    if _diverged(records):
        return None
    return {
        "method": method,
        "target": target,
        "settings": final,
        "validation": accuracy(best),
        "reached": method == "dense" or reached("test", final),
        **summarize(records),
    }


def _left(records: Sequence[dict[str, Any]], of: tuple[str, str] = OF_WEIGHTS) -> float:
    """Return the mean fraction of the weights left, or `NOTHING`.

    Nothing is left where the numbers of one run did not stay finite: more of what makes
    a network sparse would not have saved it.
    """
    if _diverged(records):
        return NOTHING
    remaining, total = of
    return max(mean_std([r[remaining] / r[total] for r in records])[0], NOTHING)


def _diverged(records: Sequence[dict[str, Any]]) -> bool:
    return any("diverged" in record for record in records)


def _together(many: Iterable[Runs]) -> Runs:
    """Ask for what all of them need at once, until all are done; return their ends."""
    many = list(many)
    ends: dict[int, Any] = {}
    while len(ends) < len(many):
        asked = []
        for i, one in enumerate(many):
            if i not in ends:
                try:
                    asked += next(one)
                except StopIteration as end:
                    ends[i] = end.value
        if asked:
            yield asked
    return [ends[i] for i in range(len(many))]


def _replayed(book: Book, runs: Runs) -> tuple[list[Task], Row | None]:
    """Return the tasks that must be done for runs to go on, or the row at their end."""
    while True:
        try:
            tasks = next(runs)
        except StopIteration as end:
            return [], end.value
        missing = [task for task in tasks if not book.has(task)]
        if missing:
            return missing, None


def summarize(records: Sequence[dict[str, Any]]) -> Row:
    """Return what runs that differ in their seeds came to, mean and deviation."""
    row: Row = {"seeds": [record["seed"] for record in records]}
    for name, value in {
        "accuracy": lambda run: run["accuracy"],
        "sparsity": lambda run: 1 - run["nnz"] / run["weights"],
        "nnz": lambda run: run["nnz"],
        "macs_remaining": lambda run: run["macs_remaining"],
        "least_density": lambda run: min(
            layer["nnz"] / layer["weights"] for layer in run["layers"]
        ),
    }.items():
        row[name], row[f"{name}_std"] = mean_std([value(run) for run in records])
    return row
