"""How a state lies in memory: as the compiler wants it, whatever it came as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from experiments.layouts import compile_laid_out, laid_out
from experiments.mesh import by_shape, make_mesh

VALUES = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "step": np.int32(7)}


@pytest.fixture
def mesh():
    return make_mesh(1)


def make_state(mesh):
    return jax.device_put(jax.tree.map(jnp.asarray, VALUES), by_shape(mesh, VALUES))


def transposed(x):
    return jax.device_put(x, Format(Layout((1, 0)), x.sharding))


def step(state, x):
    new = {"kernel": state["kernel"] * x, "step": state["step"] + 1}
    return new, jnp.sum(state["kernel"])


def test_state_is_taken_however_it_lies_and_stays_as_it_is_wanted(mesh):
    ready = laid_out(step, mesh)
    x = jnp.float32(2)
    for change in (lambda kernel: kernel, transposed):
        state = make_state(mesh)
        state["kernel"] = change(state["kernel"])
        take, laid = ready(state, x)
        wanted = take.input_formats[0][0]["kernel"].layout
        assert laid["kernel"].format.layout == wanted
        # What has been laid out anew is not in memory twice.
        moved = state["kernel"] is not laid["kernel"]
        assert state["kernel"].is_deleted() == moved == (change is transposed)
        for factor in (2, 4):
            laid, seen = take(laid, x)
            assert laid["kernel"].format.layout == wanted
            np.testing.assert_array_equal(laid["kernel"], factor * VALUES["kernel"])
        assert (int(laid["step"]), float(seen)) == (9, 2 * VALUES["kernel"].sum())


def test_buffers_of_the_state_are_taken(mesh):
    take, state = laid_out(step, mesh)(make_state(mesh), jnp.float32(2))
    new, _ = take(state, jnp.float32(2))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert new["kernel"].sharding.is_equivalent_to(by_shape(mesh, new)["kernel"], 2)


def test_shapes_are_compiled_once(mesh):
    ready = laid_out(lambda state, x: step(state, jnp.sum(x)), mesh)
    shapes = (2,), (3,), (2,), (3,)
    two, three, *again = [ready(make_state(mesh), jnp.ones(x))[0] for x in shapes]
    assert two is not three
    # Tracing is remembered by JAX, too: that it is the same program says more.
    assert again[0] is two
    assert again[1] is three


def test_shapes_are_enough_to_compile(mesh):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), VALUES)
    take = compile_laid_out(step, mesh, shapes, jax.ShapeDtypeStruct((), jnp.float32))
    new, _ = take(make_state(mesh), jnp.float32(3))
    np.testing.assert_array_equal(new["kernel"], 3 * VALUES["kernel"])
