"""Where arrays lie: one mesh for one device, for several, and for several processes.

The mesh has two axes. Along "data" every device has a part of the batch, along
"model" a part of every kernel. One device is the mesh (1, 1): nothing here or in the
training loop asks how many there are.
"""

import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def join_processes() -> None:
    """Join the other processes of a run, if the environment names a coordinator.

    JAX_COORDINATOR_ADDRESS (host:port) is the switch; how many processes there are
    and which one this is say JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else the
    cluster (Slurm, Open MPI, Kubernetes, Cloud TPU), which JAX asks by itself. To be
    called before anything is computed.

    Raises:
      ValueError: if one of the two numbers is given without the other or without the
        address, or one is no number, or the address has no port.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not (address or given):
        return
    if not re.fullmatch(r".+:\d+", address):
        # Alone, each process would train the whole run, and think it is the first.
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS must be host:port, the same in all processes; "
            f"got {address!r}" + (f" with {given}" if given else "")
        )
    if len(given) == 1 or not all(text.isdecimal() for text in given.values()):
        raise ValueError(
            f"with JAX_COORDINATOR_ADDRESS, {names[0]} and {names[1]} must both be "
            f"integers, or be left out where the cluster says them; got {given}"
        )
    count, index = (int(given[name]) if given else None for name in names)
    jax.distributed.initialize(num_processes=count, process_id=index)


def make_mesh(devices: int = 0, model_parallel: int = 1) -> Mesh:
    """Return a mesh of shape (data, model) over the devices of all processes.

    Args:
      devices: how many to use; 0 for all.
      model_parallel: the size of the axis "model".

    Raises:
      ValueError: if there are fewer devices, or `model_parallel` does not divide
        them, or some of several processes would have none.
    """
    there = jax.devices()
    count = devices or len(there)
    if not 1 <= count <= len(there):
        raise ValueError(
            f"devices must be at most {len(there)}, the number there is, or 0 for all "
            f"of them; got {count}"
        )
    if model_parallel < 1 or count % model_parallel:
        raise ValueError(
            f"model_parallel must be at least 1 and divide the number of devices, "
            f"{count}; got {model_parallel}"
        )
    used = np.array(there[:count]).reshape(-1, model_parallel)
    idle = jax.process_count() - len({d.process_index for d in used.flat})
    if idle:
        raise ValueError(
            f"devices must leave none of the {jax.process_count()} processes without "
            f"one; {count} of {len(there)} leave {idle}"
        )
    return Mesh(used, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ValueError if a batch cannot be split evenly."""
    parts = mesh.shape["data"]
    if batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, the devices that split the "
            f"batch; got {batch_size}. `--devices N` uses fewer devices"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: by its first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def by_shape(mesh: Mesh, tree: PyTree) -> PyTree:
    """Return the shardings of parameters, mask variables and optimizer states.

    The shape of a leaf decides, and nothing else: a mask variable and the moments of
    both have the shape of their weight, so they lie where it lies. A kernel is cut
    along its last axis that the axis "model" divides; vectors, scalars and kernels
    with no such axis are replicated.
    """
    parts = mesh.shape["model"]

    def sharding(leaf):
        axes = range(len(leaf.shape) - 1, -1, -1) if len(leaf.shape) > 1 else ()
        cut = next((axis for axis in axes if leaf.shape[axis] % parts == 0), None)
        if cut is None or parts == 1:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * cut, "model"))

    return jax.tree.map(sharding, tree)


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Put arrays of the host, the same in every process, onto the devices."""

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return jax.tree.map(put, tree)
