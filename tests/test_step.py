"""The unit step is exact, and its gradient is the estimator's, nothing else."""

import dataclasses
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scl_jax
from scl_jax import Clipped, LeakyReLU, ReLU, Softplus, identity, unit_step

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
F32, BF16, F16 = DTYPES


def cauchy(s):
    """A user's own estimator: 1 / (1 + s**2), positive everywhere."""
    return 1 / (1 + s * s)


# Each estimator beside its proxy gradient, written again in NumPy.
PROXIES = [
    (identity, np.ones_like),
    (LeakyReLU(0.2), lambda s: np.where(s < 0, 0.2, 1.0)),
    (Softplus(3.0), lambda s: 1 / (1 + np.exp(-3.0 * s))),
    (ReLU(), lambda s: (s >= 0).astype(s.dtype)),
    (Clipped(), lambda s: ((s >= -1) & (s <= 1)).astype(s.dtype)),
    (cauchy, lambda s: 1 / (1 + s**2)),
]
IDS = ["identity", "leaky", "softplus", "relu", "clipped", "user"]


def finite_arrays(dtype):
    """Any finite numbers of a dtype, made from its bits."""
    info = jnp.finfo(dtype)
    bits = np.dtype(f"uint{info.bits}")

    def as_floats(pattern):
        values = pattern.view(jnp.dtype(dtype))
        return np.where(np.isfinite(values.astype(np.float64)), values, info.max)

    patterns = hnp.arrays(bits, 64, elements=st.integers(0, 2**info.bits - 1))
    return patterns.map(as_floats).map(lambda values: values.astype(dtype))


def assert_exact_step(s, h):
    assert h.dtype == s.dtype
    assert h.shape == s.shape
    s64, h64 = np.asarray(s).astype(np.float64), np.asarray(h).astype(np.float64)
    assert set(np.unique(h64)) <= {0.0, 1.0}
    # XLA on CPU reads a subnormal as zero: there 0 and 1 are both right.
    normal = (np.abs(s64) >= float(jnp.finfo(s.dtype).tiny)) | (s64 == 0)
    np.testing.assert_array_equal(h64[normal], (s64[normal] >= 0).astype(np.float64))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_is_exactly_zero_or_one_for_any_finite_number(dtype, transform):
    step = transform(unit_step)

    @hypothesis.given(finite_arrays(dtype))
    def check(s):
        assert_exact_step(s, step(jnp.asarray(s)))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ste", "_"), PROXIES, ids=IDS)
def test_step_is_exact_at_the_extremes_with_every_estimator(ste, _, dtype):
    info = jnp.finfo(dtype)
    extremes = [0.0, 300, float(info.tiny), float(info.smallest_subnormal)]
    extremes += [float(info.max), float(info.eps), 1.0, 256.0, 257.0, 65504.0]
    s = jnp.asarray([*extremes, *(-x for x in extremes)], dtype)
    # Inside value_and_grad the primal is computed by the forward rule.
    h, _ = jax.vjp(lambda s: unit_step(s, ste), s)
    assert_exact_step(s, h)
    assert_exact_step(s, unit_step(s, ste))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_is_connected(dtype):
    zeros = jnp.asarray([0.0, -0.0], dtype)
    assert np.signbit(np.asarray(zeros)).tolist() == [False, True]
    assert unit_step(zeros).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nan_stays_nan(dtype, transform):
    s = jnp.asarray([jnp.nan, -jnp.nan, 1.0, -1.0], dtype)
    h = np.asarray(transform(unit_step)(s)).astype(np.float32)
    np.testing.assert_array_equal(h, [np.nan, np.nan, 1.0, 0.0])


def test_infinity_is_a_side_of_the_threshold():
    assert unit_step(jnp.array([jnp.inf, -jnp.inf])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_step_keeps_the_shape(shape):
    assert unit_step(jnp.ones(shape)).shape == shape


def test_step_takes_a_python_number_and_a_numpy_array():
    assert float(unit_step(-0.5)) == 0.0
    assert unit_step(np.float32([-1, 1])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("ste", "proxy"), PROXIES, ids=IDS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradient_is_the_cotangent_times_the_proxy(ste, proxy, transform):
    rng = np.random.default_rng(0)
    s = np.concatenate([rng.normal(0, 2, 60), [0.0, -0.0, 1.0, -1.0]])
    s = s.astype(np.float32)
    cotangent = rng.normal(size=s.shape).astype(np.float32)

    def loss(s):
        return jnp.sum(cotangent * unit_step(s, ste))

    got = transform(jax.grad(loss))(jnp.asarray(s))
    expected = cotangent.astype(np.float64) * proxy(s.astype(np.float64))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ste", "proxy"), PROXIES, ids=IDS)
def test_gradient_has_the_dtype_of_the_mask_variable(ste, proxy, dtype):
    s = jnp.asarray([-2.0, -0.5, 0.0, 0.5, 2.0], dtype)
    got = jax.grad(lambda s: unit_step(s, ste).sum())(s)
    assert got.dtype == dtype
    expected = proxy(np.asarray(s).astype(np.float64))
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), expected, rtol=rtol)


def test_estimator_that_returns_float32_is_cast_to_the_mask_variables_dtype():
    def float32(s):
        return jnp.full(s.shape, 0.5, jnp.float32)

    s = jnp.ones(3, jnp.bfloat16)
    gradient = jax.grad(lambda s: unit_step(s, float32).sum())(s)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (LeakyReLU(0.1), LeakyReLU(0.1), LeakyReLU(0.2)),
        (Softplus(2.0), Softplus(2.0), Softplus(4.0)),
        (ReLU(), ReLU(), Clipped()),
        (Clipped(), Clipped(), ReLU()),
    ],
    ids=["leaky", "softplus", "relu", "clipped"],
)
def test_estimators_are_equal_by_content(one, same, other):
    assert one is not same
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2


def test_estimators_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LeakyReLU(0.1).negative_slope = 0.2  # pyright: ignore


def test_rebuilding_an_estimator_does_not_recompile():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient_closed_over(s):
        return jax.grad(lambda s: unit_step(s, LeakyReLU(0.1)).sum())(s)

    @chex.assert_max_traces(n=1)
    def gradient(s, ste):
        return jax.grad(lambda s: unit_step(s, ste).sum())(s)

    chex.clear_trace_counter()
    jitted = jax.jit(gradient, static_argnames="ste")
    for _ in range(3):
        jitted(jnp.ones(3), ste=LeakyReLU(0.1))
        gradient_closed_over(jnp.ones(3))
    with pytest.raises(AssertionError, match="traced"):
        jitted(jnp.ones(3), ste=LeakyReLU(0.2))


@pytest.mark.parametrize(
    "ste",
    ["leaky", None, 0.1, LeakyReLU, np.ones(2)],
    ids=["str", "none", "number", "class", "array"],
)
def test_what_is_no_estimator_is_refused(ste):
    match = "unit_step: ste must be a hashable callable.*LeakyReLU"
    with pytest.raises(TypeError, match=match):
        unit_step(jnp.ones(2), ste)


@dataclasses.dataclass(frozen=True)
class Table:
    """Frozen, and so declared hashable; its hash fails on the list inside."""

    values: list

    def __call__(self, s):
        return jnp.ones_like(s)


@dataclasses.dataclass  # with eq and not frozen: __hash__ is None
class Mutable:
    def __call__(self, s):
        return jnp.ones_like(s)


@pytest.mark.parametrize("ste", [Mutable(), Table([1.0])], ids=["mutable", "table"])
def test_unhashable_estimator_is_refused(ste):
    with pytest.raises(TypeError, match="unit_step: ste must be a hashable callable"):
        unit_step(jnp.ones(2), ste)


def test_proxy_gradient_of_another_shape_is_refused():
    def total(s):
        return s.sum()

    with pytest.raises(ValueError, match=r"total.*shape of its argument, \(3,\).*\(\)"):
        jax.grad(lambda s: unit_step(s, total).sum())(jnp.ones(3))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_step_of_what_is_not_floating_is_refused(dtype):
    with pytest.raises(TypeError, match=f"x must be floating, got dtype {dtype.dtype}"):
        unit_step(jnp.ones(2, dtype))


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, "0.1", None])
@pytest.mark.parametrize(
    ("make", "name"),
    [(LeakyReLU, "LeakyReLU: negative_slope"), (Softplus, "Softplus: sharpness")],
)
def test_parameters_that_are_not_positive_and_finite_are_refused(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive finite number"):
        make(value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int32(1)])
def test_parameters_may_be_numpy_scalars(value):
    gradient = jax.grad(lambda s: unit_step(s, LeakyReLU(value)))(-1.0)
    assert float(gradient) == float(value)


@pytest.mark.parametrize(
    "ste",
    [identity, LeakyReLU(0.01), Softplus(4.0), cauchy],
    ids=["identity", "leaky", "softplus", "user"],
)
def test_positive_estimators_have_no_nonpositive_interval(ste):
    assert scl_jax.nonpositive_intervals(ste) == ()


def bump(s):
    """Zero on (-2, -1), NaN beyond 3 and negative in between."""
    p = jnp.where((s > -2) & (s < -1), 0.0, 1.0)
    return jnp.where(s > 3, jnp.nan, p) - 2.0 * (s == 0)


@pytest.mark.parametrize(
    ("ste", "expected"),
    [
        (ReLU(), ((-4.0, -0.5),)),
        (Clipped(), ((-4.0, -1.5), (1.5, 4.0))),
        (bump, ((-1.5, -1.5), (0.0, 0.0), (3.5, 4.0))),
        (jnp.zeros_like, ((-4.0, 4.0),)),
    ],
    ids=["relu", "clipped", "user", "zero"],
)
def test_nonpositive_intervals_are_those_of_the_estimator(ste, expected):
    assert scl_jax.nonpositive_intervals(ste, -4.0, 4.0, points=17) == expected


def test_nonpositive_intervals_look_at_ten_on_both_sides_by_default():
    [(first, last)] = scl_jax.nonpositive_intervals(ReLU())
    assert first == -10.0
    assert -1e-2 < last < 0.0


@pytest.mark.parametrize(
    "arguments",
    [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (-math.inf, 1.0), (0.0, math.inf)],
)
def test_nonpositive_intervals_refuses_an_empty_or_infinite_range(arguments):
    with pytest.raises(ValueError, match="low < high must be finite and points >= 2"):
        scl_jax.nonpositive_intervals(identity, *arguments)


def test_nonpositive_intervals_refuses_what_it_cannot_call_or_count():
    with pytest.raises(ValueError, match=r"points >= 2, got .*points=1"):
        scl_jax.nonpositive_intervals(identity, -1.0, 1.0, points=1)
    with pytest.raises(TypeError, match="nonpositive_intervals: ste must be"):
        scl_jax.nonpositive_intervals("leaky")  # pyright: ignore
    with pytest.raises(ValueError, match="proxy gradient of the shape"):
        scl_jax.nonpositive_intervals(jnp.sum)
