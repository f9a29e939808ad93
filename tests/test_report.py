"""The per-layer table, against counts made with NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reports import LAYERS, NEXT, dense_macs, full_report, kernel_report, make

import scl_jax._report
from scl_jax import MaskedParams, fold_masks, mask_params
from scl_jax._macs import UnknownMacs, count_macs
from scl_jax._report import report


def expected_rows(masked):
    """Count with loops over features, and nothing of the library."""
    rows = []
    for name in sorted(LAYERS):
        shape, axes, positions = LAYERS[name]
        kernel, mask = masked.weights[name]["kernel"], masked.masks[name]["kernel"]
        effective = np.where(mask >= 0, kernel, 0.0)
        nnz = np.count_nonzero(effective)
        by_feature = np.moveaxis(effective, axes, range(len(axes)))
        features = math.prod(shape[axis] for axis in axes)
        slices = [by_feature[i] for i in np.ndindex(*by_feature.shape[: len(axes)])]
        without_output = None
        if name in NEXT:
            following = NEXT[name]
            read = np.where(
                masked.masks[following]["kernel"] >= 0,
                masked.weights[following]["kernel"],
                0.0,
            )
            without_output = sum(
                not any(
                    read[..., i, :].any() for i in range(f, read.shape[-2], features)
                )
                for f in range(features)
            )
        rows.append(
            {
                "path": f"{name}/kernel",
                "shape": list(shape),
                "weights": math.prod(shape),
                "connections": int((mask >= 0).sum()),
                "nnz": nnz,
                "sparsity": 1 - nnz / math.prod(shape),
                "features": features,
                "features_without_input": sum(not s.any() for s in slices),
                "features_without_output": without_output,
                "macs": positions * math.prod(shape),
                "macs_remaining": positions * nnz,
            }
        )
    return rows


# Counts


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_number_of_a_row_is_what_numpy_counts(density, dtype):
    masked = make(seed=1, density=density, dtype=dtype)
    rows = full_report(jax.tree.map(jnp.asarray, masked)).to_dict()["rows"]
    expected = expected_rows(masked)
    for row, wanted in zip(rows, expected, strict=True):
        assert list(row) == list(wanted)
        assert row.pop("sparsity") == pytest.approx(wanted.pop("sparsity"), rel=1e-12)
        assert row == wanted


def test_random_masks_have_features_without_input_and_output():
    # Else the comparison above would compare zeros.
    rows = expected_rows(make(seed=1, density=0.3))
    by_path = {row["path"]: row for row in rows}
    assert 0 < by_path["conv/kernel"]["features_without_output"] < 6
    assert 0 < by_path["dense/kernel"]["features_without_input"] < 8
    assert 0 < by_path["dense/kernel"]["features_without_output"] < 8
    assert 0 < by_path["query/kernel"]["features_without_input"] < 6


def test_a_connection_of_weight_zero_is_a_connection_and_no_nonzero():
    mask = np.array([[1.0, 0.0, -0.0, -1.0]], np.float32)
    weight = np.array([[0.0, 2.0, -0.0, 3.0]], np.float32)
    [row] = kernel_report(mask, weight).rows
    assert (row.connections, row.nnz, row.sparsity) == (3, 1, 0.75)
    assert row.features_without_input == 3


def test_nonzeros_are_those_of_the_folded_parameters():
    masked = jax.tree.map(jnp.asarray, make(seed=2, density=0.4))
    folded = fold_masks(masked)
    counted = {row.path: row.nnz for row in full_report(masked).rows}
    assert counted == {
        f"{name}/kernel": np.count_nonzero(folded[name]["kernel"]) for name in LAYERS
    }


def test_counts_are_exact_where_float32_sums_are_not():
    side = 4100
    mask = jnp.ones((side, side), jnp.bfloat16).at[0, 0].set(-1.0)
    count = side * side - 1
    # Without this the test would show nothing.
    assert count > 2**24
    assert int(np.float32(count)) != count
    for axes in (-1, lambda path, leaf: ()):
        [row] = kernel_report(mask, mask, feature_axes=axes).rows
        assert (row.connections, row.nnz) == (count, count)


def test_macs_and_totals_are_exact_above_two_to_the_31():
    positions = 2**31 + 1
    mask = np.ones((5, 7), np.float32)
    mask[0, 0] = -1.0
    masked = MaskedParams({"a": mask, "b": mask}, {"a": mask, "b": mask})
    totals = report(masked, macs={"a": 35 * positions, "b": 35 * positions}).totals
    assert totals.macs == 70 * positions
    assert totals.macs_remaining == 68 * positions
    assert (totals.flops, totals.flops_remaining) == (140 * positions, 136 * positions)


def test_counts_of_features_are_summed_in_64_bits(monkeypatch):
    # A kernel of 2**32 weights does not fit here; the counts of its features do.
    counts = [np.full(4, 2**30, np.int32), np.full(4, 2**30, np.int32)]
    monkeypatch.setattr(scl_jax._report, "_device_counts", lambda *_: counts)
    [row] = kernel_report(np.ones((1, 4), np.float32)).rows
    assert (row.connections, row.nnz) == (2**32, 2**32)


def test_feature_axes_may_be_a_tuple():
    masked = make(seed=3)
    query = MaskedParams(masked.weights["query"], masked.masks["query"])
    [row] = report(query, feature_axes=(-1, -2)).rows
    [wanted] = [r for r in expected_rows(masked) if r["path"] == "query/kernel"]
    assert row.features == 6
    assert row.features_without_input == wanted["features_without_input"]


def test_flattened_input_belongs_to_the_feature_modulo_the_number_of_features():
    conv = np.ones((1, 1, 1, 3), np.float32)
    dense = np.ones((6, 2), np.float32)
    dense[1::3] = -1.0  # both positions of feature 1
    dense[0] = -1.0  # one of the two positions of feature 0
    params = {"conv": conv, "dense": dense}
    rows = report(MaskedParams(params, params), next_layer={"conv": "dense"}).rows
    assert [row.features_without_output for row in rows] == [1, None]


def test_conv_reads_conv_at_its_input_axis():
    first = np.ones((3, 3, 2, 4), np.float32)
    second = np.ones((3, 3, 4, 5), np.float32)
    second[:, :, 2] = -1.0
    params = {"first": first, "second": second}
    rows = report(MaskedParams(params, params), next_layer={"first": "second"}).rows
    assert rows[0].features_without_output == 1
    assert rows[1].features_without_input == 0


# Totals


def test_totals_are_sums_with_both_denominators():
    masked = make(seed=4)
    result = full_report(masked).to_dict()["totals"]
    rows = expected_rows(masked)
    zeros = sum(row["weights"] - row["nnz"] for row in rows)
    weights = sum(row["weights"] for row in rows)
    biases = 6 + 8 + 5 + 6
    for name in ("connections", "nnz", "features", "macs", "macs_remaining"):
        assert result[name] == sum(row[name] for row in rows)
    assert result["weights"] == weights
    assert result["parameters"] == weights + biases
    assert result["sparsity"] == zeros / weights
    assert result["sparsity_over_all_parameters"] == zeros / (weights + biases)
    assert result["flops"] == 2 * result["macs"]
    assert result["flops_remaining"] == 2 * result["macs_remaining"]
    # Known for two of four layers: a sum of these would be too low.
    assert result["features_without_output"] is None


def test_zero_biases_are_parameters_and_no_zeros_of_masked_kernels():
    mask = np.array([[1.0, -1.0]], np.float32)
    masked = MaskedParams({"b": np.zeros(2), "k": mask}, {"b": None, "k": mask})
    totals = report(masked).totals
    assert (totals.sparsity, totals.sparsity_over_all_parameters) == (0.5, 0.25)


def test_what_is_no_array_is_no_parameter():
    mask = np.ones((2, 2), np.float32)
    masked = MaskedParams({"f": jax.nn.relu, "k": mask}, {"f": None, "k": mask})
    assert report(masked).totals.parameters == 4


def test_one_unknown_makes_the_total_unknown():
    macs = dense_macs()
    macs["head"]["kernel"] = UnknownMacs("gather: an embedding")
    result = report(make(), macs)
    rows = {row.path: row for row in result.rows}
    assert rows["head/kernel"].macs_remaining == UnknownMacs("gather: an embedding")
    assert isinstance(rows["dense/kernel"].macs_remaining, int)
    wanted = {"unknown": "head/kernel: gather: an embedding"}
    totals = result.to_dict()["totals"]
    for name in ("macs", "macs_remaining", "flops", "flops_remaining"):
        assert totals[name] == wanted


def test_unknown_macs_of_an_unmasked_leaf_do_not_matter():
    macs = dense_macs()
    macs["head"]["bias"] = UnknownMacs("mul: a scale")
    assert report(make(), macs).totals == report(make(), dense_macs()).totals


def test_it_takes_what_count_macs_returns():
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2)), "scale": jnp.ones(2)}
    masked = mask_params(params, select=lambda path, leaf: leaf.ndim == 2)

    def net(p, x):
        return p["scale"] * (x @ p["a"] @ p["b"])[0]

    macs = count_macs(net, masked.weights, jnp.ones((1, 4)))
    totals = report(masked, macs).totals
    assert (totals.macs, totals.macs_remaining) == (18, 18)


# Where the arrays are


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_give_the_same_report(axis_type):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"), (axis_type,) * 2)
    rng = np.random.default_rng(6)
    shapes = {"conv": (3, 3, 4, 6), "dense": (24, 8), "head": (8, 4)}
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    masks = {n: rng.normal(size=s).astype(np.float32) - 1.5 for n, s in shapes.items()}
    local = MaskedParams(weights, masks)
    placed = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf,
            NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 2), "x", "y")),
        ),
        local,
    )
    options = {"next_layer": {"conv": "dense", "dense": "head"}}
    assert report(placed, **options) == report(local, **options)


def test_kernels_are_counted_where_they_are_and_never_gathered():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "x", "y"))
    kernel = jax.device_put(jnp.ones((3, 3, 4, 6)), sharding)
    lowered = scl_jax._report._device_counts.lower(kernel, kernel, (0, 1, 2))
    assert [out.shape for out in lowered.out_info] == [(6,), (6,)]
    program = lowered.compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
