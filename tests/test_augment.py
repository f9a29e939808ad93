"""Augmentation: which windows are taken, how often, and where it is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.augment import crop_and_flip


def numbered(count, height, width, channels=1):
    """Return images in which no two pixels are equal, and none is 0."""
    shape = (count, height, width, channels)
    return np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)


def windows(image, padding):
    """Return {(down, across, mirrored): window} of a padded image."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    plain = {
        (down, across, False): padded[down : down + height, across : across + width]
        for down in offsets
        for across in offsets
    }
    return plain | {(d, a, True): np.fliplr(w) for (d, a, _), w in plain.items()}


def choices(key, images, padding):
    """Return what was drawn for each image, found by comparing with every window."""
    out = np.asarray(crop_and_flip(key, jnp.asarray(images), padding=padding))
    drawn = []
    for before, after in zip(images, out, strict=True):
        places = {w.tobytes(): place for place, w in windows(before, padding).items()}
        assert len(places) == 2 * (2 * padding + 1) ** 2  # no two windows are equal
        drawn.append(places[after.tobytes()])
    return np.array(drawn)


@pytest.mark.parametrize(
    ("shape", "padding"), [((5, 7, 6, 3), 4), ((6, 3, 5, 1), 1), ((4, 6, 6, 2), 0)]
)
def test_every_image_is_a_window_of_its_padded_self_or_the_mirror(shape, padding):
    drawn = choices(jax.random.key(3), numbered(*shape), padding)
    assert drawn.shape == (shape[0], 3)


def test_offsets_are_uniform_and_half_are_mirrored_independently():
    drawn = choices(jax.random.key(0), numbered(4000, 4, 4), 1)
    # 4 standard deviations of the counts of 4,000 draws among 18.
    counts = np.zeros((3, 3, 2))
    np.add.at(counts, tuple(drawn.T), 1)
    np.testing.assert_allclose(counts, 4000 / 18, atol=4 * (4000 / 18) ** 0.5)


def test_default_moves_up_to_four_pixels_each_way():
    images = numbered(600, 5, 5)
    out = crop_and_flip(jax.random.key(1), jnp.asarray(images))
    np.testing.assert_array_equal(
        out, crop_and_flip(jax.random.key(1), jnp.asarray(images), padding=4)
    )
    drawn = choices(jax.random.key(1), images, 4)
    for offsets in drawn[:, :2].T:
        assert set(offsets) == set(range(9))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_shape_and_dtype_are_kept(dtype):
    images = jnp.ones((3, 28, 28, 1), dtype)
    out = jax.jit(crop_and_flip)(jax.random.key(0), images)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    # Zeros come in from the sides, and nothing else.
    assert set(np.unique(out.astype(jnp.float32))) == {0.0, 1.0}


def test_key_decides():
    images = jnp.asarray(numbered(16, 8, 8))
    first, again, other = (
        crop_and_flip(jax.random.key(seed), images) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_vmap_over_keys_is_a_loop_over_keys():
    images = jnp.asarray(numbered(4, 6, 6))
    keys = jax.random.split(jax.random.key(2), 3)
    together = jax.vmap(crop_and_flip, (0, None))(keys, images)
    for key, out in zip(keys, together, strict=True):
        np.testing.assert_array_equal(out, crop_and_flip(key, images))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_gives_the_same_without_communication(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    images, key = numbered(16, 8, 8, 3), jax.random.key(4)
    sharded = jax.device_put(images, sharding)
    compiled = jax.jit(crop_and_flip).lower(key, sharded).compile()
    out = compiled(key, sharded)
    np.testing.assert_array_equal(out, crop_and_flip(key, jnp.asarray(images)))
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
    assert re.findall(r"all-[a-z]+|collective-[a-z]+", compiled.as_text()) == []


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (1, 2, 28, 28, 1)])
def test_images_without_four_axes_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"\(B, H, W, C\), but .*" + re.escape(f"{shape}")
    ):
        crop_and_flip(jax.random.key(0), jnp.zeros(shape))


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="not be negative, not -1"):
        crop_and_flip(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), padding=-1)


def test_padding_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="float"):
        crop_and_flip(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), padding=1.5)
