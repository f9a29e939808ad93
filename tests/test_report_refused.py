"""What the per-layer table refuses, and what it says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reports import LAYERS, full_report, kernel_report, make

import scl_jax._report
from scl_jax import MaskedParams
from scl_jax._report import report


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
