"""Many devices: the library's drivers split their batches over a mesh of devices.

    with jax.set_mesh(parallel.mesh()):
        filters, _ = em.fit(images)
        variables, _ = train.fit(...)
        result = evaluate.run_suite(...)

The same code runs on one device. Training is one program over the whole batch, which XLA partitions: batch
normalisation and dropout are those of one device. Attacks, predictions, certificates and EM's sums are programs of
their own on each device, without any traffic inside (`per_device`): what an example meets depends on its key alone
(`attacks.daa` excepted, whose examples act on those of their device).
With several processes all of them make the same calls, and each reads the part of a batch that its devices hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rbf_jax.checks import check_count
from rbf_jax.types import Array

AXIS = "data"
"""The mesh's one axis, over which batches are split."""


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for ``jax.set_mesh``.

    Args:
        devices: which; None for all, those of all processes.

    Raises:
        ValueError: no device.
    """
    devices = jax.devices() if devices is None else list(devices)
    check_count(len(devices), "the number of devices")
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def count() -> int:
    """How many devices split a batch here: 1 without a mesh, and inside `per_device`."""
    present = jax.sharding.get_abstract_mesh()
    return present.shape[AXIS] if AXIS in present.auto_axes else 1


def filled(number: int) -> int:
    """The least multiple of `count` that is not below the number: how many rows all devices take alike."""
    return -(-number // count()) * count()


def per_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a program that runs on each device, on its part of every argument's and result's first axis.

    What the function closes over is on every device. The axis must be a multiple of `count`.
    """
    if count() == 1:
        return function
    over = PartitionSpec(AXIS)
    # Nothing crosses devices, so that there is no replication to verify.
    return jax.shard_map(function, in_specs=over, out_specs=over, check_vma=False)


def split(tree: Any) -> Any:
    """In a compiled program: the arrays, the first axis split over the devices where it is a multiple of `count`."""

    def constrain(array: Array) -> Array:
        return array if array.shape[0] % count() else jax.lax.with_sharding_constraint(array, PartitionSpec(AXIS))

    return tree if count() == 1 else jax.tree.map(constrain, tree)


def take(tree: Any, rows: np.ndarray, axis: int = 0) -> Any:
    """Rows of host arrays as device arrays: ``array[rows]``, split over the devices.

    A process reads the rows of its own devices alone, and a device is handed no others.

    Args:
        tree: NumPy arrays ``(N, ...)``.
        rows: indices, of any shape.
        axis: of ``rows``, along which is split; a multiple of `count`.
    """
    if count() == 1:
        return jax.tree.map(lambda array: jnp.asarray(array[rows]), tree)
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*[None] * axis, AXIS))

    def one(array: np.ndarray) -> Array:
        def read(index: Any) -> np.ndarray:
            return array[rows[index[: rows.ndim]]]

        return jax.make_array_from_callback(rows.shape + array.shape[1:], sharding, read)

    return jax.tree.map(one, tree)


def everywhere(tree: Any) -> Any:
    """The arrays of a tree on every device, so that no later call has to bring them there."""
    if count() == 1:
        return jax.tree.map(jnp.asarray, tree)
    # By a program: unlike device_put it takes what each of several processes holds for itself.
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))(tree)


def fetch(tree: Any) -> Any:
    """Device arrays as NumPy arrays, whole, in every process."""

    def one(array: Array) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)


def largest(value: int) -> int:
    """The largest of the values that the processes have, so that all of them do the same."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())
