"""Masked where dense was meant and the reverse: an error says what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import errors
from flax import linen as nn
from flax.training.train_state import TrainState

import scl_jax
import scl_jax.linen


def dense_params():
    return nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def masked_params():
    return scl_jax.mask_params(dense_params())


def joined_params():
    return scl_jax.linen.join(masked_params())


ADAPTERS = {
    "MaskedParams": (scl_jax.partition, masked_params, TypeError, "got dict. Dense"),
    "linen": (
        scl_jax.linen.partition,
        joined_params,
        ValueError,
        "and these have none",
    ),
}
DENSE_OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(0.1),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("optimizer", DENSE_OPTIMIZERS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_dense_optimizer_state_for_masked_parameters_is_refused(
    adapter, optimizer, jit
):
    partition, make, *_ = ADAPTERS[adapter]
    params, tx = make(), DENSE_OPTIMIZERS[optimizer]()
    both = partition(tx, optax.sgd(0.1))
    update = jax.jit(both.update) if jit else both.update
    with pytest.raises(TypeError, match=r"another optimizer's.*call init again"):
        update(params, tx.init(dense_params()), params)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dense_parameters_and_gradients_are_refused(adapter):
    partition, make, error, match = ADAPTERS[adapter]
    tx = partition(optax.adam(0.1), optax.sgd(0.1))
    with pytest.raises(error, match=match):
        tx.init(dense_params())
    with pytest.raises(error, match=match):
        TrainState.create(apply_fn=None, params=dense_params(), tx=tx)  # pyright: ignore
    with pytest.raises(error, match=match):
        tx.update(dense_params(), tx.init(make()), dense_params())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_of_masked_parameters_for_a_dense_optimizer_does_not_pass(adapter):
    partition, make, *_ = ADAPTERS[adapter]
    tx = optax.adam(0.1)
    state = partition(tx, optax.sgd(0.1)).init(make())
    with pytest.raises((TypeError, ValueError, AttributeError)):
        tx.update(dense_params(), state, dense_params())


def test_masked_params_without_apply_masks_are_refused_by_flax():
    x = jnp.ones((1, 2))
    for model in (nn.Dense(3), scl_jax.linen.masked(nn.Dense(3))):
        with pytest.raises(
            errors.ApplyScopeInvalidVariablesTypeError,
            match="Each collection should be a dictionary",
        ):
            model.apply({"params": masked_params()}, x)  # pyright: ignore


def test_masked_params_taken_for_a_dict_say_what_to_call():
    masked, x = masked_params(), jnp.ones((1, 2))
    advice = r"apply_masks\(masked\), evaluate it with fold_masks"
    with pytest.raises(AttributeError, match=f"no attribute 'items'; .*{advice}"):
        nn.Dense(3).apply(masked, x)  # pyright: ignore
    with pytest.raises(TypeError, match=f"no entry 'kernel'; .*{advice}"):
        _ = x @ masked["kernel"]  # pyright: ignore
    weights, masks = masked  # as the tuple that it is
    assert masked[0] is weights
    assert masked[1:] == (masks,)


def test_split_of_masked_params_is_refused():
    with pytest.raises(TypeError, match="kernel_mask beside each kernel; got Masked"):
        scl_jax.linen.split(masked_params())
