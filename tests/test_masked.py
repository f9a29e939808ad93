"""MaskedParams: what is masked, applied, folded, counted, and never destroyed."""

import re

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis.extra import numpy as hnp

import scl_jax
from scl_jax import (
    Clipped,
    LeakyReLU,
    MaskedParams,
    ReLU,
    Softplus,
    apply_masks,
    binary_masks,
    connection_count,
    fold_masks,
    identity,
    mask_params,
)

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def make_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    return {
        "conv": {"kernel": normal(3, 3, 2, 4), "bias": normal(4)},
        "dense": {"kernel": normal(5, 3), "bias": normal(3)},
    }


def make_masked(seed=0, dtype=None):
    """Masked parameters of which about half are pruned."""
    rng = np.random.default_rng(100 + seed)
    return mask_params(
        make_params(seed),
        initial=lambda path, leaf: rng.normal(size=leaf.shape).astype(np.float32),
        dtype=dtype,
    )


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def numpy_product(masked):
    """W * (S >= 0) leaf by leaf, in NumPy."""
    return {
        layer: {
            "kernel": np.asarray(leaves["kernel"])
            * (np.asarray(masked.masks[layer]["kernel"]).astype(np.float32) >= 0),
            "bias": np.asarray(leaves["bias"]),
        }
        for layer, leaves in masked.weights.items()
    }


# mask_params


def test_masks_stand_beside_the_kernels_and_none_elsewhere():
    params = make_params()
    masked = mask_params(params)
    assert isinstance(masked, MaskedParams)
    assert masked.weights is params
    assert jax.tree.map(jnp.shape, masked.masks) == {
        "conv": {"kernel": (3, 3, 2, 4), "bias": None},
        "dense": {"kernel": (5, 3), "bias": None},
    }


def test_everything_is_connected_at_the_start():
    params = make_params()
    masked = mask_params(params)
    chex.assert_trees_all_equal(apply_masks(masked), params)
    chex.assert_trees_all_equal(fold_masks(masked), params)
    assert float(connection_count(masked)) == 3 * 3 * 2 * 4 + 5 * 3


@pytest.mark.parametrize("initial", [0.25, -0.25, 0, np.float32(0.5), jnp.float32(2)])
def test_initial_number_fills_every_mask(initial):
    masks = mask_params(make_params(), initial=initial).masks
    for mask in jax.tree.leaves(masks):
        np.testing.assert_array_equal(mask, np.full(mask.shape, initial, np.float32))


def test_initial_function_gets_path_and_leaf_of_the_masked_ones_only():
    seen = {}

    def initial(path, leaf):
        seen[path] = leaf.shape
        return jnp.full(leaf.shape, len(path), F32)

    masks = mask_params(make_params(), initial=initial).masks
    assert seen == {"conv/kernel": (3, 3, 2, 4), "dense/kernel": (5, 3)}
    assert float(masks["dense"]["kernel"][0, 0]) == len("dense/kernel")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("initial", [0.5, lambda path, leaf: np.full(leaf.shape, 0.5)])
def test_masks_have_the_dtype_of_their_weight_or_the_one_asked_for(dtype, initial):
    own = mask_params(make_params(dtype=dtype), initial=initial)
    asked = mask_params(make_params(), initial=initial, dtype=dtype)
    for masked in (own, asked):
        dtypes = {mask.dtype for mask in jax.tree.leaves(masked.masks)}
        assert dtypes == {np.dtype(dtype)}


def test_mask_params_works_without_values():
    shapes = jax.eval_shape(mask_params, jax.eval_shape(make_params))
    assert shapes.masks["dense"]["kernel"] == jax.ShapeDtypeStruct((5, 3), F32)
    assert shapes.masks["dense"]["bias"] is None


def test_initial_that_returns_the_leaf_itself_shares_no_buffer_with_it():
    # A shared buffer cannot be donated twice, as a jitted train step does.
    masked = mask_params({"kernel": jnp.ones((2, 2))}, initial=lambda path, leaf: leaf)
    weight, mask = masked.weights["kernel"], masked.masks["kernel"]
    assert weight.unsafe_buffer_pointer() != mask.unsafe_buffer_pointer()


@pytest.mark.parametrize("initial", [np.nan, np.inf, -np.inf, jnp.float32(np.nan)])
def test_initial_number_that_is_not_finite_is_refused(initial):
    with pytest.raises(ValueError, match="initial must be finite in float32"):
        mask_params(make_params(), initial=initial)


def test_initial_function_that_returns_nan_is_refused_by_path():
    def initial(path, leaf):
        value = jnp.ones(leaf.shape)
        return value.at[0, 0].set(jnp.nan) if path == "dense/kernel" else value

    match = r"initial\(.dense/kernel., leaf\) must be finite"
    with pytest.raises(ValueError, match=match):
        mask_params(make_params(), initial=initial)


def test_initial_function_that_returns_infinity_is_refused_by_path():
    def initial(path, leaf):
        return jnp.full(leaf.shape, jnp.inf)

    with pytest.raises(ValueError, match=r"finite.*conv/kernel|conv/kernel.*finite"):
        mask_params(make_params(), initial=initial)


def test_initial_number_that_overflows_the_masks_dtype_is_refused():
    with pytest.raises(ValueError, match="finite"):
        mask_params(make_params(), initial=1e6, dtype=F16)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (3, 5)])
def test_initial_function_of_the_wrong_shape_is_refused_by_path(shape):
    params = {"dense": {"kernel": jnp.ones((5, 3))}}
    match = re.escape(
        "mask_params: initial('dense/kernel', leaf) must have the leaf's shape "
        f"(5, 3), got {shape}"
    )
    with pytest.raises(ValueError, match=match):
        mask_params(params, initial=lambda path, leaf: np.ones(shape))


@pytest.mark.parametrize("initial", ["0.1", None])
def test_initial_that_is_no_number_is_refused_by_name(initial):
    with pytest.raises(TypeError, match="mask_params: initial must be"):
        mask_params(make_params(), initial=initial)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64, int])
def test_masks_of_a_dtype_that_is_not_floating_are_refused(dtype):
    with pytest.raises(TypeError, match="mask_params: dtype must be floating, got"):
        mask_params(make_params(), dtype=dtype)


def test_masking_twice_is_refused():
    with pytest.raises(TypeError, match="params is a MaskedParams already"):
        mask_params(mask_params(make_params()))


# apply_masks, fold_masks, binary_masks


@pytest.mark.parametrize("mask_dtype", [F32, BF16, F16])
def test_applied_and_folded_weights_are_the_numpy_product(mask_dtype):
    masked = make_masked(dtype=mask_dtype)
    expected = numpy_product(masked)
    for got in (apply_masks(masked), fold_masks(masked)):
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
        chex.assert_trees_all_equal(as_numpy(got), expected)


@pytest.mark.parametrize("weight_dtype", [BF16, F16])
def test_applied_weights_keep_their_dtype_under_float32_masks(weight_dtype):
    masked = mask_params(
        {"kernel": jnp.asarray([[1.5, -2.5]], weight_dtype)},
        initial=lambda path, leaf: jnp.array([[-1.0, 1.0]]),
        dtype=F32,
    )
    for got in (apply_masks(masked), fold_masks(masked)):
        assert got["kernel"].dtype == weight_dtype
        assert got["kernel"].tolist() == [[0.0, -2.5]]
    gradient = jax.grad(lambda m: apply_masks(m)["kernel"].sum().astype(F32))(masked)
    assert gradient.weights["kernel"].dtype == weight_dtype
    assert gradient.masks["kernel"].dtype == F32
    assert gradient.masks["kernel"].tolist() == [[1.5, -2.5]]


def test_gradient_through_bfloat16_masks_is_rounded_once():
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    masked = mask_params({"kernel": jnp.asarray(weights)}, dtype=BF16)
    gradient = jax.grad(lambda m: 3.0 * apply_masks(m)["kernel"].sum())(masked)
    assert gradient.masks["kernel"].dtype == BF16
    got = np.asarray(gradient.masks["kernel"]).astype(np.float32)
    np.testing.assert_allclose(got, 3.0 * weights, rtol=2**-8)


def test_numpy_weights_can_be_masked_and_folded():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    chex.assert_trees_all_equal(fold_masks(mask_params(params)), params)
    chex.assert_trees_all_equal(apply_masks(mask_params(params)), params)


def test_float64_numpy_weights_can_be_masked_and_folded():
    # What np.load or scikit-learn gives. JAX computes with them in float32.
    params = {"kernel": np.array([[1.0, -2.0]]), "bias": np.ones(2)}
    chex.assert_trees_all_close(as_numpy(fold_masks(mask_params(params))), params)
    chex.assert_trees_all_close(as_numpy(apply_masks(mask_params(params))), params)


def test_folded_zeros_are_positive_and_other_weights_untouched():
    weights = np.float32([-3.0, 3.0, -0.0, 0.0, np.inf, -np.inf, np.nan, -5.0])
    pruned = {"kernel": jnp.asarray(weights), "bias": jnp.float32([-0.0])}
    masks = {"kernel": jnp.full(8, -0.5), "bias": None}
    folded = fold_masks(MaskedParams(pruned, masks))
    np.testing.assert_array_equal(folded["kernel"], np.zeros(8))
    assert not np.signbit(folded["kernel"]).any()
    assert np.signbit(folded["bias"]).all()

    kept = fold_masks(MaskedParams(pruned, {"kernel": jnp.full(8, 0.5), "bias": None}))
    chex.assert_trees_all_equal(
        np.asarray(kept["kernel"]).view(np.uint32), weights.view(np.uint32)
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fold_leaves_any_connected_weight_untouched_bit_for_bit(transform):
    fold = transform(fold_masks)

    @hypothesis.given(hnp.arrays(np.uint32, 32))
    def check(bits):
        weights = jnp.asarray(bits.view(np.float32))
        folded = fold(MaskedParams({"w": weights}, {"w": jnp.zeros(32)}))["w"]
        nan = np.isnan(bits.view(np.float32))
        np.testing.assert_array_equal(np.isnan(folded), nan)
        np.testing.assert_array_equal(
            np.asarray(folded).view(np.uint32)[~nan], bits[~nan]
        )

    check()


def test_folded_network_computes_what_the_masked_one_does():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).reshape((x.shape[0], -1))
            return nn.Dense(3, name="dense")(x)

    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
    params = Net().init(jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    masked = mask_params(
        params, initial=lambda path, leaf: rng.normal(size=leaf.shape).astype("f4")
    )
    in_training = Net().apply({"params": apply_masks(masked)}, x)
    folded = Net().apply({"params": fold_masks(masked)}, x)
    np.testing.assert_array_equal(in_training, folded)
    assert not np.allclose(folded, Net().apply({"params": params}, x))


def test_fold_has_no_gradient_toward_the_mask_variables():
    masked = make_masked()
    gradient = jax.grad(lambda m: fold_masks(m)["dense"]["kernel"].sum())(masked)
    np.testing.assert_array_equal(gradient.masks["dense"]["kernel"], np.zeros((5, 3)))
    np.testing.assert_array_equal(
        gradient.weights["dense"]["kernel"],
        np.asarray(masked.masks["dense"]["kernel"]) >= 0,
    )


def test_binary_masks_are_bool_and_none_where_unmasked():
    masked = make_masked()
    masks = binary_masks(masked)
    assert masks["dense"]["bias"] is None
    for layer in ("dense", "conv"):
        assert masks[layer]["kernel"].dtype == bool
        expected = np.asarray(masked.masks[layer]["kernel"]) >= 0
        np.testing.assert_array_equal(masks[layer]["kernel"], expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_binary_folded_and_applied_masks_agree_at_the_threshold(dtype):
    s = jnp.asarray([0.0, -0.0, 1e-4, -1e-4, 300.0, -300.0], dtype)
    masked = MaskedParams({"w": jnp.ones(6)}, {"w": s})
    expected = [True, True, True, False, True, False]
    assert binary_masks(masked)["w"].tolist() == expected
    assert fold_masks(masked)["w"].tolist() == expected
    assert apply_masks(masked)["w"].tolist() == expected
    assert float(connection_count(masked)) == 4.0


def test_all_of_it_works_on_nnx_variables():
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x)

    graph, state = nnx.split(Net(), nnx.Param)
    x = jnp.ones((2, 4))
    masked = mask_params(state, initial=-1.0)
    np.testing.assert_array_equal(
        nnx.merge(graph, fold_masks(masked))(x), np.zeros((2, 3))
    )

    def loss(masked):
        applied = apply_masks(masked, pruned_gradient=0)
        return nnx.merge(graph, applied)(x).sum() + connection_count(masked)

    gradient = jax.grad(loss)(masked)
    kernel = np.asarray(state["dense"]["kernel"][...])
    np.testing.assert_allclose(
        gradient.masks["dense"]["kernel"][...], 2 * kernel + 1, rtol=1e-6
    )
    assert not np.asarray(gradient.weights["dense"]["kernel"][...]).any()


# Weights are never destroyed


def test_pruned_weight_keeps_its_value():
    masked = make_masked()
    expected = as_numpy(masked.weights)
    pruned = as_numpy(binary_masks(masked))

    def loss(masked):
        applied = apply_masks(masked, pruned_gradient=0)
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(applied))

    tx = scl_jax.partition(optax.sgd(0.1), optax.set_to_zero())
    state = tx.init(masked)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        masked = optax.apply_updates(masked, updates)
    for layer in ("conv", "dense"):
        connected = pruned[layer]["kernel"]
        before, after = expected[layer]["kernel"], masked.weights[layer]["kernel"]
        assert 0 < connected.sum() < connected.size
        np.testing.assert_array_equal(after[~connected], before[~connected])
        assert (np.asarray(after)[connected] != before[connected]).all()


def test_connection_comes_back_with_its_old_weight():
    # The loss wants 2, which is what the weight is: its mask variable moves up.
    masked = MaskedParams({"w": jnp.float32([2.0])}, {"w": jnp.float32([-0.25])})

    def loss(masked):
        return jnp.sum((apply_masks(masked, pruned_gradient=0)["w"] - 2.0) ** 2)

    tx = scl_jax.partition(optax.sgd(0.1), optax.sgd(0.02))
    state, counts = tx.init(masked), []
    for _ in range(4):
        counts.append(float(connection_count(masked)))
        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        masked = optax.apply_updates(masked, updates)
    assert counts == [0.0, 0.0, 1.0, 1.0]
    assert apply_masks(masked)["w"].tolist() == [2.0]


def test_connection_never_comes_back_under_the_relu_counter_example():
    masked = MaskedParams({"w": jnp.float32([2.0])}, {"w": jnp.float32([-0.25])})

    def loss(masked):
        return jnp.sum((apply_masks(masked, ste=ReLU())["w"] - 2.0) ** 2)

    assert jax.grad(loss)(masked).masks["w"].tolist() == [0.0]


# connection_count


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_connections_are_counted_in_float32(dtype):
    # 1001 is no bfloat16; and sums of ones in bfloat16 stop at 256.
    s = np.full((7, 200), -1.0, np.float32)
    s.flat[:1001] = 1.0
    masked = MaskedParams(
        {"a": jnp.zeros((7, 200)), "b": jnp.ones(2)},
        {"a": jnp.asarray(s, dtype), "b": None},
    )
    count = connection_count(masked)
    assert (count.dtype, count.shape, float(count)) == (jnp.float32, (), 1001.0)


def test_counting_nothing_gives_a_float32_zero():
    count = connection_count(MaskedParams({"w": jnp.ones(2)}, {"w": None}))
    assert (count.dtype, count.shape, float(count)) == (jnp.float32, (), 0.0)


@pytest.mark.parametrize(
    ("ste", "proxy"),
    [
        (identity, np.ones_like),
        (LeakyReLU(0.2), lambda s: np.where(s < 0, 0.2, 1.0)),
        (Softplus(3.0), lambda s: 1 / (1 + np.exp(-3.0 * s))),
        (ReLU(), lambda s: (s >= 0) * 1.0),
        (Clipped(), lambda s: (np.abs(s) <= 1) * 1.0),
        (lambda s: 1 / (1 + s * s), lambda s: 1 / (1 + s**2)),
    ],
    ids=["identity", "leaky", "softplus", "relu", "clipped", "user"],
)
def test_gradient_of_the_count_is_the_proxy_gradient(ste, proxy):
    masked = make_masked()
    gradient = jax.grad(lambda m: connection_count(m, ste=ste))(masked)
    for layer in ("conv", "dense"):
        s = np.asarray(masked.masks[layer]["kernel"], np.float64)
        np.testing.assert_allclose(
            gradient.masks[layer]["kernel"], proxy(s), rtol=1e-5, atol=1e-7
        )
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient.weights))


# NaN shows


def nan_masked():
    masks = {"conv": {"kernel": jnp.ones((2, 2))}, "dense": {"kernel": jnp.ones(3)}}
    masks["dense"]["kernel"] = masks["dense"]["kernel"].at[1:].set(jnp.nan)
    return MaskedParams(jax.tree.map(jnp.ones_like, masks), masks)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nan_mask_variable_shows_in_applied_weights_and_count(transform):
    applied = transform(apply_masks)(nan_masked())
    np.testing.assert_array_equal(applied["dense"]["kernel"], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(applied["conv"]["kernel"], np.ones((2, 2)))
    assert np.isnan(transform(connection_count)(nan_masked()))


def test_nan_mask_variable_shows_even_where_the_weight_is_zero():
    masked = nan_masked()
    masked = masked._replace(weights=jax.tree.map(jnp.zeros_like, masked.weights))
    assert np.isnan(apply_masks(masked)["dense"]["kernel"][1:]).all()
    assert np.isnan(jax.jit(fold_masks)(masked)["dense"]["kernel"][1:]).all()


@pytest.mark.parametrize("function", [fold_masks, binary_masks])
def test_nan_mask_variable_is_refused_by_path(function):
    match = (
        f"{function.__name__}: mask variables must be numbers; "
        "2 of 3 at dense/kernel are NaN"
    )
    with pytest.raises(ValueError, match=match):
        function(nan_masked())


def test_nan_mask_variable_shows_in_weights_folded_under_jit():
    folded = jax.jit(fold_masks)(nan_masked())
    np.testing.assert_array_equal(folded["dense"]["kernel"], [1.0, np.nan, np.nan])


def test_binary_masks_of_a_traced_tree_are_refused():
    with pytest.raises(TypeError, match=r"concrete arrays.*use scl_jax\.unit_step"):
        jax.jit(binary_masks)(make_masked())


# Bad input, to each function

FUNCTIONS = [apply_masks, fold_masks, binary_masks, connection_count]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "plain",
    [{"kernel": jnp.ones, "bias": None}, ({"w": 1.0}, {"w": 1.0}), None],
    ids=["dict", "tuple", "none"],
)
def test_what_is_no_masked_params_is_refused(function, plain):
    match = (
        f"^{function.__name__}: needs a MaskedParams, as mask_params returns it; "
        f"got {type(plain).__name__}$"
    )
    with pytest.raises(TypeError, match=match):
        function(plain)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (3,), (), (5, 3, 1)])
def test_mask_of_another_shape_is_refused_by_path(function, shape):
    masked = MaskedParams(
        {"dense": {"kernel": np.zeros((5, 3), np.float32)}},
        {"dense": {"kernel": np.zeros(shape, np.float32)}},
    )
    match = re.escape(
        f"{function.__name__}: a mask must have the shape of its weight; at "
        f"dense/kernel the mask is {shape}, the weight (5, 3)"
    )
    with pytest.raises(ValueError, match=match):
        function(masked)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("masks", "where"),
    [
        ({"dense": {"kernel": np.zeros((2, 2), np.float32)}}, "dense/bias"),
        (
            {
                "dense": {"kernel": None, "bias": None, "extra": None},
            },
            "dense/extra",
        ),
        ({"dense": None}, "dense, dense/bias, dense/kernel"),
        ({}, "dense/bias, dense/kernel"),
    ],
    ids=["missing", "extra", "shallow", "empty"],
)
def test_masks_of_another_structure_are_refused_by_path(function, masks, where):
    weights = {"dense": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}}
    match = (
        f"{function.__name__}: masks must have the structure of weights .*; "
        f"they differ at {where}$"
    )
    with pytest.raises(ValueError, match=match):
        function(MaskedParams(weights, masks))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_in_a_tuple_beside_weights_in_a_list_are_refused(function):
    weights = [jnp.ones((2, 2))]
    with pytest.raises(ValueError, match="masks must have the structure of weights"):
        function(MaskedParams(weights, tuple(weights)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mask_beside_no_weight_is_refused_by_path(function):
    masked = MaskedParams({"a": None}, {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=rf"{function.__name__}: .*at a\b"):
        function(masked)


@pytest.mark.parametrize("function", [apply_masks, connection_count])
@pytest.mark.parametrize("ste", ["leaky", LeakyReLU, None])
def test_what_is_no_estimator_is_refused_even_where_nothing_is_masked(function, ste):
    masked = MaskedParams({"w": jnp.ones(2)}, {"w": None})
    match = f"{function.__name__}: ste must be a hashable callable"
    with pytest.raises(TypeError, match=match):
        function(masked, ste=ste)


# Under JAX's transformations


def objective(masked, x):
    kernel = apply_masks(masked, ste=Softplus(2.0))["dense"]["kernel"]
    return jnp.sum(jnp.tanh(x @ kernel)) + 0.1 * connection_count(masked)


def only_dense(seed):
    masked = make_masked(seed)
    return MaskedParams(
        {"dense": masked.weights["dense"]}, {"dense": masked.masks["dense"]}
    )


X = np.random.default_rng(7).normal(size=(4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
    ids=["jit", "checkpoint", "jit_checkpoint"],
)
def test_gradient_is_the_same_under(transform):
    masked = only_dense(0)
    expected = jax.grad(objective)(masked, X)
    got = jax.grad(transform(objective))(masked, X)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_seeds_can_be_stacked_and_vmapped():
    seeds = [only_dense(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    gradients = jax.vmap(jax.grad(objective), in_axes=(0, None))(stacked, X)
    counts = jax.vmap(connection_count)(stacked)
    folded = jax.vmap(fold_masks)(stacked)
    for i, seed in enumerate(seeds):
        one = jax.tree.map(lambda leaf: leaf[i], gradients)  # noqa: B023
        chex.assert_trees_all_close(
            one, jax.grad(objective)(seed, X), rtol=1e-5, atol=1e-6
        )
        assert float(counts[i]) == float(connection_count(seed))
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf: leaf[i], folded),  # noqa: B023
            fold_masks(seed),
        )


def test_mask_params_can_be_vmapped_over_seeds():
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), make_params())
    masked = jax.vmap(mask_params)(params)
    assert masked.masks["dense"]["kernel"].shape == (2, 5, 3)
    chex.assert_trees_all_equal(jax.vmap(fold_masks)(masked), params)


def train_step(carry, x):
    masked, state = carry
    value, gradient = jax.value_and_grad(objective)(masked, x)
    updates, state = TX.update(gradient, state, masked)
    return (optax.apply_updates(masked, updates), state), value


TX = scl_jax.partition(
    optax.adamw(1e-2),
    optax.chain(scl_jax.normalize_by_feature(), optax.sgd(0.05, 0.9)),
)


def test_scanned_training_is_the_same_as_stepwise():
    masked = only_dense(0)
    xs = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    carry = (masked, TX.init(masked))
    (scanned, _), losses = jax.lax.scan(train_step, carry, xs)
    for x, loss in zip(xs, losses, strict=True):
        carry, value = train_step(carry, x)
        np.testing.assert_allclose(value, loss, rtol=1e-4)
    chex.assert_trees_all_close(carry[0], scanned, rtol=1e-4, atol=1e-5)
    assert float(connection_count(scanned)) != float(connection_count(masked))


def test_train_step_can_take_its_state_by_donation_and_compiles_once():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(train_step, n=1), donate_argnums=0)
    masked = jax.tree.map(jnp.copy, only_dense(0))
    carry = (masked, TX.init(masked))
    for _ in range(3):
        carry, _ = step(carry, X)
    assert masked.masks["dense"]["kernel"].is_deleted()
    chex.assert_tree_all_finite(carry)
