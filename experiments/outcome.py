"""What a finished training is worth: accuracy, sparsity, MACs, side by side."""

import dataclasses
import statistics
from collections.abc import Sequence

import jax

import scl_jax
from experiments.config import Config
from experiments.data import Split
from experiments.evaluate import evaluate
from experiments.mesh import make_mesh
from experiments.models import MODELS
from experiments.network import make_network, network_macs
from experiments.train import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One trained network, as numbers; all counts are exact.

    Attributes:
      method: a name in `experiments.methods.METHODS`.
      seed: the seed.
      accuracy: on the split it was evaluated on, last epoch, 0..1.
      weights: kernel weights.
      parameters: all parameters.
      nnz: nonzero kernel weights.
      macs: MACs per example of the dense network's kernels.
      macs_remaining: MACs per example of the nonzero weights.
      seconds: of training, without compilation where a seed ran before.
    """

    method: str
    seed: int
    accuracy: float
    weights: int
    parameters: int
    nnz: int
    macs: int
    macs_remaining: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the kernels, 0..1."""
        return 1 - self.nnz / self.weights


def make_report(config: Config, trained: Trained) -> scl_jax.Report:
    """Return the per-layer table of a trained network, masked or not."""
    masked = trained.trained
    if not isinstance(masked, scl_jax.MaskedParams):
        masked = scl_jax.mask_params(trained.folded)
    model, macs = MODELS[config.model], network_macs(make_network(config))
    return scl_jax.report(
        masked, macs, feature_axes=model.feature_axes, next_layer=model.next_layer
    )


def make_result(config: Config, trained: Trained, split: Split) -> Result:
    """Evaluate a trained network on a split and count what is left of it."""
    mesh = make_mesh(config.devices, config.model_parallel)
    accuracy = evaluate(
        make_network(config), trained.folded, trained.statistics, split, mesh
    )
    if accuracy is None:
        raise ValueError("a result needs examples to evaluate; the split has none")
    seconds = sum(metrics.seconds for metrics in trained.history)
    return _result(config, trained, trained.history[-1].method, accuracy, seconds)


def make_diverged(config: Config, method: str, seed: int) -> Result:
    """Return the result of a training whose numbers did not stay finite.

    It classifies nothing and has pruned nothing, so that no choice falls on it.
    """
    params, statistics = make_network(config).init(jax.random.key(seed))
    dense = Trained(seed, params, statistics, params, [])
    return _result(config, dense, method, 0.0, 0.0)


def _result(
    config: Config, trained: Trained, method: str, accuracy: float, seconds: float
) -> Result:
    totals = make_report(config, trained).totals
    macs, remaining = totals.macs, totals.macs_remaining
    if not (isinstance(macs, int) and isinstance(remaining, int)):
        raise ValueError(f"the MACs of {config.model} are unknown: {macs}")
    return Result(
        method=method,
        seed=trained.seed,
        accuracy=accuracy,
        weights=totals.weights,
        parameters=totals.parameters,
        nnz=totals.nnz,
        macs=macs,
        macs_remaining=remaining,
        seconds=seconds,
    )


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0


def comparison(results: Sequence[Result]) -> list[list[str]]:
    """Return the cells of a table: a header, and a row per method in its order."""
    header = ["method", "seeds", "accuracy (%)", "sparsity", "connections", "MACs"]
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        rows.append(
            [
                method,
                str(len(own)),
                _spread([100 * r.accuracy for r in own], ".2f"),
                _spread([r.sparsity for r in own], ".4f"),
                f"{statistics.fmean(r.nnz for r in own):,.0f}",
                f"{statistics.fmean(r.macs_remaining for r in own):,.0f}",
            ]
        )
    return [header, *rows]


def _spread(values: Sequence[float], form: str) -> str:
    mean, std = mean_std(values)
    return f"{mean:{form}} ± {std:{form}}" if len(values) > 1 else f"{mean:{form}}"


def as_text(cells: Sequence[Sequence[str]]) -> str:
    """Return cells as aligned plain text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:]])


def as_markdown(cells: Sequence[Sequence[str]]) -> str:
    """Return cells as a table in GitHub's Markdown."""
    header, *rows = cells
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def in_words(results: Sequence[Result]) -> str:
    """Say in a sentence what the connectivity learned by SCL is worth."""

    def mean(method: str, name: str) -> float:
        values = [getattr(r, name) for r in results if r.method == method]
        return statistics.fmean(values)

    pruned, accuracy = 100 * mean("scl", "sparsity"), 100 * mean("scl", "accuracy")
    fewer = mean("scl", "macs") / max(1.0, mean("scl", "macs_remaining"))
    difference = accuracy - 100 * mean("dense", "accuracy")
    side = "more" if difference >= 0 else "less"
    times = f"{fewer:.0f}" if fewer >= 10 else f"{fewer:.1f}"
    return (
        f"SCL pruned {pruned:.1f} % of the kernel weights by itself and classifies "
        f"{accuracy:.1f} % of the test examples correctly, {abs(difference):.1f} "
        f"points {side} than the dense network, with {times} times fewer MACs (FLOPs "
        "= 2 x MACs; the counts, not the speed of a dense kernel)."
    )
