"""A page of literal comparisons: which leaves a rule masks."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import scl_jax
from scl_jax import exclude, kernels, select
from scl_jax._select import selected

MATRIX, VECTOR = np.zeros((2, 3), np.float32), np.zeros(3, np.float32)


def dense():
    return {"kernel": MATRIX, "bias": VECTOR}


def transformer():
    """A tree with most of what a network has, under Flax's names."""
    return {
        "embed": {"embedding": MATRIX},
        "position": VECTOR,
        "block_0": {
            "norm": {"scale": VECTOR, "bias": VECTOR},
            "attention": {"query": dense(), "value": dense()},
        },
        "block_10": {"conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}},
        "head": dense(),
    }


def test_kernels_are_selected_by_default():
    assert selected(transformer(), kernels, "test") == {
        "embed": {"embedding": False},
        "position": False,
        "block_0": {
            "norm": {"scale": False, "bias": False},
            "attention": {
                "query": {"kernel": True, "bias": False},
                "value": {"kernel": True, "bias": False},
            },
        },
        "block_10": {"conv": {"kernel": True}},
        "head": {"kernel": True, "bias": False},
    }


def test_select_takes_what_its_patterns_match():
    assert selected(transformer(), select("head/kernel", ".*/norm/.*"), "test") == {
        "embed": {"embedding": False},
        "position": False,
        "block_0": {
            "norm": {"scale": True, "bias": True},
            "attention": {
                "query": {"kernel": False, "bias": False},
                "value": {"kernel": False, "bias": False},
            },
        },
        "block_10": {"conv": {"kernel": False}},
        "head": {"kernel": True, "bias": False},
    }


def look_alikes():
    """Paths that begin, end or continue as block_1/kernel does."""
    return {
        "block_1": {"kernel": MATRIX, "kernel_2": MATRIX},
        "block_10": {"kernel": MATRIX},
        "head": {"block_1": {"kernel": MATRIX}},
    }


def test_select_matches_the_path_in_full():
    assert selected(look_alikes(), select("block_1/kernel"), "test") == {
        "block_1": {"kernel": True, "kernel_2": False},
        "block_10": {"kernel": False},
        "head": {"block_1": {"kernel": False}},
    }
    assert selected(look_alikes(), select("block_1.*/kernel"), "test") == {
        "block_1": {"kernel": True, "kernel_2": False},
        "block_10": {"kernel": True},
        "head": {"block_1": {"kernel": False}},
    }


def test_select_matches_alternatives_in_full():
    params = {"a": MATRIX, "ab": MATRIX}
    assert selected(params, select("a|ab"), "test") == {"a": True, "ab": True}
    assert selected(params, select("a|abc"), "test") == {"a": True, "ab": False}


def test_exclude_takes_the_kernels_that_no_pattern_matches():
    params = {"stem": dense(), "block": dense(), "head": dense()}
    assert selected(params, exclude("stem/.*", "head/kernel"), "test") == {
        "stem": {"kernel": False, "bias": False},
        "block": {"kernel": True, "bias": False},
        "head": {"kernel": False, "bias": False},
    }


def test_exclude_matches_the_path_in_full():
    rule = exclude("block_1/kernel", among=lambda path, leaf: True)
    assert selected(look_alikes(), rule, "test") == {
        "block_1": {"kernel": False, "kernel_2": True},
        "block_10": {"kernel": True},
        "head": {"block_1": {"kernel": True}},
    }


def test_exclude_takes_from_another_rule():
    params = {"block": dense(), "head": dense()}
    rule = exclude("head/bias", among=select(".*/bias"))
    assert selected(params, rule, "test") == {
        "block": {"kernel": False, "bias": True},
        "head": {"kernel": False, "bias": False},
    }
    nested = exclude("block/kernel", among=exclude("head/kernel", among=lambda *_: 1))
    assert selected(params, nested, "test") == {
        "block": {"kernel": False, "bias": True},
        "head": {"kernel": False, "bias": True},
    }


def test_rule_may_be_any_function_of_path_and_leaf():
    def wide(path, leaf):
        return path.startswith("block") and leaf.shape[-1] > 2

    params = {"block": {"a": MATRIX, "b": MATRIX.T}, "head": {"a": MATRIX}}
    assert selected(params, wide, "test") == {
        "block": {"a": True, "b": False},
        "head": {"a": False},
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As Equinox makes it: leaves behind attributes."""

    weight: Any
    bias: Any


def test_kernels_know_the_names_of_equinox():
    params = {
        "layers": [Module(MATRIX, VECTOR), Module(MATRIX, None)],
        "norm": Module(VECTOR, VECTOR),
    }
    assert selected(params, kernels, "test") == {
        "layers": [Module(True, False), Module(True, False)],
        "norm": Module(False, False),
    }
    assert selected(params, exclude("layers/1/weight"), "test") == {
        "layers": [Module(True, False), Module(False, False)],
        "norm": Module(False, False),
    }


def test_kernels_know_the_names_of_haiku():
    params = {"mlp/~/linear_0": {"w": MATRIX, "b": VECTOR}, "norm": {"scale": VECTOR}}
    assert selected(params, kernels, "test") == {
        "mlp/~/linear_0": {"w": True, "b": False},
        "norm": {"scale": False},
    }


def test_kernels_are_called_so_in_full():
    names = ["kernel", "my_kernel", "kernels", "w", "ww", "weight", "reweight"]
    assert selected(dict.fromkeys(names, MATRIX), kernels, "test") == {
        "kernel": True,
        "my_kernel": False,
        "kernels": False,
        "w": True,
        "ww": False,
        "weight": True,
        "reweight": False,
    }


def test_embeddings_and_norms_of_linen_are_not_selected():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(5, 4)(tokens)
            x = nn.GroupNorm(2)(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(2)(nn.LayerNorm()(nn.Conv(4, (3,))(x)))

    tokens = jnp.zeros((1, 6), jnp.int32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), tokens)
    assert selected(variables["params"], kernels, "test") == {
        "Embed_0": {"embedding": False},
        "BatchNorm_0": {"scale": False, "bias": False},
        "Conv_0": {"kernel": True, "bias": False},
        "LayerNorm_0": {"scale": False, "bias": False},
        "GroupNorm_0": {"scale": False, "bias": False},
        "Dense_0": {"kernel": True, "bias": False},
    }


def test_a_rule_means_the_same_on_nnx_variables_and_on_raw_arrays():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    state = nnx.state(Net(), nnx.Param)
    expected = {
        "embed": {"embedding": False},
        "layers": {
            0: {"kernel": False, "bias": False},
            1: {"kernel": True, "bias": False},
        },
    }
    for rule in (select("layers/1/kernel"), exclude("layers/0/kernel")):
        on_variables = selected(state, rule, "test")
        assert nnx.to_pure_dict(on_variables) == expected
        assert selected(nnx.to_pure_dict(state), rule, "test") == expected


def test_leaves_that_are_none_are_never_selected():
    assert selected({"kernel": MATRIX, "w": None}, lambda *_: True, "test") == {
        "kernel": True,
        "w": False,
    }


def test_rules_are_values():
    assert select("a", "b") == select("a", "b")
    assert hash(select("a", "b")) == hash(select("a", "b"))
    assert select("a") != select("b")
    assert exclude("a") == exclude("a")
    assert exclude("a") != exclude("a", among=select("b"))
    assert repr(select("a", "b/.*")) == 'select("a", "b/.*")'


def test_pattern_that_matches_nothing_is_an_error_that_lists_the_parameters():
    params = {"Dense_0": dense()}
    match = (
        r'^mask_params: .*select\("Dense_9/kernel"\).* matched no parameter; '
        "parameters are: Dense_0/bias, Dense_0/kernel$"
    )
    with pytest.raises(ValueError, match=match):
        scl_jax.mask_params(params, select=select("Dense_9/kernel"))


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (select("Dense_0/kernel", "Dense_7/kernel"), "Dense_7/kernel"),
        (select("kernel"), "kernel"),
        (exclude("Dense_0"), "Dense_0"),
        (exclude("head/.*", among=select("Dense_0/.*")), "head/.*"),
        (exclude("Dense_0/bias", among=select("Dense_./.*", "head/.*")), "head/.*"),
    ],
    ids=["second", "not_in_full", "exclude", "exclude_among", "among"],
)
def test_every_pattern_of_a_rule_must_match_something(rule, pattern):
    with pytest.raises(
        ValueError,
        match=rf'^mask_params: .*"{re.escape(pattern)}".* matched no parameter',
    ):
        scl_jax.mask_params({"Dense_0": dense()}, select=rule)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (kernels, "kernels"),
        (lambda path, leaf: False, "<lambda>"),
        (exclude("scale"), r'exclude\("scale"\)'),
    ],
    ids=["kernels", "user", "exclude"],
)
def test_rule_that_selects_nothing_is_an_error_that_lists_the_parameters(rule, name):
    match = f"^mask_params: {name} matched no parameter; parameters are: bias, scale$"
    with pytest.raises(ValueError, match=match):
        scl_jax.mask_params({"bias": VECTOR, "scale": VECTOR}, select=rule)


def test_error_names_the_rule_an_unmatched_pattern_stands_in():
    rule = exclude("kernel", among=select("kernel", "head"))
    with pytest.raises(ValueError, match=r'select\("kernel", "head"\)'):
        scl_jax.mask_params({"kernel": MATRIX}, select=rule)


@pytest.mark.parametrize("params", [{}, [], (), {"a": {}}, {"a": None}, None])
def test_empty_tree_is_refused(params):
    with pytest.raises(ValueError, match="mask_params: params has no leaves"):
        scl_jax.mask_params(params)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (np.zeros((2, 2), np.int32), "int32"),
        (np.zeros((2, 2), np.complex64), "complex64"),
        (np.zeros((2, 2), bool), "bool"),
        (jax.random.key(0), "key<fry>"),
        (1.0, "float"),
    ],
    ids=["int", "complex", "bool", "key", "number"],
)
def test_selected_leaf_that_is_no_floating_array_is_refused_by_path(leaf, found):
    params = {"layer": {"kernel": leaf}, "head": dense()}
    match = f"masked leaf must be a floating array, layer/kernel is {found}"
    with pytest.raises(TypeError, match=match):
        scl_jax.mask_params(params, select=select(".*/kernel"))
    # Where it is not selected, it may be there.
    masks = scl_jax.mask_params(params, select=select("head/kernel")).masks
    assert masks["layer"]["kernel"] is None


@pytest.mark.parametrize("rule", ["head/kernel", None, 3, ["head/kernel"]])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TypeError, match=r"select must be a rule .*scl_jax.kernels or"):
        scl_jax.mask_params({"head": dense()}, select=rule)


@pytest.mark.parametrize("make", [select, exclude])
def test_patterns_are_checked_when_the_rule_is_made(make):
    name = make.__name__
    with pytest.raises(ValueError, match=f"{name}: give at least one pattern"):
        make()
    with pytest.raises(TypeError, match=f"{name}: a pattern must be a string, got 3"):
        make("a", 3)
    match = f'{name}: "a\\(" is not a regular expression: missing'
    with pytest.raises(ValueError, match=match):
        make("a", "a(")


def test_exclude_refuses_to_take_from_what_is_no_rule():
    with pytest.raises(TypeError, match="among must be a rule"):
        exclude("head/.*", among="body/.*")
