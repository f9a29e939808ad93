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


def points(axes):
    return [
        tuple(float(v[0]) for v in c.lines[0].get_data()) for c in axes.containers[:2]
    ]


def test_points_are_means_over_the_seeds():
    weights, macs, _ = _figure(made()).axes
    for axes in (weights, macs):
        expected = [(110 / 400, 91.0), (30 / 400, 83.0)]
        np.testing.assert_allclose(points(axes), expected)


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
    np.testing.assert_allclose(drawn["0.725"], [0.5, 0.2])
    np.testing.assert_allclose(drawn["0.925"], [0.2, 10 / 300])
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "Dense_0",
        "Dense_1",
    ]


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
        assert shown <= path.with_suffix(".png").exists()
