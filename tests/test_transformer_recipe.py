"""The transformer recipe: weight decay, axes of layers and heads, bfloat16 masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scl_jax
from experiments.recipes.transformer import dense, vit

IMAGES = np.random.default_rng(0).normal(size=(8, 14, 14, 1)).astype(np.float32)
LABELS = np.arange(8) % 10


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape).astype(np.float32)), tree
    )


@functools.cache
def start():
    """Return parameters for images of 14 x 14, four patches: quicker than init's."""
    init = functools.partial(vit.Transformer().init, jax.random.key(0))
    shapes = jax.eval_shape(init, IMAGES)["params"]
    return jax.tree.map(lambda x: 0.15 * x, random_like(shapes, 0))


def named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def test_masks_are_not_decayed_by_the_habit_of_two_axes():
    params = scl_jax.mask_params(start())
    zeros = jax.tree.map(jnp.zeros_like, params)
    adamw = optax.adamw(0.5, weight_decay=0.1, mask=dense.decays)

    def after(tx) -> Any:
        def step():
            updates, _ = tx.update(zeros, tx.init(params), params)
            return optax.apply_updates(params, updates)

        return jax.jit(step)()

    right = after(scl_jax.partition(adamw, optax.sgd(0.5)))
    decayed = {
        path: weight * np.float32(1 - 0.5 * 0.1) if weight.ndim > 1 else weight
        for path, weight in named(params.weights).items()
    }
    for path, weight in named(right.weights).items():
        np.testing.assert_allclose(weight, decayed[path], rtol=1e-6)
    assert all(np.all(s == np.float32(0.1)) for s in named(right.masks).values())

    # Wrong: one optimizer for both; every mask variable goes toward the threshold.
    wrong = named(after(adamw).masks)
    assert all(np.allclose(s, 0.1 * (1 - 0.5 * 0.1)) for s in wrong.values())


def by_hand(path, g):
    """Normalize each unit of each layer: a loop over layers in NumPy."""
    stacked = path.startswith("blocks/")
    by_head = path.split("/")[-2] in ("query", "key", "value")
    layers = []
    for layer in g.astype(np.float64) if stacked else g.astype(np.float64)[None]:
        inputs = len(layer) if by_head else layer.size // layer.shape[-1]
        units = layer.reshape(inputs, -1)
        layers.append(units / np.sqrt((units**2).mean(0, keepdims=True)))
    return np.reshape(layers, g.shape)


def test_each_unit_of_each_head_and_layer_is_normalized_by_itself():
    masks = scl_jax.mask_params(start()).masks
    gradient = random_like(masks, 1)
    # The second layer's gradients are a thousand times the first's.
    blocks = jax.tree.map(lambda g: g.at[1].multiply(1e3), gradient["blocks"])
    gradient = {**gradient, "blocks": blocks}
    tx = scl_jax.normalize_by_feature(vit.axes)
    updates, _ = tx.update(gradient, tx.init(masks))
    before, behind = named(gradient), named(updates)
    assert {path for path in before if before[path].ndim == 4} == {
        "Conv_0/kernel",
        *(
            f"blocks/MultiHeadDotProductAttention_0/{name}/kernel"
            for name in ("query", "key", "value", "out")
        ),
    }
    for path, g in before.items():
        np.testing.assert_allclose(behind[path], by_hand(path, g), rtol=1e-4)


@pytest.mark.parametrize("wrong", [-1, (-2, -1)])
def test_axes_without_the_layer_let_one_layer_decide(wrong):
    kernel = random_like({"kernel": jnp.zeros((2, 6, 5))}, 2)["kernel"]
    gradient = {"blocks": {"kernel": kernel.at[1].multiply(1e3)}}

    def sizes(axes):
        tx = scl_jax.normalize_by_feature(axes)
        updates: Any = tx.update(gradient, tx.init(gradient))[0]
        return np.sqrt(np.square(updates["blocks"]["kernel"]).mean((1, 2)))

    np.testing.assert_allclose(sizes(vit.axes), [1.0, 1.0], rtol=1e-5)
    assert sizes(wrong)[0] < 0.05


def test_mask_variables_in_bfloat16_train_and_stay_in_bfloat16():
    params = scl_jax.mask_params(start(), dtype=jnp.bfloat16)
    penalty = scl_jax.add_connection_penalty(1e-6)
    # Gradients fall by orders of magnitude here: each is divided by its own norm.
    normalize = scl_jax.normalize_by_feature(vit.axes, decay=0)
    masks_tx = optax.chain(penalty, normalize, optax.sgd(4e-3))
    tx = scl_jax.partition(optax.adamw(3e-3, mask=dense.decays), masks_tx)

    def loss_fn(params):
        return dense.loss_fn(scl_jax.apply_masks(params), IMAGES, LABELS)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses, first = jax.jit(tx.init)(params), [], named(params.masks)
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    masks = named(params.masks)
    assert {s.dtype for s in masks.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {w.dtype for w in named(params.weights).values()} == {np.dtype(np.float32)}
    assert all(np.any(s != first[path]) for path, s in masks.items())
    left = sum(int((s >= 0).sum()) for s in masks.values())
    assert 0.05 < left / sum(s.size for s in masks.values()) < 0.8
    assert losses[-1] < 0.5 * losses[0]
