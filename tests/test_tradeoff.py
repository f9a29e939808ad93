"""The figure of a study: that the points drawn are those of its runs."""

import numpy as np
import pytest
from PIL import Image

from experiments import tables
from experiments.tradeoff import _figure, draw_tradeoff

SEEDS = [0, 1]
# penalty -> accuracies, and nnz of two layers of 100 and 300 weights, by seed
SCL = {
    1e-6: ([0.90, 0.92], [(40, 60), (60, 60)]),
    1e-5: ([0.80, 0.86], [(20, 12), (20, 8)]),
}
DENSE = {0.1: [0.93, 0.95], 0.5: [0.90, 0.90]}


def run(method, penalty, rate, seed, accuracy, nnz):
    layers = [
        {"path": f"Dense_{i}/kernel", "weights": w, "nnz": n, "macs": 2 * w}
        for i, (w, n) in enumerate(zip((100, 300), nnz, strict=True))
    ]
    return {
        "stage": "test",
        "method": method,
        "penalty": penalty,
        "learning_rate": rate,
        "pixels": "unit",
        "seed": seed,
        "accuracy": accuracy,
        "weights": 400,
        "nnz": sum(nnz),
        "macs": 800,
        "macs_remaining": 2 * sum(nnz),
        "layers": layers,
    }


def row(method, penalty, rate, accuracies=(0, 0)):
    return {
        "method": method,
        "penalty": penalty,
        "learning_rate": rate,
        "pixels": "unit",
        "seeds": SEEDS,
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies, ddof=1)),
    }


def made():
    runs = [
        run("scl", penalty, 0.1, seed, accuracies[seed], nnz[seed])
        for penalty, (accuracies, nnz) in SCL.items()
        for seed in SEEDS
    ]
    runs += [
        run("dense", None, rate, seed, accuracies[seed], (100, 300))
        for rate, accuracies in DENSE.items()
        for seed in SEEDS
    ]
    # Of another stage: not to be drawn.
    chosen = run("scl", 1e-6, 0.1, 0, 0.1, (1, 1)) | {"stage": "validation"}
    summary = [row("dense", None, rate, a) for rate, a in DENSE.items()]
    summary += [row("scl", penalty, 0.1) for penalty in SCL]
    every = {str(i): one for i, one in enumerate([chosen, *runs])}
    return {"name": "made_up", "runs": every, "summary": summary}


def to_budgets():
    """Return a book of two kinds of budgets: connections, and MACs."""
    book = made()
    kinds = {
        1e-6: {"sparsity": 0.7, "costs": "connections", "weigh": True},
        1e-5: {"sparsity": 0.9, "costs": "macs", "weigh": True},
    }
    for one in (*book["runs"].values(), *book["summary"]):
        # As a run or row of SCL has it: one of the two is there.
        one["budget"] = kinds.get(one["penalty"])
        one["penalty"] = None
    # A third point: as the second, of a larger budget.
    extra = {"sparsity": 0.5, "costs": "macs", "weigh": True}
    more = {
        f"more {seed}": run("scl", None, 0.1, seed, 0.95 - 0.01 * seed, (80, 240))
        | {"budget": extra}
        for seed in SEEDS
    }
    book["runs"] |= more
    book["summary"].append(row("scl", None, 0.1) | {"budget": extra})
    return book


def series(axes):
    """Return label -> what is drawn: points (x, y) of a line, and its deviations."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        # Half the length of the error bars, those of x first.
        ends = [np.array(bar.get_segments()) for bar in bars]
        spread = [np.ptp(end, axis=1)[:, i] / 2 for i, end in enumerate(ends)]
        found[container.get_label()] = np.array(line.get_xydata()), spread
    return found


@pytest.mark.parametrize("axes", [0, 1])
def test_points_are_means_over_the_seeds_in_a_line(axes):
    ((label, (points, spread)),) = series(_figure(made()).axes[axes]).items()
    assert label == "SCL"
    np.testing.assert_allclose(points, [(30 / 400, 83.0), (110 / 400, 91.0)])
    deviation = np.sqrt(2)  # of two values, by half their difference
    np.testing.assert_allclose(spread[0], [2 / 400 * deviation, 10 / 400 * deviation])
    np.testing.assert_allclose(spread[1], [3 * deviation, 1 * deviation])


@pytest.mark.parametrize("axes", [0, 1])
def test_budgets_of_each_kind_are_a_series_with_its_label(axes):
    drawn = series(_figure(to_budgets()).axes[axes])
    assert list(drawn) == ["SCL", "SCL to a budget of MACs, MACs penalized"]
    (first, _), (second, _) = drawn.values()
    np.testing.assert_allclose(first, [(110 / 400, 91.0)])
    np.testing.assert_allclose(second, [(30 / 400, 83.0), (320 / 400, 94.5)])
    legend = _figure(to_budgets()).axes[0].get_legend()  # of both
    assert [text.get_text() for text in legend.get_texts()] == ["dense", *drawn]


def test_macs_that_are_not_what_is_penalized_are_a_kind_of_their_own():
    book = to_budgets()
    for one in (*book["runs"].values(), *book["summary"]):
        budget = one.get("budget") or {}
        if budget.get("sparsity") == 0.5:
            one["budget"] = budget | {"weigh": False}
    axes = _figure(book).axes[0]
    assert list(series(axes)) == [
        "SCL",
        "SCL to a budget of MACs, MACs penalized",
        "SCL to a budget of MACs, connections penalized",
    ]
    looks = {
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle())
        for c in axes.containers
    }
    assert len(looks) == 3


def test_layers_are_those_of_the_first_kind():
    axes = _figure(to_budgets()).axes[2]
    assert [line.get_label() for line in axes.lines] == ["0.725"]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.5, 0.2])
    title = axes.get_legend().get_title().get_text()
    assert title == "SCL\nsparsity, mean of the seeds"
    # Said only where there are others.
    alone = _figure(made()).axes[2].get_legend().get_title().get_text()
    assert alone == "sparsity, mean of the seeds"


def test_line_is_the_best_dense_network_in_a_band_of_one_deviation():
    axes = _figure(made()).axes[0]
    line = next(x for x in axes.lines if x.get_label() == "dense")
    np.testing.assert_allclose(line.get_ydata(), 94.0)
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    np.testing.assert_allclose((band.y0, band.y1), (94 - 2**0.5, 94 + 2**0.5))


def test_layers_are_the_fractions_that_remain_by_sparsity():
    axes = _figure(made()).axes[2]
    drawn = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert list(drawn) == ["0.725", "0.925"]
    assert len({tuple(line.get_color()) for line in axes.lines}) == 2
    np.testing.assert_allclose(drawn["0.725"], [0.5, 0.2])
    np.testing.assert_allclose(drawn["0.925"], [0.2, 10 / 300])
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "Dense_0",
        "Dense_1",
    ]


def test_layers_are_drawn_in_the_order_of_their_numbers():
    book = made()
    for record in book["runs"].values():
        first, second = record["layers"]
        first["path"], second["path"] = "Conv_10/kernel", "Conv_2/kernel"
    [line, *_] = _figure(book).axes[-1].lines
    assert list(line.get_ydata()) == ["Conv_2", "Conv_10"]
    np.testing.assert_allclose(line.get_xdata(), [0.2, 0.5])


def test_file_is_a_png(tmp_path):
    draw_tradeoff(made(), tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


@pytest.mark.parametrize("missing", ["summary", "layers"])
def test_study_that_is_not_finished_or_has_no_layers_is_refused(missing, tmp_path):
    book = made()
    book.pop(missing, None)
    for one in book["runs"].values():
        one.pop(missing, None)
    with pytest.raises(ValueError, match=r"whose runs have layers.*made"):
        draw_tradeoff(book, tmp_path / "study.png")
    assert not list(tmp_path.iterdir())
    assert tables.has_layers(book) == (missing != "layers")


def test_every_study_with_layers_has_its_figure_in_the_repository():
    for path in tables.RESULTS.glob("*.json"):
        shown = f"experiments/results/{path.stem}.png" in tables.render()
        assert shown <= path.with_suffix(".png").exists(), path
