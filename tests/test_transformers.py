"""Transformers: what they compute, what they cost, and what may see what."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import scl_jax
from experiments.models.language_model import LanguageModel
from experiments.models.transformer import Attention, Block, mlp_layers
from experiments.models.vit import ViT, ViTB16, ViTS16, ViTTi4

PROJECTIONS = ("query", "key", "value", "out")


class TinyViT(ViT):
    next_layer: ClassVar[dict[str, str]] = mlp_layers(2)
    patch, width, blocks, heads, mlp = 4, 8, 2, 2, 12


class TinyLanguageModel(LanguageModel):
    next_layer: ClassVar[dict[str, str]] = mlp_layers(2)
    context, width, blocks, heads, mlp = 6, 8, 2, 2, 12


def image_shape(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def token_shape(*shape, dtype=jnp.uint8):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes_of(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def random_params(model, x):
    """Return parameters without a zero or a one: each has its effect."""
    return random_like(shapes_of(model, x), 0)


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), leaf.dtype), tree
    )


def in_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# In NumPy, token by token and head by head


def layer_norm(x, p):
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return centered / deviation * p["scale"] + p["bias"]


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def attention(x, p, causal):
    out = np.zeros_like(x) + p["out"]["bias"]
    for b, t, head in np.ndindex(len(x), x.shape[1], p["out"]["kernel"].shape[0]):
        q, k, v = (
            x[b] @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        seen = t + 1 if causal else len(k)
        weights = np.exp(k[:seen] @ q[t] / np.sqrt(q.shape[-1]))
        mixed = weights / weights.sum() @ v[:seen]
        out[b, t] += mixed @ p["out"]["kernel"][head]
    return out


def block(x, p, causal):
    x = x + attention(layer_norm(x, p["LayerNorm_0"]), p["Attention_0"], causal)
    hidden = gelu(dense(layer_norm(x, p["LayerNorm_1"]), p["Dense_0"]))
    return x + dense(hidden, p["Dense_1"])


def both_blocks(x, p, causal):
    x = block(block(x, p["Block_0"], causal), p["Block_1"], causal)
    return layer_norm(x, p["LayerNorm_0"])


@pytest.mark.parametrize("causal", [False, True])
def test_block_is_attention_then_an_mlp_each_behind_a_normalization(causal):
    layer = Block(heads=2, mlp=12, causal=causal)
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    params = random_params(layer, x)
    got = layer.apply({"params": params}, x)
    close(got, block(x.astype(float), in_float64(params), causal))


def test_vit_reads_patches_through_blocks_into_the_class_token():
    model = TinyViT(classes=5)
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = random_params(model, images)
    p = in_float64(params)
    corners = [(i, j) for i in (0, 4) for j in (0, 4, 8)]
    patches = [images[:, i : i + 4, j : j + 4].reshape(2, 48) for i, j in corners]
    kernel = p["Conv_0"]["kernel"].reshape(48, 8)
    tokens = [patch @ kernel + p["Conv_0"]["bias"] for patch in patches]
    x = np.stack([np.repeat(p["class_token"][0], 2, 0), *tokens], axis=1)
    x = both_blocks(x + p["position_embedding"], p, causal=False)
    close(model.apply({"params": params}, images), dense(x[:, 0], p["Dense_0"]))


def test_language_model_embeds_tokens_and_ends_in_an_untied_head():
    model = TinyLanguageModel(classes=7)
    tokens = np.array([[3, 1, 4, 1, 5], [6, 0, 2, 2, 3]], np.uint8)
    params = random_params(model, tokens)
    p = in_float64(params)
    x = p["Embed_0"]["embedding"][tokens] + p["position_embedding"][:, :5]
    x = both_blocks(x, p, causal=True)
    assert "bias" not in p["Dense_0"]
    close(model.apply({"params": params}, tokens), dense(x, p["Dense_0"]))


# Sizes and costs


@pytest.mark.parametrize(
    ("network", "parameters"), [(ViTS16, 22_050_664), (ViTB16, 86_567_656)]
)
def test_vit_has_the_published_size(network, parameters):
    shapes = shapes_of(network(classes=1000), image_shape(224, 224, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def macs_by_hand(tokens, width, mlp, blocks, rest):
    of_block = {f"Attention_0/{name}": width**2 for name in PROJECTIONS}
    of_block |= {"Dense_0": width * mlp, "Dense_1": width * mlp}
    return rest | {
        f"Block_{i}/{name}/kernel": tokens * macs
        for i in range(blocks)
        for name, macs in of_block.items()
    }


TI4 = {"Conv_0/kernel": 49 * 16 * 192, "Dense_0/kernel": 192 * 10}
# 28x28 padded to 32x32: taps on the padding are computed with.
S16 = {"Conv_0/kernel": 4 * 256 * 384, "Dense_0/kernel": 384 * 10}
TEXT = {"Dense_0/kernel": 128 * 128 * 97}
DIGIT = image_shape(28, 28, 1)


@pytest.mark.parametrize(
    ("model", "x", "expected", "total"),
    [
        (ViTTi4(), DIGIT, macs_by_hand(50, 192, 768, 6, TI4), 132_862_848),
        (ViTS16(), DIGIT, macs_by_hand(5, 384, 1536, 12, S16), 106_565_376),
        (
            LanguageModel(classes=97),
            token_shape(1, 128),
            macs_by_hand(128, 128, 512, 4, TEXT),
            102_252_544,
        ),
    ],
)
def test_macs_are_known_for_every_kernel(model, x, expected, total):
    counted = scl_jax.count_macs(
        lambda p, x: model.apply({"params": p}, x), shapes_of(model, x), x
    )
    by_path = flatten_dict(counted, sep="/")
    kernels = {p: macs for p, macs in by_path.items() if p.endswith("kernel")}
    assert kernels == expected
    assert sum(kernels.values()) == total


def test_masked_are_the_kernels_and_no_embedding():
    shapes = shapes_of(TinyLanguageModel(classes=7), token_shape(1, 6))
    masks = scl_jax.mask_params(shapes).masks
    masked = {p for p, m in flatten_dict(masks, sep="/").items() if m is not None}
    assert masked == set(macs_by_hand(6, 8, 12, 2, {"Dense_0/kernel": 0}))


@pytest.mark.parametrize("place", [0, 2, 5])
def test_logits_see_their_token_and_those_before_it(place):
    model = TinyLanguageModel(classes=7)
    tokens = np.array([[3, 1, 4, 1, 5, 2]], np.int32)
    params = random_params(model, tokens)
    changed = tokens.copy()
    changed[0, place] = 6
    before, after = (model.apply({"params": params}, x) for x in (tokens, changed))
    differs = np.abs(np.asarray(after - before)).max(-1)[0]
    assert (differs[:place] == 0).all()
    assert (differs[place:] > 1e-3).all()


@pytest.mark.parametrize("shape", [(5, 7, 1), (8, 5, 3), (3, 2, 2)])
def test_image_is_padded_with_zeros_on_the_far_sides(shape):
    model = TinyViT()
    image = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    height, width = (-(-size // 4) * 4 for size in shape[:2])
    padded = np.zeros((1, height, width, shape[2]), np.float32)
    padded[:, : shape[0], : shape[1]] = image
    params = random_params(model, image)
    tokens = 1 + height * width // 16
    assert params["position_embedding"].shape == (1, tokens, 8)
    got, expected = (model.apply({"params": params}, x) for x in (image, padded))
    close(got, expected)


def test_feature_axes_is_a_plain_function_of_class_and_instance():
    for network in (ViTTi4, ViTS16, LanguageModel):
        for axes in (network.feature_axes, network().feature_axes):
            assert axes("Block_3/Attention_0/value/kernel", None) == (-2, -1)
            assert axes("Block_3/Attention_0/out/kernel", None) == -1
            assert axes("Block_3/Dense_0/kernel", None) == -1


def test_mask_gradients_of_each_unit_of_a_head_are_divided_by_their_own_norm():
    masks = scl_jax.mask_params(random_params(TinyViT(), image_shape(8, 8, 1))).masks
    gradients = random_like(masks, 2)
    transform = scl_jax.normalize_by_feature(TinyViT.feature_axes, norm="l2")
    updates, _ = transform.update(gradients, transform.init(masks))
    before, after = (t["Block_1"]["Attention_0"] for t in (gradients, updates))
    given, got = (np.asarray(t["query"]["kernel"], float) for t in (before, after))
    assert given.shape == (8, 2, 4)
    for head, unit in np.ndindex(2, 4):
        column = given[:, head, unit]
        close(got[:, head, unit], column / np.sqrt((column**2).sum()))
    given, got = (np.asarray(t["out"]["kernel"], float) for t in (before, after))
    assert given.shape == (2, 4, 8)
    for unit in range(8):
        column = given[..., unit]
        close(got[..., unit], column / np.sqrt((column**2).sum()))


def test_report_counts_units_of_heads_and_unread_units_of_mlps():
    model, x = TinyViT(), jnp.zeros((1, 8, 8, 1))
    masked = scl_jax.mask_params(random_params(model, x))
    masks = flatten_dict(masked.masks, sep="/")
    query, reader = "Block_0/Attention_0/query/kernel", "Block_1/Dense_1/kernel"
    masks[query] = masks[query].at[:, 1, 2].set(-1.0)
    masks[reader] = masks[reader].at[7].set(-1.0)
    masked = masked._replace(masks=unflatten_dict(masks, sep="/"))
    macs = scl_jax.count_macs(
        lambda p, x: model.apply({"params": p}, x), masked.weights, x
    )
    report = scl_jax.report(
        masked, macs, feature_axes=model.feature_axes, next_layer=model.next_layer
    )
    rows = {row.path: row for row in report.rows}
    units = {f"Attention_0/{name}": 8 for name in PROJECTIONS}
    units |= {"Dense_0": 12, "Dense_1": 8}
    assert {path: row.features for path, row in rows.items()} == {
        "Conv_0/kernel": 8,
        "Dense_0/kernel": 10,
        **{f"Block_{i}/{name}/kernel": n for i in (0, 1) for name, n in units.items()},
    }
    cut = {p: r.features_without_input for p, r in rows.items()}
    assert {p: count for p, count in cut.items() if count} == {query: 1}
    unread = {p: rows[p].features_without_output for p in model.next_layer}
    assert unread == {"Block_0/Dense_0/kernel": 0, "Block_1/Dense_0/kernel": 1}
    assert rows[query].macs_remaining == 5 * (64 - 8)


@pytest.mark.parametrize("network", [ViTTi4, ViTS16, ViTB16, LanguageModel])
def test_next_layer_names_the_mlp_of_every_block(network):
    x = token_shape(1, 8) if network is LanguageModel else image_shape(32, 32, 3)
    shapes = flatten_dict(shapes_of(network(), x), sep="/")
    assert set(network.next_layer) == {
        p for p in shapes if p.startswith("Block_") and p.endswith("/Dense_0/kernel")
    }
    for path, reader in network.next_layer.items():
        assert path.split("/")[0] == reader.split("/")[0]
        assert shapes[path].shape == shapes[reader].shape[::-1]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("network", "x"),
    [(TinyViT, image_shape(7, 7, 1)), (TinyLanguageModel, token_shape(1, 6))],
)
def test_bfloat16_computes_products_in_bfloat16_and_the_softmax_in_float32(network, x):
    model = network(dtype=jnp.bfloat16)
    shapes = shapes_of(model, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(model.apply)({"params": shapes}, x)
    operands, exponentials = [], []
    for equation in equations(program.jaxpr):
        inputs = [v.aval.dtype for v in equation.invars]
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            operands.append(inputs)
        if equation.primitive.name == "exp":
            exponentials += inputs
    # Per block: q, k, v, q k^T, weights v, out and two of the MLP.
    assert len(operands) == 2 * 8 + (2 if network is TinyViT else 1)
    assert all(pair == [jnp.bfloat16] * 2 for pair in operands)
    assert exponentials == [jnp.float32] * 2
    run = functools.partial(model.apply, mutable=True, capture_intermediates=True)
    layers = jax.eval_shape(run, {"params": shapes}, x)[1]["intermediates"]
    assert layers.pop("__call__")[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(layers)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (token_shape(1, 129), ValueError, r"T at most context=128, got \(1, 129\)"),
        (token_shape(8), ValueError, r"shape \(B, T\).*got \(8,\)"),
        (token_shape(2, 8, 1), ValueError, r"shape \(B, T\).*got \(2, 8, 1\)"),
        (token_shape(2, 8, dtype=jnp.float32), TypeError, r"integers, got float32"),
        (token_shape(2, 8, dtype=jnp.bool_), TypeError, r"integers, got bool"),
    ],
)
def test_tokens_of_another_kind_are_refused(x, error, message):
    with pytest.raises(error, match=f"LanguageModel: tokens must .*{message}"):
        shapes_of(LanguageModel(), x)


def test_token_that_is_no_class_is_not_taken_for_another():
    model = TinyLanguageModel(classes=7)
    tokens = np.array([[3, 7, 4], [3, 6, 4]], np.uint8)
    logits = model.apply({"params": random_params(model, tokens)}, tokens)
    np.testing.assert_array_equal(np.isnan(logits).all((1, 2)), [True, False])


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="divide the width, got 3 heads and width 8"):
        shapes_of(Attention(heads=3), jax.ShapeDtypeStruct((1, 4, 8), jnp.float32))
