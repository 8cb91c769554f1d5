"""How long a step of training takes on a mesh: an estimate from what chips can do.

The model is short enough to check by hand, and `docs/scaling.md` writes it down. It knows no
latencies, and nothing that other jobs do to a network.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from jaxformers.sharding.chips import Chip
from jaxformers.sharding.mesh import AXES, FSDP
from jaxformers.sharding.plan import GRADIENTS, LAYERS, RING, Plan, Transfer
from jaxformers.sharding.workload import STORED

# The share of a chip's most operations that large products of matrices and attention reach. A step
# whose layers are computed once uses up to 50 % of a chip then, and one that computes them twice up
# to 38 %. Published: MaxText, Llama 2 7B on 8 H100, 492 TFLOP/s or 50 %; torchtitan, Llama 3 8B on
# 8 H100, 33 to 39 %.
REACHED = 0.5
# The share of memory that a step may take, since temporaries are an estimate.
USABLE = 0.8


class Seconds(NamedTuple):
    """The parts of a step's time. Nothing of one part happens beside another."""

    computing: float
    waiting_for_weights: float
    waiting_for_keys: float
    other_traffic: float
    updating: float

    @property
    def total(self) -> float:
        return sum(self)


def duration(plan: Plan, chip: Chip) -> Seconds:
    """Returns the estimated time of a step.

    Weights and gradients of layers move while layers compute, and keys and values while attention
    does: they take the time by which they last longer. All other traffic waits, and is waited for.

    Example:
        >>> from jaxformers.sharding.chips import CHIPS
        >>> from jaxformers.sharding.workload import Workload
        >>> plan = Plan(Workload(model, rows=8, length=32), {"fsdp": 2})
        >>> duration(plan, CHIPS["h100"]).waiting_for_keys
        0
    """
    moving = dict.fromkeys(("beside", "ring", "alone"), 0.0)
    for transfer in plan.transfers():
        beside = transfer.what in (LAYERS, GRADIENTS)
        place = "ring" if transfer.what == RING else "beside" if beside else "alone"
        moving[place] += seconds_of(transfer, plan.mesh, chip)
    maps, attention = _computing(plan, chip)
    numbers = sum(part.numbers() for part in plan.parts)
    return Seconds(
        computing=maps + attention,
        waiting_for_weights=max(0, moving["beside"] - maps - attention),
        waiting_for_keys=max(0, moving["ring"] - attention),
        other_traffic=moving["alone"],
        # Weights, moments and gradients are read, weights and moments are written.
        updating=7 * STORED * numbers / chip.bandwidth,
    )


def _computing(plan: Plan, chip: Chip) -> tuple[float, float]:
    """Returns the seconds of a device for the linear maps and for attention."""
    work, again = plan.work, plan.rematerialized
    rate = plan.devices * chip.flops * REACHED
    maps = 3 * work.map_operations
    attention = (4 if again else 3) * work.attention_operations
    maps += work.map_operations - work.output_operations if again else 0
    # A device with few tokens waits for its memory to read the weights.
    read = sum(part.numbers(FSDP) for part in plan.parts if part.axes.inputs)
    read *= (4 if again else 3) * work.width / chip.bandwidth
    return max(maps / rate, read), attention / rate


def seconds_of(transfer: Transfer, mesh: Mapping[str, int], chip: Chip) -> float:
    """Returns how long devices exchange something."""
    size, axes = transfer.size, transfer.axes
    if transfer.what == GRADIENTS:
        # Each device keeps a part of the sum, which is then added up over the other axes.
        scattered = around((FSDP,), mesh, chip) * size if FSDP in axes else 0
        rest = tuple(axis for axis in axes if axis != FSDP)
        return scattered + 2 * around(rest, mesh, chip) * size / mesh[FSDP]
    if transfer.kind == "collective-permute":
        return size / (chip.near if _members(axes, mesh, chip) == mesh[axes[0]] else chip.far)
    return (2 if transfer.kind == "all-reduce" else 1) * around(axes, mesh, chip) * size


def around(axes: tuple[str, ...], mesh: Mapping[str, int], chip: Chip) -> float:
    """Returns the seconds per byte of what goes around all devices of a group once.

    Each of n devices receives the parts of n - 1 others. The parts from other islands come to an
    island once, over the links of all of the group's devices there, and are passed on in it.
    """
    number = prod(mesh[axis] for axis in axes)
    members = _members(axes, mesh, chip)
    near = (number - 1) / number / chip.near if members > 1 else 0
    return max(near, (number - members) / number / (members * chip.far))


def _members(axes: tuple[str, ...], mesh: Mapping[str, int], chip: Chip) -> float:
    """Returns how many devices of a group are on one island; later axes are next to each other."""
    found, apart = 1.0, 1
    for axis in reversed(AXES):
        if axis in axes:
            found *= min(mesh[axis], max(1, chip.island / apart))
        apart *= mesh[axis]
    return found
