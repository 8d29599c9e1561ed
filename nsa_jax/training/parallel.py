"""Data parallelism: one mesh axis over all devices of all processes, parameters on each of them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def data_mesh() -> Mesh:
    """Returns the mesh of all devices, of every process, with the one axis `AXIS`."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def local_mesh() -> Mesh:
    """Returns the mesh of one device of this process."""
    return Mesh(np.array(jax.local_devices()[:1]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of parameters, optimizer state and sums."""
    return NamedSharding(mesh, P())


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays [B of this process, ...].
      mesh: from `data_mesh`.

    Returns:
      Arrays [B of all processes, ...], sharded by rows.
    """
    rows = NamedSharding(mesh, P(AXIS))
    return {
        name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()
    }
