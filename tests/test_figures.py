"""Figures: that the data drawn is the data given, and what cannot be drawn."""

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import Image

import scl_jax
from experiments import figures
from experiments.train import Metrics

SPARSITY = {0: [0.2, 0.5, 0.9], 1: [0.4, 0.6, 0.8], 2: [0.3, 0.7, 0.7]}


def metrics(method="scl", seeds=SPARSITY, validation=True):
    """Return metrics per seed and epoch; accuracies are functions of sparsity."""
    return [
        Metrics(
            method=method,
            seed=seed,
            epoch=epoch,
            loss=0.1,
            train_accuracy=1 - value / 2,
            validation_accuracy=1 - value / 4 if validation else None,
            nnz=7,
            sparsity=value,
            seconds=0.5,
        )
        for seed, values in seeds.items()
        for epoch, value in enumerate(values, start=1)
    ]


DENSE = metrics("dense", {0: [0.0, 0.0, 0.0]})


def report(kept, shapes=((3, 4), (4, 2))):
    """Return the report of a network with so many connections per layer."""
    params = {f"Dense_{i}": {"kernel": jnp.ones(s)} for i, s in enumerate(shapes)}
    masks = {
        f"Dense_{i}": {
            "kernel": jnp.where(jnp.arange(np.prod(s)) < k, 1.0, -1.0).reshape(s)
        }
        for i, (s, k) in enumerate(zip(shapes, kept, strict=True))
    }
    return scl_jax.report(scl_jax.MaskedParams(params, masks))


def bernoulli(*shape):
    return np.random.RandomState(sum(shape)).random_sample(shape) < 0.3


def drawn_lines(axes):
    """Return method -> (x, y), by the first word of the line's label."""
    return {line.get_label().split(":")[0]: line.get_data() for line in axes.lines}


def drawn_bars(axes):
    """Return the lengths of the bars over the bars that stand for all weights."""
    remaining = axes.containers[1]
    assert [bar.get_width() for bar in axes.containers[0]] == [1.0] * len(remaining)
    return [bar.get_width() for bar in remaining]


def test_lines_are_means_over_the_seeds_and_bands_one_deviation():
    figure = figures._training_figure(DENSE + metrics())
    values = np.array(list(SPARSITY.values()))
    for axes, seen in zip(figure.axes, (values, 1 - values / 4), strict=True):
        epochs, mean = drawn_lines(axes)["scl"]
        assert list(epochs) == [1, 2, 3]
        np.testing.assert_allclose(mean, seen.sum(0) / 3)
        deviation = np.sqrt(((seen - seen.sum(0) / 3) ** 2).sum(0) / 2)
        (path,) = axes.collections[1].get_paths()
        for epoch in (1, 2, 3):
            edge = path.vertices[path.vertices[:, 0] == epoch, 1]
            middle, half = mean[epoch - 1], deviation[epoch - 1]
            np.testing.assert_allclose(edge.min(), middle - half)
            np.testing.assert_allclose(edge.max(), middle + half)
    np.testing.assert_array_equal(drawn_lines(figure.axes[0])["dense"][1], 0)


def test_order_of_the_metrics_does_not_matter():
    axes = figures._training_figure(metrics()[::-1]).axes[0]
    epochs, mean = drawn_lines(axes)["scl"]
    assert list(epochs) == [1, 2, 3]
    np.testing.assert_allclose(mean, [0.3, 0.6, 0.8])


def test_accuracy_label_says_which_accuracy_is_drawn():
    with_split = figures._training_figure(metrics()).axes[1]
    assert with_split.get_ylabel() == "validation accuracy, 0 to 1"
    without = figures._training_figure(metrics(validation=False)).axes[1]
    assert without.get_ylabel() == "running train accuracy, 0 to 1"
    np.testing.assert_allclose(drawn_lines(without)["scl"][1], [0.85, 0.7, 0.6])


def test_methods_differ_in_colour_and_in_line_style():
    names = ("dense", "scl", "magnitude", "random")
    every = [one for name in names for one in metrics(name)]
    lines = figures._training_figure(every).axes[0].lines
    assert len({line.get_color() for line in lines}) == 4
    assert len({line.get_linestyle() for line in lines}) == 4


def test_legend_gives_the_last_epoch_and_no_deviation_of_one_seed():
    axes = figures._training_figure(DENSE + metrics()).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "dense: 0.000 (n = 1)",
        "scl: 0.800 ± 0.100 (n = 3)",
    ]


def test_single_epoch_is_drawn_as_a_dot():
    one = figures._training_figure(metrics(seeds={0: [0.5]})).axes[0].lines[0]
    many = figures._training_figure(metrics()).axes[0].lines[0]
    assert (one.get_marker(), many.get_marker()) == ("o", "")
    ticks = one.axes.xaxis.get_major_locator()()
    assert list(ticks) == [round(tick) for tick in ticks]


def test_bars_are_the_fractions_remaining():
    figure = figures._layers_figure([report((6, 2)), report((3, 6))])
    (axes,) = figure.axes
    np.testing.assert_allclose(drawn_bars(axes), [(6 + 3) / 24, (2 + 6) / 16])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["Dense_0/kernel\n(3, 4)", "Dense_1/kernel\n(4, 2)"]
    low, high = axes.get_ylim()
    assert low > high  # the first layer is on top
    # Two values, a and b, deviate by |a - b| / sqrt(2).
    segments = np.array(axes.collections[0].get_segments())
    np.testing.assert_allclose(
        segments[:, 1, 0] - segments[:, 0, 0],
        2 * np.array([3 / 12, 4 / 8]) / np.sqrt(2),
    )
    assert [text.get_text() for text in axes.texts] == [
        "0.3750 ± 0.1768\n4 of 12",
        "0.5000 ± 0.3536\n4 of 8",
    ]


def test_dashed_line_is_the_fraction_over_all_masked_kernels():
    (axes,) = figures._layers_figure([report((6, 2)), report((3, 6))]).axes
    (line,) = (line for line in axes.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(line.get_xdata(), (6 + 2 + 3 + 6) / (2 * 20))
    assert axes.get_title().endswith("together, 0.4250")


def test_bars_of_one_seed_have_no_deviation():
    (axes,) = figures._layers_figure([report((6, 0))]).axes
    np.testing.assert_allclose(drawn_bars(axes), [0.5, 0.0])
    assert len(axes.collections) == 0
    assert "±" not in axes.get_title() + "".join(t.get_text() for t in axes.texts)


def test_dense_connections_are_summed_per_pixel():
    masks = [bernoulli(4 * 5 * 3, 6), bernoulli(4 * 5 * 3, 6)[::-1]]
    # Pixels in rows, the channels of a pixel side by side, as flattening has it.
    expected = np.zeros((4, 5))
    for mask in masks:
        for i in range(4 * 5 * 3):
            expected[i // 15, i % 15 // 3] += mask[i].sum() / 2
    np.testing.assert_array_equal(figures._connections(masks, (4, 5, 3)), expected)


def test_conv_connections_are_summed_per_kernel_tap():
    masks = [bernoulli(3, 2, 4, 7), ~bernoulli(3, 2, 4, 7)]
    expected = [[4 * 7 / 2] * 2] * 3  # a mask and its opposite
    np.testing.assert_array_equal(figures._connections(masks, (28, 28, 4)), expected)
    expected = [[masks[0][i, j].sum() for j in range(2)] for i in range(3)]
    one = figures._connections(masks[:1], (28, 28, 4))
    np.testing.assert_array_equal(one, expected)


def test_jax_masks_are_drawn_as_numpy_masks():
    mask = bernoulli(20, 6)
    ours = figures._connections([jnp.asarray(mask)], (4, 5, 1))
    np.testing.assert_array_equal(ours, mask.sum(1).reshape(4, 5))


def test_heat_map_leaves_out_pixels_that_are_cut_in_every_seed():
    first, second = np.zeros((2, 6, 10), bool)
    first[1, :3] = first[4, :5] = second[4, :1] = True
    axes, bar = figures._inputs_figure([first, second], (2, 3, 1)).axes
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown.filled(0), [[0, 1.5, 0], [0, 3, 0]])
    np.testing.assert_array_equal(shown.mask, [[1, 0, 1], [1, 0, 1]])
    assert axes.images[0].get_clim() == (0, 3)
    assert axes.patch.get_hatch()
    assert axes.get_title() == (
        "First layer: 4 of 60 connections kept (mean of 2 seeds)\n"
        "4 of 6 pixels without any connection (hatched)"
    )
    assert bar.get_ylabel() == "connections per pixel (dense: 10)"


def test_heat_map_without_connections_keeps_a_scale():
    axes = figures._inputs_figure([np.zeros((6, 10), bool)], (2, 3, 1)).axes[0]
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.images[0].get_array().mask.all()


def test_conv_heat_map_speaks_of_kernel_taps():
    axes, bar = figures._inputs_figure([bernoulli(3, 3, 2, 5)], (8, 8, 2)).axes
    assert bar.get_ylabel() == "connections per kernel tap (dense: 10)"
    assert axes.get_xlabel() == "column (kernel taps)"
    assert "of 90 connections kept (1 seed)" in axes.get_title()


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (figures.draw_training, [DENSE + metrics()]),
        (figures.draw_training, [metrics(seeds={3: [0.5]}, validation=False)]),
        (figures.draw_layers, [[report((6, 2)), report((3, 6))]]),
        (figures.draw_layers, [[report((0, 0))]]),
        (figures.draw_inputs, [[bernoulli(784, 30)], (28, 28, 1)]),
        (figures.draw_inputs, [[np.zeros((784, 3), bool)], (28, 28, 1)]),
        (figures.draw_inputs, [[bernoulli(5, 5, 3, 20)], (32, 32, 3)]),
    ],
)
def test_files_are_png_of_a_readable_size_and_nothing_global_changes(
    draw, arguments, tmp_path
):
    settings = dict(matplotlib.rcParams)
    path = tmp_path / "figure.png"
    draw(*arguments, path)
    assert dict(matplotlib.rcParams) == settings
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert round(image.info["dpi"][0]) == 150
        assert 800 <= image.width <= 1600
        assert 400 <= image.height <= 1600
        dark = np.asarray(image.convert("L")) < 128
    assert 0.005 < dark.mean() < 0.7
    assert not dark[0].any()  # nothing is cut off at the edges
    assert not dark[-1].any()
    assert not dark[:, 0].any()
    assert not dark[:, -1].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got 0, 0 of them without"),
        (metrics() + metrics("dense", validation=False), "got 18, 9 of them without"),
        (metrics() + metrics()[4:5], "got two of scl, seed 1, epoch 2"),
        (metrics()[:-1], r"those of scl have \{0: \[1, 2, 3\].* 2: \[1, 2\]\}"),
    ],
)
def test_metrics_that_make_no_line_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^draw_training: .*{message}"):
        figures.draw_training(given, tmp_path / "figure.png")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [[], [report((6, 2)), report((6, 2), ((4, 3), (4, 2)))]]
)
def test_reports_of_different_networks_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match=r"^draw_layers: .* same paths and shapes"):
        figures.draw_layers(given, tmp_path / "figure.png")


@pytest.mark.parametrize(
    "masks",
    [
        [],
        [bernoulli(783, 30)],  # a pixel less
        [bernoulli(784)],
        [bernoulli(28, 28, 30)],
        [bernoulli(5, 5, 3, 20)],  # other channels
        [bernoulli(784, 30).astype(np.float32)],
        [bernoulli(784, 30), bernoulli(784, 31)],
        [bernoulli(784, 0)],
    ],
)
def test_masks_that_do_not_fit_the_image_are_refused(masks, tmp_path):
    shapes = [("float32" if m.dtype == np.float32 else "bool", m.shape) for m in masks]
    with pytest.raises(ValueError, match=r"^draw_inputs: needs bool masks") as caught:
        figures.draw_inputs(masks, (28, 28, 1), tmp_path / "figure.png")
    assert "(H, W, C) is (28, 28, 1)" in str(caught.value)
    assert str(caught.value).endswith(f"got {shapes}")
