"""ImageNet's examples: which part of an image is seen, and what colour it has."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from experiments import imagenet
from experiments.idx import DataError
from experiments.imagenet import evaluation_example, training_example
from experiments.tfds_imagenet import Record


def record(image, **options):
    """Store an image as a JPEG, as exactly as a JPEG can."""
    file = io.BytesIO()
    options = {"quality": 100} | options
    image.save(file, "JPEG", **options)
    return Record(file.getvalue(), 7, "folder, split train, record 5")


def gradient(width, height):
    """Return an image that is red from left to right, green from top to bottom."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to((np.arange(height) + 0.5)[:, None] / height, red.shape)
    pixels = np.stack([red, green, 0.5 * np.ones_like(red)], -1)
    return record(
        Image.fromarray(np.round(255 * pixels).astype(np.uint8)), subsampling=0
    )


def seen(start, length, size):
    """Return what a gradient is at `size` pixels that share a part of its side."""
    return 255 * (start + (np.arange(size) + 0.5) * length / size)


def rng(seed):
    return np.random.default_rng(seed)


# Random crops


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_crop_is_in_the_image_and_of_a_permitted_shape(width, height, seed):
    left, upper, right, lower = imagenet.random_crop((width, height), rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    w, h = right - left, lower - upper
    # Each side is within a half of the exact one.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    assert (w - 0.5) * (h - 0.5) <= width * height
    # A part of 8 % fits whenever the image itself is not much too long.
    if max(width, height) < 8 * min(width, height):
        assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height


def test_random_crop_is_uniform():
    size = 1000
    boxes = np.array([imagenet.random_crop((size, size), rng(i)) for i in range(6000)])
    left, upper, right, lower = boxes.T
    w, h = right - left, lower - upper
    area, aspect = w * h / size**2, w / h
    # Up to 3/4 of a square, a box of every permitted shape fits: none is drawn again.
    always = area < 0.74
    for values, low, high in (
        (area[always], 0.08, 0.74),
        (aspect[always], 3 / 4, 4 / 3),
        ((left + 0.5) / (size - w + 1), 0, 1),
        ((upper + 0.5) / (size - h + 1), 0, 1),
    ):
        # Kolmogorov and Smirnov's distance; 1.63 / sqrt(n) is passed once in a hundred.
        rank = (np.arange(len(values)) + 0.5) / len(values)
        distance = np.abs((np.sort(values) - low) / (high - low) - rank).max()
        assert distance < 1.63 / np.sqrt(len(values))
    # The position and the shape have nothing to do with each other.
    numbers = np.stack([area, aspect, left / (size - w + 1), upper / (size - h + 1)])
    correlation = np.corrcoef(numbers[:, always])
    assert np.abs(correlation - np.eye(4)).max() < 0.05


def test_crop_of_an_image_that_is_too_long_is_its_center():
    # 8 % of it are 4,000 pixels: at least 55 high, and the image has 50.
    assert imagenet.random_crop((1000, 50), rng(0)) == (466, 0, 533, 50)
    assert imagenet.random_crop((50, 1000), rng(0)) == (0, 466, 50, 533)


# Training


@pytest.mark.parametrize("size", [8, 40, 100, 170, 400])
def test_training_example_is_the_crop_or_its_mirror_image(monkeypatch, size):
    # From the full size, and from 1/2, 1/4 and 1/8 of it.
    left, upper, right, lower = box = (101, 57, 513, 400)
    monkeypatch.setattr(imagenet, "random_crop", lambda size, rng: box)
    stored = gradient(643, 485)
    red = seen(left / 643, (right - left) / 643, size)
    green = seen(upper / 485, (lower - upper) / 485, size)
    mirrored = 0
    for seed in range(20):
        image, label = training_example(stored, rng(seed), image_size=size)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert (label.shape, label.dtype, int(label)) == ((), np.int32, 7)
        columns, rows = image[..., 0].mean(0), image[..., 1].mean(1)
        mirror = columns[0] > columns[-1]
        mirrored += mirror
        np.testing.assert_allclose(columns[::-1] if mirror else columns, red, atol=2.5)
        np.testing.assert_allclose(rows, green, atol=2.5)
        np.testing.assert_allclose(image[..., 2].mean(), 127.5, atol=1)
    assert 4 < mirrored < 16


@pytest.mark.parametrize(
    ("size", "scale"),
    [(344, 1), (343, 1), (172, 1), (171, 2), (85, 4), (43, 4), (42, 8)],
)
def test_image_is_decoded_no_smaller_than_the_crop_is_needed(monkeypatch, size, scale):
    monkeypatch.setattr(imagenet, "random_crop", lambda size, rng: (101, 57, 513, 400))
    decoded = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(image, mode, size):
        draft(image, mode, size)
        decoded.append(image.size)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    training_example(gradient(643, 485), rng(0), image_size=size)
    assert decoded == [(-(-643 // scale), -(-485 // scale))]


def test_crop_is_resized_as_pil_resizes_the_cut_out_image(monkeypatch):
    monkeypatch.setattr(imagenet, "random_crop", lambda size, rng: (10, 20, 110, 140))
    noise = np.random.RandomState(0).randint(0, 256, (150, 120, 3)).astype(np.uint8)
    stored = record(Image.fromarray(noise))
    cut = Image.open(io.BytesIO(stored.jpeg)).crop((10, 20, 110, 140))
    expected = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    image = training_example(stored, rng(0), image_size=64).inputs
    differences = [
        np.abs(x - expected)[2:-2, 2:-2].max() for x in (image, image[:, ::-1])
    ]
    # Pixels on the edge may know what is beyond it.
    assert min(differences) <= 1


def test_training_example_depends_on_the_generator_alone():
    stored = gradient(200, 150)
    first, again, other = (
        training_example(stored, rng(seed), image_size=16).inputs for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# Evaluation


@pytest.mark.parametrize(
    "size", [(300, 400), (400, 300), (500, 333), (20, 31), (64, 64)]
)
def test_evaluation_example_is_the_center(size):
    width, height = size
    image, label = evaluation_example(gradient(width, height), image_size=56)
    assert (image.shape, image.dtype) == ((56, 56, 3), np.uint8)
    assert (label.shape, label.dtype, int(label)) == ((), np.int32, 7)
    # 56 of the 64 pixels of the shorter side, and as many source pixels of the longer.
    side = min(size) * 56 / 64
    for values, length in ((image[0, :, 0], width), (image[:, 0, 1], height)):
        # Half a pixel of the result where the margin is odd, and its rounded length.
        slack = 2 + 255 * min(size) / 64 / length
        expected = seen((1 - side / length) / 2, side / length, 56)
        # The outermost pixels of an enlarged image have neighbours on one side only.
        np.testing.assert_allclose(values[2:-2], expected[2:-2], atol=slack)


@pytest.mark.parametrize("size", [(300, 400), (512, 300), (64, 80)])
def test_evaluation_example_equals_pil_without_the_whole_image(size):
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    stored = record(Image.fromarray(noise))
    pixels = Image.open(io.BytesIO(stored.jpeg))
    long = round(64 * max(size) / min(size))
    margins = [((64 if side == min(size) else long) - 56) // 2 for side in size]
    scales = [side / (64 if side == min(size) else long) for side in size]
    corners = [
        (margin + extent) * scale
        for extent in (0, 56)
        for margin, scale in zip(margins, scales, strict=True)
    ]
    expected = pixels.resize((56, 56), Image.Resampling.BILINEAR, box=tuple(corners))
    got = evaluation_example(stored, image_size=56).inputs.astype(int)
    np.testing.assert_allclose(got, np.asarray(expected), atol=1)


# Colours and damage


def decode(stored):
    """Return the example decoded for training and for evaluation."""
    return (
        training_example(stored, rng(0), image_size=12).inputs,
        evaluation_example(stored, image_size=12).inputs,
    )


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (200, 30, 90), (200, 30, 90)),
        ("L", 77, (77, 77, 77)),
        # Cyan, magenta, yellow and black ink: what they leave of 255.
        ("CMYK", (55, 225, 165, 0), (200, 30, 90)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("size", [(9, 7), (150, 100)])
def test_solid_colour_stays_that_colour(mode, colour, expected, size):
    for pixels in decode(record(Image.new(mode, size, colour))):
        assert pixels.shape == (12, 12, 3)
        np.testing.assert_allclose(
            pixels, np.broadcast_to(expected, (12, 12, 3)), atol=2
        )


def other_format():
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "jpeg",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(gradient(90, 60).jpeg[:20], id="truncated header"),
        pytest.param(gradient(90, 60).jpeg[:-400], id="truncated image"),
        pytest.param(other_format(), id="PNG"),
    ],
)
def test_unreadable_image_is_reported_with_its_place(jpeg):
    stored = Record(jpeg, 7, "folder, split train, record 5")
    message = (
        "^folder, split train, record 5: expected a readable JPEG, but got: .*again"
    )
    with pytest.raises(DataError, match=message):
        training_example(stored, rng(0), image_size=12)
    with pytest.raises(DataError, match=message):
        evaluation_example(stored, image_size=12)
