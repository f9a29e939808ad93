"""The recipes: how little they change, that they train, and that masks are trained."""

import importlib

import jax
import numpy as np
import pytest

import scl_jax
from experiments.recipes.__main__ import PAGE, changes, names, render

NAMES = names()
MOST_LINES, STEPS, LEFT = 5, 160, 0.1


@pytest.mark.parametrize("name", NAMES)
def test_scl_takes_at_most_five_lines(name):
    diff = changes(name)
    added = [line for line in diff if line.startswith("+")]
    gone = [line for line in diff if line.startswith("-")]
    assert 2 <= len(added) <= MOST_LINES
    assert len(gone) <= len(added)
    assert any("scl_jax" in line for line in added)
    assert not any("scl" in line for line in gone)


def test_page_is_that_of_the_scripts():
    assert PAGE.read_text() == render()


def plain(params):
    """Return plain kernels by path, with what is pruned as zeros."""
    if isinstance(params, scl_jax.MaskedParams):
        params = scl_jax.fold_masks(params)
    leaves = jax.tree.leaves(params)
    return [np.asarray(x) for x in leaves if getattr(x, "ndim", 0) > 1]


@pytest.mark.parametrize("name", NAMES)
def test_both_train_and_scl_leaves_a_tenth_of_the_connections(name):
    dense, sparse = (
        importlib.import_module(f"experiments.recipes.{name}.{script}")
        for script in ("dense", "scl")
    )
    accuracy, params = dense.main(STEPS)
    assert accuracy > 0.8  # chance is 0.1
    assert all(np.all(kernel != 0) for kernel in plain(params))
    accuracy, params = sparse.main(STEPS)
    assert accuracy > 0.8
    kernels = plain(params)
    left = sum(np.count_nonzero(kernel) for kernel in kernels)
    assert left / sum(kernel.size for kernel in kernels) == pytest.approx(LEFT, rel=0.5)
