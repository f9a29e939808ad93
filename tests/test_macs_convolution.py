"""MACs of convolutions, against loops that multiply and count."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import assert_unknown, spec
from jax import lax

from scl_jax._macs import count_macs


def loop_convolution(x, kernel, strides, dilation, padding, groups=1, batch_groups=1):
    """Convolve N..C with ..IO by loops; return the result and the number of MACs."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    *taps, depth, features = kernel.shape
    n = x.shape[0] // batch_groups
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[1:-1], taps, strides, dilation, strict=True)
    ]
    y, macs = np.zeros((n, *out, features)), 0
    for index in np.ndindex(*y.shape):
        b, *position, f = index
        first = (f // (features // groups)) * depth
        b += (f // (features // batch_groups)) * n
        for tap in np.ndindex(*taps):
            at = [
                o * s + t * d
                for o, s, t, d in zip(position, strides, tap, dilation, strict=True)
            ]
            for c in range(depth):
                y[index] += x[(b, *at, first + c)] * kernel[(*tap, c, f)]
                macs += 1
    return y, macs


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def layout(rank):
    axes = "DHW"[-rank:]
    return (f"N{axes}C", f"{axes}IO", f"N{axes}C")


@pytest.mark.parametrize(
    ("size", "taps", "features", "strides", "dilation", "padding", "groups"),
    [
        ((7,), (3,), (2, 3), (1,), (1,), ((0, 0),), 1),
        ((8,), (3,), (4, 6), (2,), (2,), ((1, 2),), 2),
        ((5, 6), (3, 2), (2, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),
        ((5, 6), (3, 3), (2, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
        ((7, 6), (3, 2), (2, 2), (2, 3), (1, 1), ((1, 1), (0, 1)), 1),
        ((7, 7), (2, 3), (2, 2), (1, 1), (2, 3), ((0, 0), (0, 0)), 1),
        ((5, 4), (2, 2), (6, 4), (1, 2), (1, 1), ((0, 0), (1, 0)), 2),
        ((5, 4), (3, 3), (4, 4), (1, 1), (1, 1), ((1, 1), (1, 1)), 4),
        ((5, 4), (3, 3), (3, 6), (2, 1), (1, 1), ((1, 1), (1, 1)), 3),
        ((4, 3, 5), (2, 1, 3), (2, 2), (1, 1, 2), (1, 1, 1), ((0, 0),) * 3, 1),
        ((4, 4, 3), (2, 2, 2), (2, 4), (2, 1, 1), (1, 2, 1), ((1, 0),) * 3, 2),
    ],
)
def test_convolution_counts_the_multiplications_of_its_loops(
    size, taps, features, strides, dilation, padding, groups
):
    x = random(1, *size, features[0])
    kernel = random(*taps, features[0] // groups, features[1])

    def convolve(layout, w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    def channels_first(w, x):
        axes = "DHW"[-len(size) :]
        x, w = jnp.moveaxis(x, -1, 1), jnp.moveaxis(w, (-1, -2), (0, 1))
        return convolve((f"NC{axes}", f"OI{axes}", f"NC{axes}"), w, x)

    apply = partial(convolve, layout(len(size)))

    y, macs = loop_convolution(x, kernel, strides, dilation, padding, groups)
    np.testing.assert_allclose(apply(kernel, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, kernel, x) == macs
    assert count_macs(channels_first, kernel, x) == macs


def test_batch_groups_count_the_multiplications_of_their_loops():
    x, kernel = random(4, 5, 3), random(2, 3, 6)

    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (1,), ((0, 0),), dimension_numbers=layout(1), batch_group_count=2
        )

    y, macs = loop_convolution(x, kernel, (1,), (1,), ((0, 0),), batch_groups=2)
    np.testing.assert_allclose(apply(kernel, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, kernel, x) == macs


def loop_transposed_convolution(x, kernel, strides):
    """Scatter every input position through every tap; kernel ..IO, no padding."""
    *taps, depth, features = kernel.shape
    size = x.shape[1:-1]
    out = [(n - 1) * s + k for n, s, k in zip(size, strides, taps, strict=True)]
    y, macs = np.zeros((x.shape[0], *out, features)), 0
    for position, tap in itertools.product(np.ndindex(*size), np.ndindex(*taps)):
        at = [i * s + t for i, s, t in zip(position, strides, tap, strict=True)]
        for c, f in np.ndindex(depth, features):
            y[(0, *at, f)] += x[(0, *position, c)] * kernel[(*tap, c, f)]
            macs += 1
    return y, macs


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("size", "taps", "strides"),
    [((5,), (3,), (2,)), ((4, 3), (3, 2), (2, 1)), ((2, 3, 2), (2, 3, 3), (2, 2, 3))],
)
def test_transposed_convolution_counts_each_input_position_times_each_tap(
    size, taps, strides, transpose_kernel
):
    module = nn.ConvTranspose(
        3, taps, strides, padding="VALID", transpose_kernel=transpose_kernel
    )
    x = random(1, *size, 2)
    params = module.init(jax.random.key(0), x)["params"]
    kernel = np.asarray(params["kernel"])
    # Flax's kernel is ..IO and slides, so that it scatters flipped; or it is that of
    # the convolution which is transposed, ..OI, and scatters as it is.
    if transpose_kernel:
        kernel = np.swapaxes(kernel, -1, -2)
    else:
        kernel = np.flip(kernel, range(len(taps)))
    y, macs = loop_transposed_convolution(x, kernel, strides)

    def apply(p, x):
        return module.apply({"params": p}, x)

    # An axis of stride 1 is an ordinary convolution over a padded input.
    unit = [i for i, s in enumerate(strides) if s == 1]
    for i in unit:
        macs = macs // size[i] * (size[i] + taps[i] - 1)
    np.testing.assert_allclose(apply(params, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, params, x) == {"kernel": macs, "bias": 0}


def test_input_dilation_with_strides_is_unknown():
    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (2,), ((0, 0),), lhs_dilation=(2,), dimension_numbers=layout(1)
        )

    macs = count_macs(apply, spec(3, 2, 2), spec(1, 8, 2))
    assert_unknown(macs, "conv_general_dilated: ")
