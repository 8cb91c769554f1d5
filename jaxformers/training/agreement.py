"""A signal that one of several hosts got, on which all of them act at the same step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest number that any host gave at the step before, the same on all hosts.

    The numbers are exchanged by a small program after each step. Nobody waits for it, since it is
    read a step later, when the device works on the next one.

    Example:
        >>> agreement = Agreement()
        >>> agreement.next(15), agreement.next(0), agreement.next(0)
        (0, 15, 0)
    """

    def __init__(self) -> None:
        devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
        mesh = Mesh(devices, ("hosts", "devices"), axis_types=(AxisType.Auto,) * 2)
        self._by_host = NamedSharding(mesh, PartitionSpec("hosts"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)
        self._pending: Any = 0

    def next(self, number: int) -> int:
        """Returns the largest number of the step before, and gives the number of this one."""
        before = int(self._pending)
        own = np.array([number], np.int32)
        own_part = jax.make_array_from_process_local_data(self._by_host, own)
        self._pending = self._largest(own_part)
        return before
