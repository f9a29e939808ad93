"""Where arrays lie, on eight virtual devices, and how processes find each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import scl_jax
from experiments.mesh import (
    by_example,
    by_shape,
    check_batch,
    join_processes,
    make_mesh,
    place,
    replicated,
)

# The mesh


@pytest.mark.parametrize(
    ("devices", "model_parallel", "shape"),
    [(0, 1, (8, 1)), (0, 2, (4, 2)), (8, 8, (1, 8)), (1, 1, (1, 1)), (6, 3, (2, 3))],
)
def test_mesh_has_the_shape_that_is_asked_for(devices, model_parallel, shape):
    mesh = make_mesh(devices, model_parallel)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape


def test_mesh_takes_the_first_devices_and_neighbours_share_the_weights():
    mesh = make_mesh(6, 2)
    ids = [[device.id for device in row] for row in mesh.devices]
    first = [device.id for device in jax.devices()[:6]]
    assert ids == [first[0:2], first[2:4], first[4:6]]


@pytest.mark.parametrize("devices", [9, 16, -1])
def test_mesh_of_devices_that_are_not_there_is_refused(devices):
    with pytest.raises(ValueError, match=rf"devices must be at most 8, .* {devices}$"):
        make_mesh(devices)


@pytest.mark.parametrize(
    ("devices", "model_parallel"), [(0, 3), (6, 4), (2, 4), (0, 16), (0, 0), (4, -2)]
)
def test_mesh_that_does_not_come_out_even_is_refused(devices, model_parallel):
    count = devices or 8
    words = rf"model_parallel must .* divide .*, {count}; got {model_parallel}$"
    with pytest.raises(ValueError, match=words):
        make_mesh(devices, model_parallel)


class Device:
    """A device of another process, as far as a mesh looks at it."""

    def __init__(self, process_index):
        self.process_index = process_index


def test_mesh_that_leaves_a_process_without_a_device_is_refused(monkeypatch):
    devices = [Device(0), Device(0), Device(1), Device(1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"none of the 2 processes .*2 of 4 leave 1"):
        make_mesh(2)


@pytest.mark.parametrize(("model_parallel", "parts"), [(1, 8), (2, 4), (8, 1)])
def test_batch_must_be_a_multiple_of_the_devices_that_split_it(model_parallel, parts):
    mesh = make_mesh(0, model_parallel)
    for size in range(1, 30):
        if size % parts == 0:
            check_batch(mesh, size)
            continue
        words = f"batch_size must be a multiple of {parts},.* got {size}[.]"
        with pytest.raises(ValueError, match=words):
            check_batch(mesh, size)


# Shardings


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), ()),
        ((8,), ()),  # vectors are everywhere
        ((784, 300), (None, "model")),
        ((784, 10), ("model",)),  # four parts of ten there are not
        ((7, 9), ()),
        ((3, 3, 16, 32), (None, None, None, "model")),
        ((3, 3, 16, 1), (None, None, "model")),
        ((128, 4, 32), (None, None, "model")),
        ((128, 4, 3), (None, "model")),
        ((5, 5, 3, 3), ()),
    ],
)
def test_kernel_is_cut_along_its_last_axis_that_can_be(shape, spec):
    mesh = make_mesh(8, 4)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = by_shape(mesh, leaf)
    assert sharding.mesh == mesh
    assert sharding.spec == PartitionSpec(*spec)
    held = sharding.shard_shape(shape)
    assert np.prod(held) * (4 if spec else 1) == np.prod(shape)


@pytest.mark.parametrize("devices", [1, 8])
def test_without_a_model_axis_all_is_everywhere(devices):
    mesh = make_mesh(devices)
    sharding = by_shape(mesh, jax.ShapeDtypeStruct((16, 16), jnp.float32))
    assert sharding.spec == PartitionSpec()


def test_mask_variables_and_moments_lie_where_their_weights_lie():
    mesh = make_mesh(8, 2)
    shapes = {"a": (6, 4), "b": (4, 3), "c": (5, 7), "d": (4,)}
    params = scl_jax.mask_params(
        {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    )
    tx = scl_jax.partition(optax.adam(0.1), optax.sgd(0.1, 0.9))
    specs = {
        (6, 4): PartitionSpec(None, "model"),
        (4, 3): PartitionSpec("model"),
        (5, 7): PartitionSpec(),
        (4,): PartitionSpec(),
        (): PartitionSpec(),  # a count of steps
    }
    tree = (params, tx.init(params))
    leaves = jax.tree.leaves(tree)
    assert sum(leaf.shape == (6, 4) for leaf in leaves) == 5
    shardings = jax.tree.leaves(by_shape(mesh, tree))
    for leaf, sharding in zip(leaves, shardings, strict=True):
        assert sharding.spec == specs[leaf.shape]


def held(array):
    """Return what each device holds, by its place in the order of devices."""
    by_device = {shard.device.id: shard.data for shard in array.addressable_shards}
    return [np.asarray(by_device[device.id]) for device in jax.devices()]


def test_what_is_replicated_is_on_every_device():
    values = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.int32(7)}
    placed = place(values, replicated(make_mesh(8, 2)))
    for name, value in values.items():
        assert placed[name].dtype == value.dtype
        assert len(held(placed[name])) == 8
        for part in held(placed[name]):
            np.testing.assert_array_equal(part, value)


def test_batch_is_split_by_example_and_shared_along_the_model_axis():
    batch = np.arange(8 * 3).reshape(8, 3).astype(np.uint8)
    placed = place(batch, by_example(make_mesh(8, 2)))
    for i, part in enumerate(held(placed)):
        np.testing.assert_array_equal(part, batch[2 * (i // 2) :][:2])
    np.testing.assert_array_equal(placed, batch)


# Several processes


@pytest.fixture
def joined(monkeypatch):
    """Return what jax.distributed.initialize was called with, each time."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    return calls


def set_environment(monkeypatch, address, count, index):
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    for name, value in zip(names, (address, count, index), strict=True):
        if value is not None:
            monkeypatch.setenv(f"JAX_{name}", value)


@pytest.mark.parametrize("empty", [None, ""])
def test_a_single_process_joins_nothing(joined, monkeypatch, empty):
    set_environment(monkeypatch, empty, empty, empty)
    join_processes()
    assert joined == []


def test_a_process_says_how_many_there_are_and_which_it_is(joined, monkeypatch):
    set_environment(monkeypatch, "localhost:1234", "2", "0")
    join_processes()
    assert joined == [((), {"num_processes": 2, "process_id": 0})]


def test_a_cluster_is_asked_for_the_numbers_that_are_left_out(joined, monkeypatch):
    set_environment(monkeypatch, "[::1]:1234", None, "")
    join_processes()
    assert joined == [((), {"num_processes": None, "process_id": None})]


@pytest.mark.parametrize(
    ("count", "index"),
    [("2", None), (None, "1"), ("2", ""), ("two", "1"), ("2", "-1"), ("2.0", "1")],
)
def test_half_a_pair_of_numbers_is_refused(joined, monkeypatch, count, index):
    set_environment(monkeypatch, "localhost:1234", count, index)
    words = "JAX_NUM_PROCESSES and JAX_PROCESS_ID must both be integers"
    with pytest.raises(ValueError, match=words) as error:
        join_processes()
    for text in filter(None, (count, index)):
        assert repr(text) in str(error.value)
    assert joined == []


@pytest.mark.parametrize(
    ("address", "count", "index"),
    [
        (None, "2", "0"),
        ("", "2", "1"),
        (None, None, "1"),
        (None, "2", None),
        ("localhost", "2", "0"),
        ("localhost:", None, None),
        (":1234", "2", "0"),
    ],
)
def test_processes_without_a_coordinator_are_refused(
    joined, monkeypatch, address, count, index
):
    set_environment(monkeypatch, address, count, index)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS must be host:port"):
        join_processes()
    assert joined == []
