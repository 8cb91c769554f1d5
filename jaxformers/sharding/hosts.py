"""Several hosts: one program that each of them runs, whose arrays lie on the devices of all.

JAX calls a host a process. Each process has devices of its own, and all of them call the same
functions in the same order. `jax.distributed` finds them and notices if one is lost.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from jaxformers.checks import is_known
from jaxformers.sharding.mesh import as_auto, sizes_of
from jaxformers.sharding.rules import RULES, check_names, parts_of
from jaxformers.sharding.spread import row_spec

Tree = TypeVar("Tree", bound=PyTree)

HEARTBEAT = 20  # seconds without a sign of life after which a host counts as lost


def join_hosts(
    address: str | None = None, count: int | None = None, index: int | None = None, **options: Any
) -> None:
    """Makes the devices of all hosts known to each of them: `jax.distributed.initialize`.

    A script calls it before anything else of JAX. Under SLURM, Open MPI and Kubernetes and on the
    TPUs of Google's cloud JAX finds the arguments by itself; other launchers of MPI need
    `cluster_detection_method="mpi4py"`. If a host is lost, the program ends on the others within
    about 20 seconds, with an error of `jax.distributed`.

    Arguments:
        address: the first host and a free port on it, such as "10.0.0.1:1234"; None asks the
            cluster.
        count: the number of processes; None asks the cluster.
        index: the number of this process, from 0 on; None asks the cluster.
        **options: further arguments of `jax.distributed.initialize`.

    Raises:
        ValueError: if an argument is missing and there is no cluster that says it.
        RuntimeError: if JAX has used its devices before, or the others cannot be reached.

    Example:
        >>> join_hosts("10.0.0.1:1234", count=4, index=2)  # doctest: +SKIP
    """
    seconds = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(address, count, index, **(seconds | options))
    except ValueError as error:
        raise ValueError(
            f"the hosts cannot be joined: {error} Start the script with srun, mpirun or as a job "
            'of Kubernetes, or pass join_hosts("10.0.0.1:1234", count=4, index=0), which are the '
            "address of the first host, the number of processes and the number of this one."
        ) from error


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of the rows of a batch is for this host: part `index` of `count`.

    Hosts that share the same rows, because "tensor" or "sequence" spans them, have the same index.

    Arguments:
        mesh: from `make_mesh`.

    Raises:
        ValueError: if this host has no device on the mesh, or its rows do not follow one another.

    Example:
        >>> from jaxformers.sharding import make_mesh
        >>> host_rows(make_mesh(data=len(jax.devices())))
        (0, 1)
    """
    mesh = as_auto(mesh)
    sizes = sizes_of(mesh)
    where = NamedSharding(mesh, row_spec(1, sizes))
    parts = parts_of("b", sizes)
    indices = where.addressable_devices_indices_map((parts,)).values()
    rows = [part[0] for part in indices if part is not None]
    own = sorted({i for part in rows for i in range(*part.indices(parts))})
    size = len(own)
    if size == 0:
        raise ValueError(
            f"no device of this host, process {jax.process_index()}, is on the mesh. Make the mesh "
            "of the devices of all hosts, as make_mesh does without devices=."
        )
    if own != list(range(own[0], own[0] + size)) or own[0] % size or parts % size:
        raise ValueError(
            f"the rows of this host are the parts {own} of {parts}, which are no equal part of a "
            "batch. Give each host a whole batch, or use a mesh from make_mesh."
        )
    return own[0] // size, parts // size


def join_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Returns a batch that lies on all hosts, of which each host gives its own rows.

    `shard_batch` is for batches that every host has whole.

    Arguments:
        batch: any pytree of NumPy arrays, the rows `host_rows(mesh)` of the whole batch.
        mesh: from `make_mesh`.

    Raises:
        ValueError: if the rows cannot be divided over the devices.

    Example:
        >>> from jaxformers.data import Windows
        >>> from jaxformers.sharding import make_mesh
        >>> mesh = make_mesh(data=2, devices=jax.devices()[:2])
        >>> source = Windows(np.arange(99), length=8, batch_size=4)
        >>> own = source.shard(*host_rows(mesh))
        >>> join_batch(own[0], mesh)["tokens"].shape
        (4, 8)
    """
    mesh = as_auto(mesh)
    check_names(mesh, RULES)
    sizes, count = sizes_of(mesh), host_rows(mesh)[1]

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        where = NamedSharding(mesh, row_spec(x.ndim, sizes))
        # Rows alone are a part of the whole: each host has all positions, also if "sequence" spans
        # hosts.
        whole = tuple(size * count if i == 0 else size for i, size in enumerate(x.shape))
        return jax.make_array_from_process_local_data(where, x, whole)

    return jax.tree.map(put, batch)


def by_first_host(answer: bool) -> bool:
    """Returns the answer of the first host, which alone has files such as the log."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def collect(tree: Tree) -> Tree:
    """Returns a tree whose arrays are NumPy arrays, whole on every host. All hosts must call it.

    It is for models that one host saves after a training on several.

    Example:
        >>> whole = collect(model)  # on all hosts
        >>> if jax.process_index() == 0:
        ...     whole.save_pretrained(directory)  # doctest: +SKIP
    """
    return jax.tree.map(lambda x: to_numpy(x) if isinstance(x, jax.Array) else x, tree)


def check_here(name: str, x: Any) -> None:
    """Raises an error if an array that one host shall write is spread over several."""
    if isinstance(x, jax.Array) and is_known(x) and not x.is_fully_addressable:
        raise ValueError(
            f"{name} is spread over several hosts, and one file is written by one. Save the state "
            "of a training with OrbaxCheckpoints(directory). For a model, call whole = "
            "collect(model) of jaxformers.sharding on all hosts, and save that on one."
        )


def to_numpy(x: Any) -> np.ndarray:
    """Returns an array in NumPy, whole on every host."""
    if getattr(x, "is_fully_addressable", True):
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return multihost_utils.process_allgather(x, tiled=True)
