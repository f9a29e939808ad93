"""ImageNet as batches of bytes: read from TFDS records, cropped and batched by Grain.

The set is too large to decode once and keep, as `experiments.data` does. It is read
by random access, and everything random about an example follows from the seed and
from the example's place in the training run: a resumed run goes on where it stopped
without reading what came before.

Source: Russakovsky et al., arXiv 1409.0575 (ImageNet); Szegedy et al., arXiv
1409.4842 (the training crops); the evaluation crop is the customary one.
"""

import copy
import functools
import io
import math
import operator
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags
from PIL import Image

from experiments.config import Config
from experiments.data import ABOUT, NO_EXAMPLES, Dataset, Split
from experiments.tfds_imagenet import Record, Records, reported

# Our split -> the one of TFDS it is read from. ImageNet's own test labels are secret.
SPLITS = {"train": "train", "validation": "train", "test": "validation"}


def random_crop(
    size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the part of an image to train on.

    Args:
        size: Width and height of the image, in pixels.
        rng: Where the draw comes from.

    Returns:
        Left, upper, right and lower edge. The box covers from 8 % to 100 % of the
        image, its width is from 3/4 to 4/3 of its height (both up to the rounding of
        its sides) and both are uniform, as is its position, among the boxes that fit.
        Of ten draws the first that fits is taken; if none does, the largest centered
        box of a permitted shape.

    Source: Szegedy et al., arXiv 1409.4842, section 6. That the aspect ratio is
    uniform, not its logarithm, and what follows ten failures are our choices.
    """
    width, height = size
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        aspect = rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            upper = int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def training_example(
    record: Record, rng: np.random.Generator, *, image_size: int
) -> Split:
    """Decode a random crop, and mirror every other one.

    Args:
        record: The stored example.
        rng: Where the crop and the side come from.
        image_size: Width and height of the result, in pixels.

    Returns:
        inputs uint8 (image_size, image_size, 3), RGB; labels int32 ().

    Raises:
        DataError: The image is no readable JPEG.
    """
    with reported(record.place, "a readable JPEG"):
        image = Image.open(io.BytesIO(record.jpeg), formats=["JPEG"])
        width, height = image.size
        left, upper, right, lower = random_crop(image.size, rng)
        # A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size. Never below the size
        # of the result: the crop would be blurred.
        surplus = min(right - left, lower - upper) // image_size
        scale = max(s for s in (1, 2, 4, 8) if s <= max(surplus, 1))
        image.draft("RGB", (width // scale, height // scale))
        image = image.convert("RGB")
    box = (left / scale, upper / scale, right / scale, lower / scale)
    image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Split(np.asarray(image), np.asarray(record.label, np.int32))


def evaluation_example(record: Record, *, image_size: int) -> Split:
    """Decode an image's center.

    Args:
        record: The stored example.
        image_size: Width and height of the result, in pixels. The image is resized
            until its shorter side has 256/224 of it, and its center is cut out.

    Returns:
        inputs uint8 (image_size, image_size, 3), RGB; labels int32 ().

    Raises:
        DataError: The image is no readable JPEG.
    """
    with reported(record.place, "a readable JPEG"):
        # In full, unlike the training crops: accuracies are compared between papers.
        image = Image.open(io.BytesIO(record.jpeg), formats=["JPEG"]).convert("RGB")
    ratio = round(image_size * 256 / 224) / min(image.size)
    width, height = (round(side * ratio) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, upper = (width - image_size) // 2, (height - image_size) // 2
    image = image.crop((left, upper, left + image_size, upper + image_size))
    return Split(np.asarray(image), np.asarray(record.label, np.int32))


def open_streams(config: Config, data_dir: str | None, workers: int = 8) -> Dataset:
    """Return the streams of a config, in the places of its splits.

    Args:
        config: The experiment; of several processes, each gets its part.
        data_dir: Folder of prepared TFDS data sets, as for `Stream`.
        workers: Processes that decode, for each stream that is being read.
    """

    def stream(split: str) -> Stream:
        return Stream(
            split,
            batch_size=config.batch_size,
            image_size=config.image_size or ABOUT[config.dataset].shape[0],
            validation=config.validation,
            data_dir=data_dir,
            part=(jax.process_index(), jax.process_count()),
            workers=workers,
        )

    held_out = stream("validation") if config.validation else NO_EXAMPLES
    return Dataset(stream("train"), held_out, stream("test"))


class Stream:
    """Batches of one split of ImageNet.

    A batch is the same, bit for bit, in every run with the same pillow, NumPy and
    Grain, whatever the number of workers; the processes of a run share the rows of
    the batch that one process would have: process i of n has the rows i, i + n, ...

    Worker processes are spawned: they import the main script, so that a script that
    uses them must start its work under `if __name__ == "__main__"`. They hand over
    the batches in shared memory (/dev/shm), which needs room for two of each worker
    and those in use. An iterator that is closed, exhausted or dropped ends them.

    Args:
        split: "train" (TFDS's training split but for the validation examples),
            "validation" (its last examples: TFDS shuffles when it prepares, so this
            is a random sample) or "test" (ImageNet's official validation split).
        batch_size: Rows of a batch over all processes.
        image_size: Width and height of the images, in pixels.
        seed: Seed of the order and of the crops in training.
        validation: Number of examples cut from the training split.
        data_dir: Folder of prepared TFDS data sets; None for TFDS's default,
            TFDS_DATA_DIR or ~/tensorflow_datasets.
        part: Index of this process, and number of processes.
        workers: Number of processes that decode; with 0, a thread of this one does.

    Attributes:
        examples: Number of examples of the split.
        steps: Number of batches of an epoch. In training, only full ones: what is
            left over differs from epoch to epoch. Otherwise the last is padded.

    Raises:
        ValueError: The split is unknown, a number is out of range, the processes
            cannot share a batch evenly, or the training split has not one full batch.
        DataError: The prepared data set is absent or damaged.
    """

    def __init__(
        self,
        split: str,
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        validation: int = 0,
        data_dir: str | None = None,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(
                f"Stream: split must be one of {', '.join(SPLITS)}, not {split!r}"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size", image_size, 1),
            ("seed", seed, 0),
            ("validation", validation, 0),
            ("workers", workers, 0),
        ):
            if operator.index(value) < least:
                raise ValueError(
                    f"Stream: {name} must be at least {least}, not {value}"
                )
        index, count = part
        if not 0 <= index < count or batch_size % count:
            raise ValueError(
                "Stream: part must be an index below a number of processes that "
                f"divides batch_size, {batch_size}, but it is {part}"
            )
        records = Records(SPLITS[split], data_dir)
        if SPLITS[split] == "train" and validation >= len(records):
            raise ValueError(
                f"Stream: validation must be less than the {len(records)} examples of "
                f"the training split, not {validation}"
            )
        stored = grain.MapDataset.source(records)
        cut = len(records) - validation
        if split == "train":
            self.examples = cut
            self.steps = cut // batch_size
            if not self.steps:
                raise ValueError(
                    f"Stream: batch_size must be at most the {cut} examples of the "
                    f"train split, not {batch_size}"
                )
            transform = functools.partial(training_example, image_size=image_size)

            def rows(seed):
                # Cut to full batches before it is repeated: no batch has rows of two
                # epochs. Grain shuffles each anew, and draws by place in all of them.
                epoch = stored[:cut].seed(seed).shuffle()[: self.steps * batch_size]
                return epoch.repeat().random_map(transform)

            self._rows_of = rows
        else:
            chosen = stored[cut:] if split == "validation" else stored
            self.examples = len(chosen)
            self.steps = -(-self.examples // batch_size)
            transform = functools.partial(evaluation_example, image_size=image_size)
            nothing = Split(
                np.zeros((image_size, image_size, 3), np.uint8),
                np.asarray(-1, np.int32),
            )
            padding = [nothing] * (self.steps * batch_size - self.examples)
            in_order = grain.MapDataset.concatenate(
                [chosen.map(transform), grain.MapDataset.source(padding)]
            )
            self._rows_of = lambda seed: in_order
        self._rows = self._rows_of(seed)
        self._batch_size, self._part, self._workers = batch_size, part, workers

    def reseeded(self, seed: int) -> "Stream":
        """Return this stream with the order and the crops of another seed."""
        other = copy.copy(self)
        other._rows = self._rows_of(seed)
        return other

    def batches(self, start: int = 0) -> Iterator[Split]:
        """Iterate over this process's rows of the batches.

        Args:
            start: Number of the first batch, counted from the beginning of the
                training run. What is skipped is not read.

        Returns:
            In training, batches without end. Otherwise every example once, in order,
            the last batch padded with black images of label -1. inputs are uint8
            (batch_size / processes, image_size, image_size, 3), RGB, and labels int32
            (batch_size / processes,).

        Raises:
            ValueError: start is negative.
            DataError: A record is damaged; raised by the iterator.
        """
        if operator.index(start) < 0:
            raise ValueError(f"Stream.batches: start must be at least 0, not {start}")
        index, count = self._part
        rows = self._rows[start * self._batch_size + index :: count]
        batches = rows.batch(self._batch_size // count)
        if not self._workers:
            # Grain's default of 500 elements ahead is meant for examples, not batches.
            return iter(batches.to_iter_dataset(grain.ReadOptions(1, 2)))
        # Grain asks absl for flags here; nobody parses any where the program uses tyro.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # No thread in a worker, and no worker without a batch.
        options = grain.MultiprocessingOptions(min(self._workers, max(len(batches), 1)))
        reading = batches.to_iter_dataset(grain.ReadOptions(0, 0))
        return iter(reading.mp_prefetch(options))
