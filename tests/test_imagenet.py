"""The ImageNet stream: which rows come in which batch, and what damage says."""

import io
import itertools
import multiprocessing
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.idx import DataError
from experiments.imagenet import Stream
from experiments.tfds_imagenet import Records

TRAIN, TEST = 37, 11


def example(number, label):
    """Return an example whose colour and size follow from its number."""
    colour = ((7 * number) % 256, (50 * number) % 256, (90 + 30 * number) % 256)
    file = io.BytesIO()
    image = Image.new("RGB", (20 + 3 * number, 60 - number), colour)
    image.save(file, "JPEG", quality=90)
    return {
        "image": file.getvalue(),
        "label": label,
        "file_name": f"n{number:08}_{label}.JPEG",
    }


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepare what the stock builder does, from made-up images, without TensorFlow."""

    VERSION = tfds.core.Version("5.1.0")
    change = staticmethod(lambda split, example: example)

    def _info(self):
        names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=names),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        # A label tells its example: 0 to 36 in training, 100 to 110 in the test split.
        return {
            "train": self._generate_examples("train", range(TRAIN)),
            "validation": self._generate_examples("validation", range(100, 100 + TEST)),
        }

    def _generate_examples(self, split, labels):
        for number, label in enumerate(labels):
            yield f"{number}", self.change(split, example(number, label))


def prepare(folder):
    tfds.disable_progress_bar()
    builder = Imagenet2012(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def copy(data_dir, tmp_path):
    """Return a folder of the prepared set that a test may damage."""
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path / "imagenet2012" / "5.1.0"


def stream(data_dir, split="train", **options):
    options = {"batch_size": 8, "image_size": 8, "data_dir": data_dir} | options
    return Stream(split, **options)


def take(stream, number, start=0):
    return list(itertools.islice(stream.batches(start), number))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs, strict=True)
        np.testing.assert_array_equal(a.labels, b.labels, strict=True)


def labels(batches):
    return np.concatenate([batch.labels for batch in batches]).tolist()


# Training


def test_training_batches_are_full_and_hold_the_examples_images(data_dir):
    training = stream(data_dir)
    assert (training.steps, training.examples) == (4, 37)
    for batch in take(training, 6):
        assert batch.inputs.shape == (8, 8, 8, 3)
        assert batch.inputs.dtype == np.uint8
        assert batch.labels.shape == (8,)
        assert batch.labels.dtype == np.int32
        for image, label in zip(batch.inputs, batch.labels.tolist(), strict=True):
            jpeg = Image.open(io.BytesIO(example(label, label)["image"]))
            colour = np.asarray(jpeg.convert("RGB"))[0, 0]
            np.testing.assert_array_equal(image, np.broadcast_to(colour, (8, 8, 3)))


def test_same_seed_gives_the_same_batches_and_another_others(data_dir):
    first = take(stream(data_dir, seed=3), 5)
    assert_equal(first, take(stream(data_dir, seed=3), 5))
    assert labels(first) != labels(take(stream(data_dir, seed=4), 5))
    assert_equal(first, take(stream(data_dir, seed=4).reseeded(3), 5))


@pytest.mark.parametrize("start", [1, 4, 7, 1001])
def test_resumed_stream_goes_on_with_the_same_batches(gradients, start):
    # From the same place, reached with and without what comes before it.
    before = start % 5
    first = take(stream(gradients), before + 2, start - before)
    assert_equal(first[before:], take(stream(gradients), 2, start))


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Prepare images that show where they were cropped."""
    x, y = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8)).save(file, "JPEG")
    with pytest.MonkeyPatch.context() as patch:
        change = staticmethod(lambda split, old: old | {"image": file.getvalue()})
        patch.setattr(Imagenet2012, "change", change)
        return prepare(tmp_path_factory.mktemp("gradients"))


def test_every_epoch_is_another_permutation(data_dir):
    training = stream(data_dir, batch_size=TRAIN)
    assert training.steps == 1
    epochs = [batch.labels.tolist() for batch in take(training, 5)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(TRAIN))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    # Grain numbers the epochs' seeds on: a run must not follow its neighbour's order.
    following = take(stream(data_dir, batch_size=TRAIN, seed=1), 1)
    assert labels(following) not in epochs


def test_epochs_share_no_batch_and_drop_other_examples(data_dir):
    training = stream(data_dir)
    epochs = [
        labels(take(training, training.steps, epoch * training.steps))
        for epoch in range(6)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 32
    assert len({frozenset(epoch) for epoch in epochs}) == 6


def test_example_is_cropped_anew_in_every_epoch(gradients):
    seen = [
        batch.inputs[batch.labels.tolist().index(0)]
        for batch in take(stream(gradients, batch_size=TRAIN), 4)
    ]
    assert len({image.tobytes() for image in seen}) == 4


def test_examples_of_a_batch_are_cropped_differently(gradients):
    (batch,) = take(stream(gradients, batch_size=TRAIN), 1)
    assert len({image.tobytes() for image in batch.inputs}) == TRAIN


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_processes_share_the_rows_of_the_batch_of_one(gradients, split):
    options = {"split": split, "validation": 13, "seed": 5}
    whole = take(stream(gradients, **options), 4, start=1)
    parts = [
        take(stream(gradients, part=(index, 4), **options), 4, start=1)
        for index in range(4)
    ]
    for index, part in enumerate(parts):
        rows = [batch._make(x[index::4] for x in batch) for batch in whole]
        assert_equal(part, rows)


def test_workers_change_nothing_and_end_with_the_iterator(gradients):
    batches = stream(gradients, workers=2).batches(start=3)
    got = list(itertools.islice(batches, 3))
    assert_equal(got, take(stream(gradients), 3, start=3))
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []
    # More of them than batches: one worker for the only one.
    test = {"split": "test", "batch_size": 12}
    got = list(stream(gradients, workers=3, **test).batches())
    assert_equal(got, list(stream(gradients, **test).batches()))


# Validation and test


def test_training_and_validation_share_out_the_training_split(data_dir):
    validation = stream(data_dir, "validation", validation=5, batch_size=5)
    held_out = labels(validation.batches())
    training = stream(data_dir, validation=5, batch_size=32)
    trained = labels(take(training, 1))
    assert (training.examples, validation.examples) == (32, 5)
    assert sorted(held_out + trained) == list(range(TRAIN))
    records = Records("train", data_dir)
    assert held_out == [records[index].label for index in range(32, 37)]


def test_validation_of_no_example_is_an_empty_stream(data_dir):
    empty = stream(data_dir, "validation")
    assert (empty.steps, empty.examples, list(empty.batches())) == (0, 0, [])


def test_test_split_comes_once_in_order_and_is_padded(data_dir):
    test = stream(data_dir, "test")
    batches = list(test.batches())
    assert (test.steps, test.examples, len(batches)) == (2, 11, 2)
    records = Records("validation", data_dir)
    stored = [records[index].label for index in range(TEST)]
    assert sorted(stored) == list(range(100, 111))
    assert labels(batches) == stored + 5 * [-1]
    last = batches[-1]
    assert last.inputs.shape == (8, 8, 8, 3)
    assert (last.inputs.dtype, last.labels.dtype) == (np.uint8, np.int32)
    assert not last.inputs[3:].any()
    assert all(image.any() for image in last.inputs[:3])


def test_last_batch_that_is_full_is_not_padded(data_dir):
    assert -1 not in labels(stream(data_dir, "test", batch_size=11).batches())


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "one of train, validation, test, not 'dev'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"image_size": 0}, "image_size must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"validation": -1}, "validation must be at least 0, not -1"),
        ({"validation": 37}, "less than the 37 examples .* not 37"),
        ({"batch_size": 38}, "at most the 37 examples .* not 38"),
        ({"batch_size": 33, "validation": 5}, "at most the 32 examples .* not 33"),
        ({"part": (0, 3)}, r"divides batch_size, 8, but it is \(0, 3\)"),
        ({"part": (2, 2)}, r"index below .* \(2, 2\)"),
        ({"part": (-1, 2)}, r"index below .* \(-1, 2\)"),
    ],
)
def test_argument_out_of_range_is_refused(data_dir, options, message):
    with pytest.raises(ValueError, match=message):
        stream(data_dir, **options)


def test_start_below_zero_is_refused_before_iterating(data_dir):
    with pytest.raises(ValueError, match="start must be at least 0, not -1"):
        stream(data_dir).batches(-1)


# Damage


def test_absent_data_set_names_the_ways_to_get_it(tmp_path):
    with pytest.raises(DataError) as raised:
        stream(str(tmp_path))
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path / 'imagenet2012'}: expected",
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        "tfds build imagenet2012 --file_format=array_record",
        f"--data_dir={tmp_path}",
        f"TFDS_DATA_DIR, here {tmp_path}",
    ):
        assert part in message


def test_newest_complete_version_is_read(copy):
    for name in ("5.0.0", "incomplete.5.2.0"):
        (copy.parent / name).mkdir()
    copy.rename(copy.parent / "5.10.0")
    assert stream(str(copy.parents[1])).examples == TRAIN


SHARD = "imagenet2012-train.array_record-00000-of-00001"
INFO = "dataset_info.json"


@pytest.mark.parametrize(
    ("file", "change", "place"),
    [
        (SHARD, lambda b: b"", r", record \d+"),
        (SHARD, lambda b: b[:9999], r", record \d+"),
        (SHARD, lambda b: b[:999] + bytes(99) + b[1098:], r", record \d+"),
        (INFO, lambda b: b.replace(b'"37"', b'"38"'), ", record 37"),
        (INFO, lambda b: b"{", ""),
        (INFO, lambda b: b.replace(b"array_", b"tf"), ""),
        (INFO, lambda b: b.replace(b'"train"', b'"x"'), ""),
    ],
    ids=["empty", "torn", "garbled", "shorter", "no info", "other format", "no split"],
)
def test_damaged_data_set_is_reported_with_its_place(copy, file, change, place):
    (copy / file).write_bytes(change((copy / file).read_bytes()))
    message = f"^{copy}, split train{place}: expected .* but got: .*again"
    with pytest.raises(DataError, match=message):
        take(stream(str(copy.parents[1]), batch_size=37), 2)


def test_image_that_a_worker_cannot_read_is_reported(monkeypatch, tmp_path):
    def garble(split, example):
        return example | ({"image": b"garbage"} if example["label"] == 104 else {})

    monkeypatch.setattr(Imagenet2012, "change", staticmethod(garble))
    test = stream(prepare(tmp_path), "test", batch_size=11, workers=1)
    records = Records("validation", str(tmp_path))
    (bad,) = [index for index in range(TEST) if records[index].label == 104]
    place = f"{tmp_path}/imagenet2012/5.1.0, split validation, record {bad}: "
    with pytest.raises(DataError, match=f"^{place}expected a readable JPEG"):
        list(test.batches())


@pytest.mark.parametrize("label", [-1, 1000])
def test_label_that_is_no_class_is_reported(monkeypatch, copy, label):
    records = Records("train", str(copy.parents[1]))
    monkeypatch.setattr(records, "_source", [{"image": b"", "label": label}])
    with pytest.raises(DataError, match=rf"record 0: .*label {label}, of no class"):
        records[0]
