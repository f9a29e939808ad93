"""What the package exports, imports and declares."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Array, Bool, Float, TypeCheckError, jaxtyped

import scl_jax

ROOT = Path(scl_jax.__file__).parents[1]


def run_python(code):
    """Run code in a fresh interpreter, warnings as errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_flax_nor_anything_of_the_experiments():
    code = """
import sys
import scl_jax
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    loaded = set(run_python(code).split())
    assert {"scl_jax", "jax", "optax", "numpy"} <= loaded
    unwanted = {"flax", "chex", "tensorflow_datasets", "tensorflow", "matplotlib"}
    unwanted |= {"experiments", "orbax", "tyro", "tqdm", "PIL"}
    assert not loaded & unwanted


def test_import_starts_no_jax_backend():
    # Users configure JAX (devices, precision) after they import what they use.
    code = """
import scl_jax
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run_python(code).split() == ["False"]


def test_public_names_are_sorted_and_exist():
    assert scl_jax.__all__ == sorted(scl_jax.__all__)
    assert len(set(scl_jax.__all__)) == len(scl_jax.__all__)
    for name in scl_jax.__all__:
        assert getattr(scl_jax, name).__doc__, name


def test_public_names_of_the_design_are_there():
    assert set(scl_jax.__all__) >= {
        "Clipped",
        "LeakyReLU",
        "MaskedParams",
        "ReLU",
        "Softplus",
        "add_connection_penalty",
        "apply_masks",
        "binary_masks",
        "connection_count",
        "exclude",
        "fold_masks",
        "identity",
        "keep_connections",
        "kernels",
        "mask_params",
        "nonpositive_intervals",
        "normalize_by_feature",
        "partition",
        "select",
        "unit_step",
    }


def test_nothing_public_is_left_out_of_all():
    public = {
        name
        for name, value in vars(scl_jax).items()
        if not name.startswith("_") and callable(value)
    }
    assert public <= set(scl_jax.__all__)


# Shapes and dtypes, checked by jaxtyping and beartype

checked = jaxtyped(typechecker=beartype)
# The same "*shape" wherever one of them stands in a signature.
Floats = Float[Array, "*shape"]
Bools = Bool[Array, "*shape"]
FloatScalar = Float[Array, ""]


@checked
def step(s: Floats) -> Floats:
    return scl_jax.unit_step(s, scl_jax.LeakyReLU(0.1))


@checked
def masks_of(w: Floats) -> Floats:
    return scl_jax.mask_params({"kernel": w}).masks["kernel"]


@checked
def applied(w: Floats, s: Floats) -> Floats:
    return scl_jax.apply_masks(scl_jax.MaskedParams({"w": w}, {"w": s}))["w"]


@checked
def folded(w: Floats, s: Floats) -> Floats:
    return scl_jax.fold_masks(scl_jax.MaskedParams({"w": w}, {"w": s}))["w"]


@checked
def binary(w: Floats, s: Floats) -> Bools:
    return scl_jax.binary_masks(scl_jax.MaskedParams({"w": w}, {"w": s}))["w"]


@checked
def counted(w: Floats, s: Floats) -> FloatScalar:
    return scl_jax.connection_count(scl_jax.MaskedParams({"w": w}, {"w": s}))


@checked
def normalized(g: Floats) -> Floats:
    tx = scl_jax.normalize_by_feature()
    return tx.update(g, tx.init(g))[0]


@checked
def penalized(g: Floats, s: Floats) -> Floats:
    tx = scl_jax.add_connection_penalty(0.1)
    return tx.update(g, tx.init(s), s)[0]


@checked
def guarded(u: Floats, s: Floats) -> Floats:
    tx = scl_jax.keep_connections(3)
    return tx.update(u, tx.init(s), s)[0]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 3, 2, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mask_dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes_are_those_declared(shape, dtype, mask_dtype):
    w, s = jnp.ones(shape, dtype), jnp.ones(shape, mask_dtype)
    assert step(s).dtype == mask_dtype
    assert masks_of(w).dtype == dtype
    assert normalized(s).dtype == mask_dtype
    assert penalized(w, s).dtype == guarded(-2 * w, s).dtype == dtype
    assert applied(w, s).dtype == folded(w, s).dtype == dtype
    assert counted(w, s).dtype == jnp.float32
    assert binary(w, s).dtype == jnp.bool_


def test_the_type_checker_is_on():
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        step(jnp.ones(2, jnp.int32))
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        applied(jnp.ones((2, 3)), jnp.ones((3, 2)))


def test_the_librarys_own_annotations_are_true():
    # Every annotation of the library is checked at run time, in a train step.
    code = """
from jaxtyping import install_import_hook
with install_import_hook("scl_jax", "beartype.beartype"):
    import scl_jax

import jax, jax.numpy as jnp, optax

params = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
steps = [scl_jax.identity, scl_jax.LeakyReLU(0.1), scl_jax.Softplus(2.0)]
for ste in [*steps, scl_jax.ReLU(), scl_jax.Clipped()]:
    masked = scl_jax.mask_params(
        params,
        select=scl_jax.exclude("layer/bias", among=scl_jax.select("layer/.*")),
        initial=lambda path, leaf: 0.1 * jnp.ones_like(leaf),
        dtype=jnp.bfloat16,
    )
    scl_jax.mask_params(params, initial=0.5)
    masks_tx = optax.chain(
        scl_jax.add_connection_penalty(0.1, ste=ste),
        scl_jax.add_connection_penalty(lambda step: 0.1 * step, ste=ste),
        scl_jax.normalize_by_feature((-1,), norm="l2"),
        scl_jax.normalize_by_feature(lambda path, leaf: -1),
        optax.sgd(0.1, 0.9),
        scl_jax.keep_connections(2),
    )
    tx = scl_jax.partition(optax.adamw(1e-3), masks_tx)

    @jax.jit
    def step(masked, state):
        def loss(masked):
            kernel = scl_jax.apply_masks(masked, ste=ste)["layer"]["kernel"]
            return kernel.sum() + scl_jax.connection_count(masked, ste=ste)

        updates, state = tx.update(jax.grad(loss)(masked), state, masked)
        return optax.apply_updates(masked, updates), state

    masked, state = step(masked, tx.init(masked))
    scl_jax.fold_masks(masked), scl_jax.binary_masks(masked)
    scl_jax.nonpositive_intervals(ste, -2.0, 2.0, points=9)

try:
    scl_jax.LeakyReLU("steep")
except Exception as error:
    print(type(error).__name__)
"""
    printed = run_python(code).split()
    assert printed, "the import hook was not on"
    assert printed != ["ValueError"], "the import hook was not on"
