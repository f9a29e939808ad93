"""Results: counts and accuracies against NumPy, and what is said of them."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny import Normalized, images, register, standardized, text
from tiny import config as tiny_config

import scl_jax
from experiments.config import Config
from experiments.data import NO_EXAMPLES, Split
from experiments.network import make_network, network_macs
from experiments.outcome import (
    Result,
    as_markdown,
    as_text,
    comparison,
    in_words,
    make_report,
    make_result,
    mean_std,
)
from experiments.train import Metrics, Trained

# MACs per weight: how many places a kernel is put at.
PLACES = {"Conv_0/kernel": 24 * 24, "Conv_1/kernel": 8 * 8}


def result(method="scl", seed=0, **numbers):
    defaults = {
        "accuracy": 0.9,
        "weights": 1000,
        "parameters": 1010,
        "nnz": 1000,
        "macs": 2000,
        "macs_remaining": 2000,
        "seconds": 1.0,
    }
    return Result(method=method, seed=seed, **{**defaults, **numbers})


def metrics(method, seed, epoch, seconds):
    return Metrics(method, seed, epoch, 0.5, 0.9, None, 1, 0.0, seconds)


def parameters(config):
    """Return random parameters and statistics in the shapes of the network's own."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(make_network(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.05, leaf.shape), leaf.dtype), shapes
    )


# Numbers


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.1] * 5, [3, 1], [7.5], [0]])
def test_mean_and_deviation_are_those_of_numpy(values):
    mean, deviation = mean_std(values)
    assert mean == pytest.approx(np.mean(values))
    expected = np.std(values, ddof=1) if len(values) > 1 else 0
    assert deviation == pytest.approx(expected, abs=1e-12)


def test_mean_of_nothing_is_an_error():
    with pytest.raises(statistics.StatisticsError):
        mean_std([])


def test_sparsity_is_the_fraction_of_zeros():
    assert result(nnz=250).sparsity == 0.75
    assert result(nnz=1000).sparsity == 0
    assert result(nnz=0).sparsity == 1


@pytest.mark.parametrize("method", ["dense", "scl"])
@pytest.mark.parametrize("model", ["lenet300", "lenet5"])
def test_result_is_that_of_numpy(model, method):
    config = Config(dataset="mnist5k", model=model, devices=1)
    params, statistics = parameters(config)
    random = np.random.default_rng(0)
    kernels = [p for p in flatten_dict(params, sep="/") if p.endswith("/kernel")]
    keep = {p: 0.9 - 0.2 * i for i, p in enumerate(kernels)}
    masked = scl_jax.mask_params(
        params,
        initial=lambda path, leaf: jnp.float32(
            np.where(random.random(leaf.shape) < keep[path], 0.1, -0.1)
        ),
    )
    trained = scl_jax.fold_masks(masked) if method == "dense" else masked
    folded = scl_jax.fold_masks(masked)
    if method == "dense":
        # A weight that is zero by itself: not counted among the nonzeros.
        flat = flatten_dict(folded, sep="/")
        flat[kernels[0]] = flat[kernels[0]].at[(0,) * flat[kernels[0]].ndim].set(0.0)
        trained = folded = unflatten_dict(flat, sep="/")
    split = Split(
        random.integers(0, 256, (30, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, 30).astype(np.int32),
    )
    history = [metrics(method, 4, epoch, 0.25) for epoch in (1, 2, 3)]
    outcome = Trained(4, trained, statistics, folded, history)
    got = make_result(config, outcome, split)

    flat = {path: np.asarray(x) for path, x in flatten_dict(folded, sep="/").items()}
    nnz = {path: int((flat[path] != 0).sum()) for path in kernels}
    sizes = {path: flat[path].size for path in kernels}
    assert (got.method, got.seed, got.seconds) == (method, 4, 0.75)
    assert got.weights == sum(sizes.values())
    assert got.parameters == sum(x.size for x in flat.values())
    assert got.nnz == sum(nnz.values())
    assert got.macs == sum(PLACES.get(p, 1) * n for p, n in sizes.items())
    assert got.macs_remaining == sum(PLACES.get(p, 1) * n for p, n in nnz.items())
    assert type(got.nnz) is type(got.macs) is type(got.macs_remaining) is int
    if model == "lenet300":
        x = standardized(split)
        for layer in ("Dense_0", "Dense_1", "Dense_2"):
            x = x @ flat[f"{layer}/kernel"].astype(float) + flat[f"{layer}/bias"]
            x = np.maximum(x, 0) if layer != "Dense_2" else x
        correct = (x.argmax(axis=1) == split.labels).mean()
        assert got.accuracy == pytest.approx(correct)

    report = make_report(config, outcome)
    assert {row.path: row.nnz for row in report.rows} == nnz
    assert report.totals.macs_remaining == got.macs_remaining
    readers = [row.features_without_output is not None for row in report.rows]
    assert sum(readers) == len(kernels) - 1


def test_result_with_unknown_macs_is_refused(monkeypatch):
    def unknown(apply, weights, example):
        return jax.tree.map(lambda leaf: scl_jax.UnknownMacs("a loop"), weights)

    monkeypatch.setattr(scl_jax, "count_macs", unknown)
    config = Config(dataset="mnist5k", model="lenet300")
    params, _ = parameters(config)
    trained = Trained(0, params, {}, params, [metrics("dense", 0, 1, 1.0)])
    # They are remembered: neither from before this test nor after it.
    network_macs.cache_clear()
    with pytest.raises(ValueError, match=r"MACs of lenet300 are unknown: .*a loop"):
        make_result(config, trained, images(8))
    network_macs.cache_clear()


def test_result_of_no_examples_is_refused():
    config = Config(dataset="mnist5k", model="lenet300")
    params, _ = parameters(config)
    trained = Trained(0, params, {}, params, [metrics("dense", 0, 1, 1.0)])
    with pytest.raises(ValueError, match="needs examples"):
        make_result(config, trained, NO_EXAMPLES)


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_network_with_statistics_is_counted_and_evaluated(monkeypatch, method):
    register(monkeypatch)
    config = tiny_config(model="normalized", devices=8)
    params, statistics = jax.tree.map(jnp.abs, parameters(config))
    masked = scl_jax.mask_params(params)
    masked.masks["Conv_0"]["kernel"] = masked.masks["Conv_0"]["kernel"].at[1].set(-1)
    folded = scl_jax.fold_masks(masked)
    trained = folded if method == "dense" else masked
    outcome = Trained(0, trained, statistics, folded, [metrics(method, 0, 1, 1.0)])
    split = images(11)
    scaled = jnp.float32((split.inputs / 255 - 0.1307) / 0.3081)
    logits = Normalized().apply({"params": folded, **statistics}, scaled)
    guesses = np.asarray(logits).argmax(axis=1).astype(np.int32)
    split.labels[:4], split.labels[4:] = guesses[:4], (guesses[4:] + 1) % 10
    got = make_result(config, outcome, split)
    assert got.accuracy == pytest.approx(4 / 11)
    # A row of 7 weights for each of the 6 features is gone, at 16 places.
    assert (got.weights, got.nnz) == (49 * 6 + 60, 42 * 6 + 60)
    assert (got.macs, got.macs_remaining) == (16 * 49 * 6 + 60, 16 * 42 * 6 + 60)
    assert got.parameters == 49 * 6 + 2 * 6 + 6 * 10 + 10


def test_report_tells_features_apart_as_the_model_does(monkeypatch):
    register(monkeypatch)
    config = tiny_config(dataset="python_docs", model="tiny_text")
    params, _ = parameters(config)
    masked = scl_jax.mask_params(params)
    # All that comes into one unit of one head, of three heads' units in `key`.
    attention = masked.masks["Block_0"]["Attention_0"]
    attention["query"]["kernel"] = attention["query"]["kernel"].at[:, 1, 2].set(-1)
    attention["key"]["kernel"] = attention["key"]["kernel"].at[:, 0, :3].set(-1)
    hidden = masked.masks["Block_0"]["Dense_1"]
    hidden["kernel"] = hidden["kernel"].at[:5].set(-1)
    folded = scl_jax.fold_masks(masked)
    history = [metrics("scl", 0, 1, 1.0)]
    outcome = Trained(0, masked, {}, folded, history)
    rows = {row.path: row for row in make_report(config, outcome).rows}
    at = "Block_0/Attention_0"
    features = {path: row.features for path, row in rows.items()}
    assert features == {
        f"{at}/query/kernel": 8,  # of 2 heads with 4 units
        f"{at}/key/kernel": 8,
        f"{at}/value/kernel": 8,
        f"{at}/out/kernel": 8,
        "Block_0/Dense_0/kernel": 16,
        "Block_0/Dense_1/kernel": 8,
        "Dense_0/kernel": 97,
    }
    without = {path: row.features_without_input for path, row in rows.items()}
    assert without == {
        **dict.fromkeys(rows, 0),
        f"{at}/query/kernel": 1,
        f"{at}/key/kernel": 3,
    }
    assert rows["Block_0/Dense_0/kernel"].features_without_output == 5
    # Every token meets every weight.
    assert {row.macs / row.weights for row in rows.values()} == {128}
    got = make_result(config, outcome, text(2))
    assert got.macs - got.macs_remaining == 128 * 8 * (1 + 3 + 5)


# Tables


def test_comparison_has_a_row_per_method_with_mean_and_deviation():
    results = [
        result("dense", 0, accuracy=0.95),
        result("scl", 0, accuracy=0.96, nnz=100, macs_remaining=1500),
        result("dense", 1, accuracy=0.93),
        result("scl", 1, accuracy=0.95, nnz=200, macs_remaining=1600),
        result("scl", 2, accuracy=0.97, nnz=300, macs_remaining=1703),
    ]
    header, dense, scl = comparison(results)
    assert header[0] == "method"
    assert dense[:4] == ["dense", "2", "94.00 ± 1.41", "0.0000 ± 0.0000"]
    assert dense[4:] == ["1,000", "2,000"]
    assert scl[:4] == ["scl", "3", "96.00 ± 1.00", "0.8000 ± 0.1000"]
    assert scl[4:] == ["200", "1,601"]


def test_comparison_keeps_the_order_of_the_methods():
    results = [result("scl"), result("dense"), result("scl", 1)]
    assert [row[0] for row in comparison(results)] == ["method", "scl", "dense"]


def test_text_is_aligned():
    cells = [["a", "header"], ["long word", "1"], ["b", "22"]]
    assert as_text(cells).split("\n") == [
        "a          header",
        "-" * 17,
        "long word  1",
        "b          22",
    ]


def test_markdown_is_a_table():
    cells = [["a", "b", "c"], ["1", "2", "3"]]
    assert as_markdown(cells).split("\n") == [
        "| a | b | c |",
        "| :-- | --: | --: |",
        "| 1 | 2 | 3 |",
    ]


# Words


def words(dense, scl, **numbers):
    return in_words([result("dense", accuracy=dense), result(accuracy=scl, **numbers)])


def test_better_than_dense_is_said_in_points():
    said = words(0.94, 0.9475, nnz=25, macs_remaining=50)
    for part in ("97.5 %", "94.8 %", "0.8 points more", "40 times fewer MACs"):
        assert part in said
    assert "less" not in said


def test_worse_than_dense_is_said_in_points():
    said = words(0.95, 0.92, nnz=100, macs_remaining=200)
    for part in ("90.0 %", "92.0 %", "3.0 points less", "10 times fewer MACs"):
        assert part in said
    assert "more" not in said
    assert "-" not in said.replace("--", "")


def test_words_take_the_means_over_the_seeds():
    said = in_words(
        [
            result("dense", 0, accuracy=0.90),
            result("dense", 1, accuracy=0.92),
            result("scl", 0, accuracy=0.90, nnz=100, macs_remaining=100),
            result("scl", 1, accuracy=0.96, nnz=300, macs_remaining=300),
        ]
    )
    for part in ("80.0 %", "93.0 %", "2.0 points more", "10 times fewer"):
        assert part in said


def test_nothing_pruned_is_not_said_to_be_once_fewer():
    said = words(0.9, 0.9, macs_remaining=1700)
    assert "with 1 times" not in said


def test_everything_pruned_can_be_said():
    assert "100.0 %" in words(0.9, 0.1, nnz=0, macs_remaining=0)


def test_results_can_be_written_and_read():
    assert Result(**dataclasses.asdict(result())) == result()
