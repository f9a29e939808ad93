"""Figures of a finished run, as PNG files: training, layers, inputs.

Means and standard deviations are over the seeds; a deviation is the square root of
the squares' sum / (seeds - 1), and is not shown for a single seed.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.train import Metrics
from scl_jax import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # Okabe and Ito
_LINES = ("-", "--", "-.", ":")
styled = matplotlib.rc_context(
    {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "font.size": 12,
        "legend.fontsize": "small",
        "legend.frameon": False,
        "legend.title_fontsize": "small",
        "lines.linewidth": 2,
    }
)


@styled
def draw_training(metrics: Sequence[Metrics], path: Path) -> None:
    """Draw sparsity and accuracy over the epochs, one line per method.

    Lines are means over the seeds, in bands of one standard deviation either side.

    Args:
      metrics: those of every method, seed and epoch, in any order.
      path: the PNG file to write.

    Raises:
      ValueError: if there are no metrics, the seeds of a method do not have the same
        epochs, or only some have a validation accuracy.
    """
    _save(_training_figure(metrics), path)


@styled
def draw_layers(reports: Sequence[Report], path: Path) -> None:
    """Draw the fraction of weights remaining, nnz / weights, per masked layer.

    Bars are means over the seeds, with error bars of one standard deviation.

    Args:
      reports: one per seed, of the same network.
      path: the PNG file to write.

    Raises:
      ValueError: if there are no reports, or they are of different networks.
    """
    _save(_layers_figure(reports), path)


@styled
def draw_inputs(
    masks: Sequence[np.ndarray], image_shape: tuple[int, int, int], path: Path
) -> None:
    """Draw where in the image the first layer is connected, mean over the seeds.

    Args:
      masks: one per seed, bool: the mask of the first kernel, of shape
        (H * W * C, units) if Dense, (h, w, C, filters) if Conv.
      image_shape: (H, W, C).
      path: the PNG file to write.

    Raises:
      ValueError: if there are no masks, or they do not fit the image or each other.
    """
    _save(_inputs_figure(masks, image_shape), path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150)


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over the first axis."""
    ddof = min(1, len(values) - 1)
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=ddof)


def _of_seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"mean of {count} seeds"


def _curves(
    metrics: Sequence[Metrics], field: str
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Return for each method its epochs, and a field's values (seeds, epochs)."""
    runs: dict[str, dict[int, dict[int, float]]] = {}
    for one in metrics:
        run = runs.setdefault(one.method, {}).setdefault(one.seed, {})
        if one.epoch in run:
            raise ValueError(
                "draw_training: there must be one Metrics per method, seed and epoch; "
                f"got two of {one.method}, seed {one.seed}, epoch {one.epoch}"
            )
        run[one.epoch] = getattr(one, field)
    curves = {}
    for method, seeds in runs.items():
        epochs = {seed: sorted(run) for seed, run in seeds.items()}
        first = next(iter(epochs.values()))
        if any(other != first for other in epochs.values()):
            raise ValueError(
                "draw_training: the seeds of a method must have the same epochs; "
                f"those of {method} have {epochs}"
            )
        values = [[run[epoch] for epoch in first] for run in seeds.values()]
        curves[method] = first, np.array(values)
    return curves


def _training_figure(metrics: Sequence[Metrics]) -> Figure:
    without = [one.validation_accuracy is None for one in metrics]
    if not metrics or any(without) != all(without):
        raise ValueError(
            "draw_training: needs metrics, all of them with a validation accuracy or "
            f"all without; got {len(metrics)}, {sum(without)} of them without"
        )
    seen = "train_accuracy" if any(without) else "validation_accuracy"
    titles = {
        "sparsity": "sparsity of the kernels",
        "train_accuracy": "running train accuracy",
        "validation_accuracy": "validation accuracy",
    }
    methods = len({one.method for one in metrics})
    figure = Figure(figsize=(8.5, 4.4 + 0.2 * methods), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, field in zip(panels, ("sparsity", seen), strict=True):
        for i, (method, (epochs, values)) in enumerate(_curves(metrics, field).items()):
            mean, deviation = _over_seeds(values)
            spread = f" ± {deviation[-1]:.3f}" if len(values) > 1 else ""
            label = f"{method}: {mean[-1]:.3f}{spread} (n = {len(values)})"
            colour, line = COLOURS[i % len(COLOURS)], _LINES[i % len(_LINES)]
            dot = "o" if len(epochs) == 1 else ""
            axes.plot(epochs, mean, color=colour, ls=line, marker=dot, label=label)
            band = mean - deviation, mean + deviation
            axes.fill_between(epochs, *band, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel=f"{titles[field]}, 0 to 1")
        axes.set_title(titles[field].capitalize())
        axes.grid(alpha=0.3)
        last = "after the last epoch: mean ± std (bands) of n seeds"
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), title=last)
    panels[0].set_ylim(-0.03, 1.03)
    ticks = min(3, len({one.epoch for one in metrics}))
    panels[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=ticks)
    return figure


def _layers_figure(reports: Sequence[Report]) -> Figure:
    layers = [[(row.path, row.shape) for row in one.rows] for one in reports]
    if not reports or any(other != layers[0] for other in layers):
        raise ValueError(
            "draw_layers: needs reports, all with the same paths and shapes of "
            f"masked kernels; got {layers}"
        )
    nnz = [[row.nnz for row in one.rows] for one in reports]
    weights = np.array([row.weights for row in reports[0].rows])
    mean, deviation = _over_seeds(nnz / weights)
    total = np.sum(nnz) / len(reports) / weights.sum()
    names = [f"{path}\n{shape}" for path, shape in layers[0]]

    figure = Figure(figsize=(8.5, 1.7 + 0.75 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, np.ones(len(names)), height=0.6, color="0.92")
    axes.barh(names, mean, height=0.6, color=COLOURS[0])
    for i, kept in enumerate(np.mean(nnz, axis=0)):
        spread = f" ± {deviation[i]:.4f}" if len(reports) > 1 else ""
        text = f"{mean[i]:.4f}{spread}\n{kept:,.0f} of {weights[i]:,}"
        axes.text(1.02, i, text, va="center", fontsize="small")
    if len(reports) > 1:
        axes.errorbar(mean, names, xerr=deviation, fmt="none", ecolor="k", capsize=5)
    axes.axvline(float(total), color=COLOURS[1], linestyle="--")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="fraction of weights remaining, nnz / weights")
    spread = ", ± 1 std" if len(reports) > 1 else ""
    axes.set_title(
        f"Weights remaining in each masked kernel ({_of_seeds(len(reports))}{spread})\n"
        f"dashed line: all masked kernels together, {total:.4f}"
    )
    return figure


def _connections(
    masks: Sequence[np.ndarray], image_shape: tuple[int, int, int]
) -> np.ndarray:
    """Return the connections per pixel or kernel tap, mean over the masks."""
    found = [(mask.dtype.name, mask.shape) for mask in masks]
    height, width, channels = image_shape
    shape = masks[0].shape if masks else ()
    dense = len(shape) == 2 and shape[0] == height * width * channels
    conv = len(shape) == 4 and shape[2] == channels
    if (
        not (dense or conv)
        or 0 in shape
        or any(one != ("bool", shape) for one in found)
    ):
        raise ValueError(
            "draw_inputs: needs bool masks, all of one shape (H * W * C, units) or "
            f"(h, w, C, filters), where (H, W, C) is {image_shape}, and not empty; "
            f"got {found}"
        )
    grid = (*image_shape, -1) if dense else shape
    return np.mean([np.sum(mask.reshape(grid), axis=(2, 3)) for mask in masks], axis=0)


def _inputs_figure(
    masks: Sequence[np.ndarray], image_shape: tuple[int, int, int]
) -> Figure:
    connections = _connections(masks, image_shape)
    size = masks[0].size
    place = "pixel" if masks[0].ndim == 2 else "kernel tap"
    cut = connections == 0

    figure = Figure(figsize=(7.2, 6.2), layout="compressed")
    axes = figure.subplots()
    # What is cut is not drawn: there the hatched background shows.
    axes.patch.set(edgecolor="0.6", hatch="////")
    image = axes.imshow(
        np.ma.masked_where(cut, connections),
        cmap="cividis",
        vmin=0,
        vmax=max(1, connections.max()),
    )
    most = size // connections.size
    figure.colorbar(image, label=f"connections per {place} (dense: {most})")
    title = f"First layer: {connections.sum():,.0f} of {size:,} connections kept"
    title += f" ({_of_seeds(len(masks))})\n"
    title += f"{cut.sum():,} of {cut.size:,} {place}s without any connection (hatched)"
    axes.set(xlabel=f"column ({place}s)", ylabel=f"row ({place}s)", title=title)
    return figure
