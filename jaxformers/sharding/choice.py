"""The choice of a mesh for a number of devices."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxformers.checks import check_size
from jaxformers.sharding.chips import Chip
from jaxformers.sharding.duration import USABLE, duration
from jaxformers.sharding.mesh import AXES
from jaxformers.sharding.plan import Plan
from jaxformers.sharding.workload import Workload

# Among meshes whose times differ by less than this, which the model of time cannot tell apart, the
# one with the smallest "sequence", "tensor" and "fsdp" is chosen: its groups of devices are small.
NEAR = 0.01

MOST = 10**6  # devices


class ChosenMesh(NamedTuple):
    """What was chosen, and among how many.

    Arguments:
        plan: the quickest that fits into memory; if none does, the one that needs least memory.
        fits: whether it fits.
        tried: how many meshes the model and the batch can be divided over.
    """

    plan: Plan
    fits: bool
    tried: int


def choose_mesh(work: Workload, devices: int, chip: Chip) -> ChosenMesh:
    """Returns the mesh of a number of devices on which a step is quickest and fits into memory.

    Raises:
        ValueError: if the model and the batch can be divided over none.

    Example:
        >>> from jaxformers.sharding.chips import CHIPS
        >>> work = Workload(model, rows=8, length=32)
        >>> choose_mesh(work, 2, CHIPS["h100"]).plan.devices
        2
    """
    check_size(devices=devices)
    if devices > MOST:
        raise ValueError(f"a mesh must have at most {MOST:,} devices, got {devices:,}.")
    plans, refused = [], None
    for sizes in meshes(work, devices):
        try:
            plan = best_of(work, dict(zip(AXES, sizes, strict=True)), chip)
        except ValueError as error:
            refused = refused or error
            continue
        fitting = fits(plan, chip)
        cost = duration(plan, chip).total if fitting else plan.memory.total
        plans.append((not fitting, cost, sizes[::-1], plan))
    if not plans:
        raise ValueError(
            f"{work.rows} rows of {work.length} tokens and this model cannot be divided over any "
            f"mesh of {devices} devices. {refused or 'Use more rows.'}"
        )
    misfit, least, *_ = min(plans, key=lambda x: x[:2])
    near = [x for x in plans if x[0] == misfit and x[1] <= (1 + NEAR) * least]
    plan = min(near, key=lambda x: x[2])[3]
    return ChosenMesh(plan, not misfit, len(plans))


def best_of(work: Workload, mesh: Mapping[str, int], chip: Chip) -> Plan:
    """Returns the plan for a mesh, whose layers are computed once if there is memory for it.

    Raises:
        ValueError: as `Plan` does.
    """
    plan = Plan(work, mesh, rematerialized=False)
    return plan if fits(plan, chip) else Plan(work, mesh, rematerialized=True)


def fits(plan: Plan, chip: Chip) -> bool:
    """Returns whether a step fits into the memory of a chip."""
    return plan.memory.total <= USABLE * chip.memory


def meshes(work: Workload, devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the sizes of the meshes of so many devices over which the batch can be divided."""
    heads = [layer.self_attention.num_kv_heads for layer, _ in work.layers]
    for rows in divisors(devices):
        for sequence in divisors(devices // rows):
            tensor = devices // rows // sequence
            if work.rows % rows or any(n % tensor for n in heads):
                continue
            if sequence > 1 and work.length % (2 * sequence):
                continue
            for data in divisors(rows):
                yield data, rows // data, tensor, sequence


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
