"""How examples come to the step: in which order, on which device, from which step."""

import itertools

import jax
import numpy as np
import pytest
from tiny import config, dataset, images, register, text

from experiments.augment import crop_and_flip
from experiments.data import Dataset, Split
from experiments.feed import Resident, Streamed, each, make_feed, next_key, shuffle
from experiments.mesh import by_example, make_mesh, place
from experiments.train import train


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def key(seed=0):
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


class MadeUpStream:
    """A stream of given batches, which notes where it was opened."""

    def __init__(self, batches_of_seed, steps, opened=None, seed=None):
        self.steps, self.seed = steps, seed
        self.batches_of_seed = batches_of_seed
        self.opened = [] if opened is None else opened

    def reseeded(self, seed):
        return MadeUpStream(self.batches_of_seed, self.steps, self.opened, seed)

    def batches(self, start=0):
        self.opened.append((self.seed, start))
        return itertools.islice(self.batches_of_seed(self.seed), start, None)


def numbered(seed):
    """Yield batches whose labels say seed and step."""
    for step in itertools.count():
        inputs = np.full((8, 28, 28, 1), step % 256, np.uint8)
        yield Split(inputs, np.full(8, 1000 * (seed or 0) + step, np.int32))


# From memory


def test_an_epoch_sees_every_example_at_most_once():
    order, _ = shuffle(key(), 23, 5)
    assert order.shape == (4, 5)
    seen = np.sort(np.ravel(order))
    assert len(set(seen.tolist())) == 20
    assert seen.min() >= 0
    assert seen.max() < 23
    again, _ = shuffle(key(), 23, 5)
    np.testing.assert_array_equal(order, again)
    other, _ = shuffle(next_key(key()), 23, 5)
    assert not np.array_equal(order, other)
    # Whole, where the batches fill it; in an order of its own.
    whole, _ = shuffle(key(), 20, 5)
    np.testing.assert_array_equal(np.sort(np.ravel(whole)), np.arange(20))
    assert not np.array_equal(np.ravel(whole), np.arange(20))


def test_every_step_of_every_epoch_has_a_key_of_its_own():
    keys, at = [], key()
    for _ in range(3):
        _, of_steps = shuffle(at, 23, 5)
        assert of_steps.shape == (4, 2)
        keys.extend(map(tuple, np.asarray(of_steps).tolist()))
        keys.append(tuple(at.tolist()))
        at = np.asarray(next_key(at))
    assert len(set(keys)) == len(keys) == 3 * 5


def test_items_of_a_part_are_rows_of_the_whole_epoch():
    feed = make_feed(config(), images(23), make_mesh(1))
    assert feed.steps == 4
    whole = feed.items(0, key(), 0, 0, 4)
    order, keys = shuffle(key(), 23, 5)
    np.testing.assert_array_equal(whole[0], order)
    np.testing.assert_array_equal(whole[1], keys)
    for start, stop in itertools.combinations(range(5), 2):
        part = feed.items(0, key(), 0, start, stop)
        for rows, all_rows in zip(part, whole, strict=True):
            np.testing.assert_array_equal(rows, all_rows[start:stop])
    one_by_one = list(each(whole))
    assert len(one_by_one) == 4
    np.testing.assert_array_equal(one_by_one[2][0], order[2])
    np.testing.assert_array_equal(one_by_one[2][1], keys[2])


@pytest.mark.parametrize("kind", [images, text])
@pytest.mark.parametrize(("devices", "model_parallel"), [(1, 1), (8, 1), (8, 2)])
def test_batch_is_of_the_indices_and_split_over_the_devices(
    kind, devices, model_parallel
):
    split, mesh = kind(23), make_mesh(devices, model_parallel)
    feed = make_feed(config(batch_size=8), split, mesh)
    item = next(each(feed.items(0, key(), 0, 0, 1)))
    batch = jax.jit(feed.batch)(feed.source, item)
    indices = np.asarray(item[0])
    np.testing.assert_array_equal(batch.inputs, split.inputs[indices])
    np.testing.assert_array_equal(batch.labels, split.labels[indices])
    assert batch.inputs.dtype == np.uint8
    rows = 8 * model_parallel // devices
    for array in batch:
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {rows}
    for array in feed.source:
        assert array.is_fully_replicated
        assert len(array.devices()) == devices


@pytest.mark.parametrize("devices", [1, 8])
def test_augmentation_differs_from_step_to_step_and_repeats(devices):
    split, mesh = images(23), make_mesh(devices)
    settings = config(batch_size=8, augment="crop_flip")
    feed = make_feed(settings, split, mesh)
    indices = place(np.arange(8), jax.sharding.NamedSharding(mesh, jax.P()))
    _, keys = shuffle(key(), 23, 8)
    batch = jax.jit(feed.batch)
    first, second = (batch(feed.source, (indices, k)) for k in np.asarray(keys))
    assert not np.array_equal(first.inputs, second.inputs)
    assert not np.array_equal(first.inputs, split.inputs[:8])
    for made in (first, second):
        np.testing.assert_array_equal(made.labels, split.labels[:8])
        assert made.inputs.sharding.is_equivalent_to(by_example(mesh), 4)
    expected = crop_and_flip(jax.random.wrap_key_data(keys[0]), split.inputs[:8])
    np.testing.assert_array_equal(first.inputs, expected)
    # What tells whether a network reads its input is as it came.
    np.testing.assert_array_equal(feed.sample(), split.inputs)


@pytest.mark.parametrize("count", [8, 23, 64, 65, 200])
def test_sample_is_of_few_examples_from_all_over(count):
    split = Split(np.arange(count).astype(np.uint8)[:, None], np.zeros(count, np.int32))
    sample = np.ravel(make_feed(config(), split, make_mesh(1)).sample())
    assert len(sample) == len(set(sample.tolist())) == min(count, len(sample))
    assert min(count, 32) <= len(sample) <= 64
    assert sample.max() >= 0.95 * count - 1


@pytest.mark.parametrize("kind", [Resident, Streamed])
def test_batch_that_the_devices_do_not_divide_is_refused(kind):
    examples = images(23) if kind is Resident else MadeUpStream(numbered, 3)
    with pytest.raises(ValueError, match=r"a multiple of 8, .*; got 12"):
        make_feed(config(batch_size=12), examples, make_mesh(8))
    # With the kernels cut in two, half as many devices split the batch.
    made = make_feed(config(batch_size=12), examples, make_mesh(8, 2))
    assert isinstance(made, kind)


# From a stream


def labels_of(items):
    """Return the step, and the seed, that the batches of `numbered` carry."""
    return [int(item.labels[0]) for item in items]


def test_stream_is_opened_once_for_steps_that_follow_each_other():
    stream = MadeUpStream(numbered, 5)
    feed = make_feed(config(batch_size=8), stream, make_mesh(1))
    assert feed.steps == 5
    assert labels_of(feed.items(2, key(), 0, 0, 3)) == [2000, 2001, 2002]
    assert labels_of(feed.items(2, key(), 0, 3, 5)) == [2003, 2004]
    # The next epoch goes on in the same stream, which numbers the steps throughout.
    assert labels_of(feed.items(2, key(9), 1, 0, 2)) == [2005, 2006]
    assert stream.opened == [(2, 0)]


def test_stream_is_opened_anew_after_a_gap_and_for_another_seed():
    stream = MadeUpStream(numbered, 5)
    feed = make_feed(config(batch_size=8), stream, make_mesh(1))
    assert labels_of(feed.items(1, key(), 2, 3, 5)) == [1013, 1014]  # taken up
    assert labels_of(feed.items(1, key(), 2, 3, 5)) == [1013, 1014]  # repeated
    assert labels_of(feed.items(4, key(), 3, 0, 1)) == [4015]
    assert stream.opened == [(1, 13), (1, 13), (4, 15)]
    # Items that were only begun count as far as they were taken.
    next(iter(feed.items(4, key(), 3, 1, 4)))
    assert labels_of(feed.items(4, key(), 3, 2, 3)) == [4017]
    assert stream.opened == [(1, 13), (1, 13), (4, 15)]


@pytest.mark.parametrize("devices", [1, 8])
def test_batch_of_a_stream_is_split_over_the_devices(devices):
    mesh = make_mesh(devices)
    feed = make_feed(config(batch_size=8), MadeUpStream(numbered, 5), mesh)
    (item,) = feed.items(0, key(), 0, 1, 2)
    batch = jax.jit(feed.batch)(feed.source, item)
    np.testing.assert_array_equal(batch.inputs, np.ones((8, 28, 28, 1), np.uint8))
    np.testing.assert_array_equal(batch.labels, np.ones(8, np.int32))
    for array in item:
        assert len(array.addressable_shards) == devices
        assert {s.data.shape[0] for s in array.addressable_shards} == {8 // devices}
    assert feed.sample().shape == (8, 28, 28, 1)


def test_streamed_training_is_the_resident_one_of_the_same_batches():
    settings = config(batch_size=8, devices=8, look_every=1)
    split = images(23)

    def batches(seed):
        at = jax.random.key_data(jax.random.split(jax.random.key(seed))[1])
        while True:
            order, _ = shuffle(at, 23, 8)
            for indices in np.asarray(order):
                yield Split(split.inputs[indices], split.labels[indices])
            at = next_key(at)

    stream = MadeUpStream(lambda seed: batches(seed or 0), 2)
    data = dataset(23, held_out=10)
    (resident,) = train(settings, data, "scl")
    streamed = Dataset(stream, data.validation, data.test)
    (got,) = train(settings, streamed, "scl")
    assert stream.opened.count((7, 0)) == 1
    assert {seed for seed, _ in stream.opened} == {7, None}  # the sample has no seed
    jax.tree.map(
        lambda *both: np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5),
        *(got.trained, resident.trained),
    )
    for old, new in zip(resident.history, got.history, strict=True):
        assert new.loss == pytest.approx(old.loss, rel=1e-5)
        assert (new.nnz, new.validation_accuracy) == (old.nnz, old.validation_accuracy)
