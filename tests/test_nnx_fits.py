"""The adapter for NNX: from and to elsewhere, and what it says of what does not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_networks import Network, X, assert_same, linear, masks_tx, pure, start

import scl_jax
from scl_jax.nnx import TRAINED, Masked, MaskVariable, partition

# From and to checkpoints and MaskedParams


def test_checkpoint_keeps_the_masks(tmp_path):
    model = Masked(Network(), initial=start)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", nnx.state(model, TRAINED))
        checkpointer.wait_until_finished()
        other = Masked(Network(seed=1))
        wanted = nnx.state(nnx.eval_shape(lambda: Masked(Network(seed=1))), TRAINED)
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=X.sharding),
            wanted,
        )
        nnx.update(other, checkpointer.restore(tmp_path / "kept", wanted))
    for kept in TRAINED:
        assert_same(pure(nnx.state(other, kept)), pure(nnx.state(model, kept)))


def test_masked_params_serve_fold_and_report():
    model = Masked(Network(), initial=start)
    model.eval()
    masked = model.masked_params()
    kept = sum(int((np.asarray(s) >= 0).sum()) for s in jax.tree.leaves(masked.masks))
    totals = scl_jax.report(masked).totals
    assert (totals.connections, totals.weights) == (kept, 36 + 36 + 18)
    assert 0 < kept < 90
    folded = Network(seed=1)
    nnx.update(folded, scl_jax.fold_masks(masked))
    folded.eval()
    np.testing.assert_array_equal(folded(X), model(X))


@pytest.mark.parametrize("as_states", [True, False])
def test_masked_params_of_either_kind_can_be_put_into_a_model(as_states):
    params = nnx.state(Network(seed=1), nnx.Param)
    if not as_states:
        params = nnx.to_pure_dict(params)
    model = Masked(Network())
    kernel, mask = model.model.head.kernel, model.masks["head"]["kernel"]
    model.set_masked_params(scl_jax.mask_params(params, initial=start))
    expected = Masked(Network(seed=1), initial=start)
    for kept in TRAINED:
        assert_same(pure(nnx.state(model, kept)), pure(nnx.state(expected, kept)))
    assert model.model.head.kernel is kernel
    assert model.masks["head"]["kernel"] is mask


def other_network():
    return nnx.to_pure_dict(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        (
            lambda: scl_jax.mask_params({"kernel": jnp.ones((3, 2))}),
            "which differs at weights/bias, masks/bias; weights/bias is float32[2] "
            "there, missing in the argument",
        ),
        (
            lambda: scl_jax.mask_params(
                {**other_network(), "kernel": jnp.ones((2, 2))}
            ),
            "weights/kernel is float32[3, 2] there, float32[2, 2] in the argument",
        ),
        (
            lambda: scl_jax.mask_params(other_network(), dtype=jnp.bfloat16),
            "masks/kernel is float32[3, 2] there, bfloat16[3, 2] in the argument",
        ),
        (
            lambda: scl_jax.mask_params(other_network(), select=lambda *_: True),
            "masks/bias is not masked there, float32[2] in the argument",
        ),
    ],
    ids=["structure", "shape", "dtype", "selection"],
)
def test_masked_params_of_another_model_are_refused(masked, message):
    model = linear()
    before = pure(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.set_masked_params(masked())
    assert_same(pure(model), before)


# What is said about what does not fit


def test_what_is_no_masked_params_is_refused():
    with pytest.raises(TypeError, match=r"^Masked\.set_masked_params: needs a Masked"):
        linear().set_masked_params({"kernel": jnp.ones((3, 2))})


@pytest.mark.parametrize("model", [{"kernel": jnp.ones((3, 2))}, nnx.Linear, linear()])
def test_what_is_no_model_without_masks_is_refused(model):
    with pytest.raises(TypeError, match=r"must be an nnx\.Module without masks, got"):
        Masked(model)


def test_rule_that_matches_nothing_names_the_paths_inside_the_model():
    with pytest.raises(ValueError, match=r"parameters are: bias, kernel$"):
        linear(select=scl_jax.select("model/kernel"))


def test_estimator_that_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match=r"^Masked: ste must be a hashable callable"):
        linear(ste="identity")


SAY_TRAINED = r"Say TRAINED to both: nnx\.Optimizer\(model, tx, wrt=TRAINED\)"


@pytest.mark.parametrize(
    ("make", "wrt", "found"),
    [
        (linear, nnx.Param, "a state of model"),
        (linear, MaskVariable, "a state of masks"),
        (Network, nnx.Param, "a state of head, layers, norm"),
        (Network, MaskVariable, "a state of nothing"),
    ],
)
def test_optimizer_that_leaves_weights_or_masks_out_is_refused(make, wrt, found):
    tx = partition(optax.sgd(0.1), masks_tx())
    with pytest.raises(TypeError, match=f"got {found}. {SAY_TRAINED}"):
        nnx.Optimizer(make(), tx, wrt=wrt)


def test_gradient_that_leaves_the_masks_out_is_refused():
    model = linear()
    tx = partition(optax.sgd(0.1), masks_tx())
    optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
    gradient = nnx.grad(lambda model: model(X[:, :3]).sum())(model)
    with pytest.raises(TypeError, match=f"got a state of model. {SAY_TRAINED}"):
        optimizer.update(model, gradient)


def test_optimizer_of_the_functional_style_says_what_it_updates():
    tx = scl_jax.partition(optax.sgd(0.1), masks_tx())
    with pytest.raises(TypeError, match=r"^partition: updates a MaskedParams"):
        nnx.Optimizer(linear(), tx, wrt=TRAINED)
    tx = partition(optax.sgd(0.1), masks_tx())
    with pytest.raises(TypeError, match=r"^partition: .* got <class .*MaskedParams"):
        tx.init(linear().masked_params())
