"""The per-layer table, against counts made with NumPy."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import scl_jax._report
from scl_jax import MaskedParams, fold_masks, mask_params
from scl_jax._macs import UnknownMacs, count_macs
from scl_jax._report import report

# leaf -> (shape, feature axes, positions of the output per example)
LAYERS = {
    "conv": ((3, 3, 4, 6), (3,), 64),
    "dense": ((6 * 16, 8), (1,), 1),
    "head": ((8, 5), (1,), 1),
    "query": ((8, 2, 3), (1, 2), 7),
}
NEXT = {"conv": "dense", "dense": "head"}
READ = {"dense": 6, "head": 8}  # the number of features that a layer reads


def feature_axes(path, leaf):
    return (-2, -1) if path == "query/kernel" else -1


def make(seed=0, density=0.1, dtype=np.float32):
    """Return random masked layers with biases, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    weights, masks = {}, {}
    for name, (shape, axes, _) in LAYERS.items():
        kernel = rng.normal(size=shape)
        kernel[rng.random(shape) < 0.2] = 0.0
        mask = np.where(rng.random(shape) < density, 1.0, -1.0) * rng.random(shape)
        # A feature without input, and one without output, whatever the seed.
        np.moveaxis(mask, axes, range(len(axes)))[(0,) * len(axes)] = -1.0
        if name in READ:
            mask[2 :: READ[name]] = -1.0
        bias = np.zeros([shape[axis] for axis in axes])
        weights[name] = {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}
        masks[name] = {"kernel": mask.astype(dtype), "bias": None}
    return MaskedParams(weights, masks)


def dense_macs():
    return {
        name: {"kernel": positions * math.prod(shape), "bias": 0}
        for name, (shape, _, positions) in LAYERS.items()
    }


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


def full_report(masked):
    return report(
        masked,
        dense_macs(),
        feature_axes=feature_axes,
        next_layer={f"{a}/kernel": f"{b}/kernel" for a, b in NEXT.items()},
    )


def kernel_report(mask, weight=None, **kwargs):
    weight = np.ones(np.shape(mask), np.float32) if weight is None else weight
    return report(MaskedParams({"k": weight}, {"k": mask}), **kwargs)


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


# Renderings


def parse_text(text):
    """Return cells by column, cut where the header's columns end."""
    lines = text.split("\n")
    rule = lines[1]
    assert rule
    assert set(rule) == {"-"}
    table = [line for line in lines[: lines.index(rule, lines.index(rule, 2) + 1)]]
    table = [line.ljust(len(rule)) for line in table if line != rule]
    gaps = [all(line[i] == " " for line in table) for i in range(len(rule))]
    starts = [
        i
        for i in range(len(rule))
        if not gaps[i] and (i == 0 or (gaps[i - 1] and (i == 1 or gaps[i - 2])))
    ]
    ends = [*starts[1:], len(rule)]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table
    ]
    return cells, lines[-4:]


def parse_markdown(text):
    table, notes = text.split("\n\n")
    header, rule, *rows = table.split("\n")
    assert set(rule) == set("| :-")
    cells = [
        [cell.strip() for cell in line[1:-1].split(" | ")] for line in (header, *rows)
    ]
    return cells, [note.removeprefix("- ") for note in notes.split("\n")]


@pytest.mark.parametrize("unknown", [False, True])
def test_text_markdown_and_dict_say_the_same(unknown):
    masked, macs = make(seed=5), dense_macs()
    if unknown:
        macs["head"]["kernel"] = UnknownMacs("gather: an embedding")
    next_layer = {"dense/kernel": "head/kernel"}
    result = report(masked, macs, feature_axes=feature_axes, next_layer=next_layer)
    cells, notes = parse_text(str(result))
    assert (cells, notes) == parse_markdown(result.to_markdown())

    def spell(value):
        if isinstance(value, dict):
            return "unknown"
        if isinstance(value, float):
            return f"{value:.4f}"
        if isinstance(value, list):
            return str(tuple(value))
        return "" if value is None else f"{value:,}" if value != str(value) else value

    saved = result.to_dict()
    assert cells[0][-4:] == [
        "without input",
        "without output",
        "MACs",
        "MACs remaining",
    ]
    assert cells[1:-1] == [[*map(spell, row.values())] for row in saved["rows"]]
    columns = list(saved["rows"][0])[2:]
    assert cells[-1] == [
        "total",
        "",
        *(spell(saved["totals"][name]) for name in columns),
    ]


def test_table_is_aligned_and_numbers_are_readable():
    mask = np.full((100, 200), -1.0, np.float32)
    mask[:, :50] = 1.0
    params = {"a": mask, "layer/long_name": mask[:3]}
    result = report(MaskedParams(params, params), {"a": 60_000, "layer/long_name": 600})
    assert str(result).split("\n") == [
        "path             shape       weights  connections    nnz  sparsity  features"
        "  without input    MACs  MACs remaining",
        "-" * 115,
        "a                (100, 200)   20,000        5,000  5,000    0.7500       200"
        "            150  60,000          15,000",
        "layer/long_name  (3, 200)        600          150    150    0.7500       200"
        "            150     600             150",
        "-" * 115,
        "total                         20,600        5,150  5,150    0.7500       400"
        "            300  60,600          15,150",
        "-" * 115,
        "sparsity over the masked kernels: 0.7500 = 15,450 zeros / 20,600 weights in "
        "masked kernels",
        "sparsity over all parameters: 0.7500 = 15,450 zeros in masked kernels / "
        "20,600 parameters",
        "MACs per example in the masked kernels: 15,150 of 60,600 remain",
        "FLOPs = 2 x MACs: 30,300 of 121,200 remain",
    ]


def test_notes_say_why_macs_are_unknown_and_what_flops_are():
    mask = np.ones((2, 2), np.float32)
    assert str(kernel_report(mask)).split("\n")[-2:] == [
        "MACs per example in the masked kernels: not counted",
        "FLOPs = 2 x MACs",
    ]
    unknown = kernel_report(mask, macs={"k": UnknownMacs("gather: embedding")})
    assert str(unknown).split("\n")[-2:] == [
        "MACs per example in the masked kernels: unknown, k: gather: embedding",
        "FLOPs = 2 x MACs",
    ]


def test_a_bar_in_a_path_does_not_break_the_markdown_table():
    mask = np.ones((2, 2), np.float32)
    text = report(MaskedParams({"a|b": mask}, {"a|b": mask})).to_markdown()
    assert r"| a\|b |" in text


@pytest.mark.parametrize("macs", [None, "known", "unknown"])
def test_dict_survives_json(macs):
    tree = None if macs is None else dense_macs()
    if macs == "unknown":
        tree["conv"]["kernel"] = UnknownMacs("while: unknown")
    saved = report(jax.tree.map(jnp.asarray, make()), tree).to_dict()
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved


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


# Errors


def test_traced_arrays_are_refused():
    mask = jnp.ones((2, 2))
    with pytest.raises(TypeError, match=r"report: needs concrete arrays.* k is a "):
        jax.jit(lambda s: kernel_report(s).totals.nnz)(mask)
    with pytest.raises(TypeError, match=r"report: needs concrete arrays.* k is a "):
        jax.jit(lambda w: kernel_report(mask, w).totals.nnz)(mask)


def test_shapes_without_arrays_are_refused():
    abstract = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    with pytest.raises(TypeError, match="k is a ShapeDtypeStruct"):
        kernel_report(abstract, abstract)


def test_nan_in_a_mask_variable_is_reported_with_its_path():
    masked = make()
    masked.masks["conv"]["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"report: .* 1 of 216 at conv/kernel are NaN"):
        full_report(jax.tree.map(jnp.asarray, masked))


@pytest.mark.parametrize(
    ("masked", "error", "match"),
    [
        ({"k": np.ones((2, 2))}, TypeError, "report: needs a MaskedParams.*got dict"),
        (
            MaskedParams({"k": np.ones((2, 2))}, {"j": np.ones((2, 2))}),
            ValueError,
            "report: .*differ at j, k",
        ),
        (MaskedParams({"k": np.ones(2)}, {"k": None}), ValueError, "masked are: none"),
        (
            MaskedParams({"k": np.ones((0, 2))}, {"k": np.ones((0, 2))}),
            ValueError,
            r"none of them empty; masked are: k \(0, 2\)",
        ),
        (
            MaskedParams({"k": np.ones((2, 2))}, {"k": np.ones((2, 2), int)}),
            TypeError,
            "must be floating; k is int",
        ),
    ],
)
def test_masked_params_that_cannot_be_counted_are_refused(masked, error, match):
    with pytest.raises(error, match=match):
        report(masked)


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        (2, ValueError, "2 are out of range for k"),
        ((1, -1), ValueError, "name an axis of k of shape .* twice"),
        ("last", TypeError, "must be an int or a tuple of ints"),
    ],
)
def test_wrong_feature_axes_are_refused(axes, error, match):
    with pytest.raises(error, match=match):
        kernel_report(np.ones((2, 2), np.float32), feature_axes=axes)


@pytest.mark.parametrize(
    ("macs", "match"),
    [
        ({"j": 4}, "structure of the weights.*they are: k; macs has: j"),
        ([4], "structure of the weights"),
        ({"k": {"kernel": 4}}, "structure of the weights"),
        ({"k": 4.0}, r"int.*at k of size 4 got 4\.0"),
        ({"k": None}, "int.*at k of size 4 got None"),
        ({"k": 6}, "multiple of its size; at k of size 4 got 6"),
        ({"k": -4}, "multiple of its size; at k of size 4 got -4"),
    ],
)
def test_macs_that_do_not_fit_are_refused(macs, match):
    with pytest.raises(ValueError, match=match):
        kernel_report(np.ones((2, 2), np.float32), macs=macs)


@pytest.mark.parametrize(
    "next_layer",
    [{"conv": "head/kernel"}, {"conv/kernel": "Dense_9"}, {"head/bias": "head/kernel"}],
)
def test_next_layer_must_name_masked_leaves(next_layer):
    masked_paths = ", ".join(f"{name}/kernel" for name in sorted(LAYERS))
    with pytest.raises(ValueError, match=f"are none; masked are: {masked_paths}"):
        report(make(), next_layer=next_layer)


@pytest.mark.parametrize("shape", [(7, 2), (3, 2), (6,)])
def test_next_layer_must_read_a_multiple_of_the_features(shape):
    params = {"a": np.ones((2, 5, 6), np.float32), "b": np.ones(shape, np.float32)}
    with pytest.raises(
        ValueError, match=r"a of shape .* has 6 features.*b of shape"
    ) as error:
        report(MaskedParams(params, params), next_layer={"a": "b"})
    assert str((2, 5, 6)) in str(error.value)
    assert str(shape) in str(error.value)


def test_a_feature_too_large_for_its_counter_is_refused(monkeypatch):
    monkeypatch.setattr(scl_jax._report, "_LARGEST_COUNT", 5)
    assert kernel_report(np.ones((5, 2), np.float32)).totals.nnz == 10
    with pytest.raises(ValueError, match=r"2\*\*31 weights.*k has shape \(6, 2\)"):
        kernel_report(np.ones((6, 2), np.float32))
