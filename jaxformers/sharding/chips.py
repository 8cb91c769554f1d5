"""What accelerators can do, as their makers state it.

GPUs: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM, H200 SXM and HGX B200, for bfloat16 without
sparsity. A link within a host is NVLink in one direction, which is half of the figure on the sheet;
between hosts it is the network card that a DGX or HGX host has for each GPU: 200 Gb/s beside A100,
400 Gb/s beside the others.

TPUs: Google Cloud's pages of the versions. Within a pod a chip sends along one axis of the torus,
both ways at once (Austin et al. 2025, How to Scale Your Model, chapter 2, has the same numbers);
between pods it has its share of the host's network.
"""

import difflib
import math
from typing import NamedTuple


class Chip(NamedTuple):
    """A chip, and how it is connected.

    Arguments:
        name: of the chip.
        flops: the most operations in a second, in bfloat16.
        memory: bytes of memory.
        bandwidth: bytes in a second between memory and chip.
        near: bytes in a second that a chip sends to others of its island, a host or a pod.
        far: bytes in a second that a chip sends to other islands.
        island: chips of an island.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    near: float
    far: float
    island: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100", 312e12, 80e9, 2.039e12, 300e9, 25e9, 8),
        Chip("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8),
        Chip("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8),
        Chip("b200", 2250e12, 180e9, 8e12, 900e9, 50e9, 8),
        Chip("v4", 275e12, 32 * 2**30, 1.228e12, 90e9, 6.25e9, 4096),
        Chip("v5e", 197e12, 16 * 2**30, 0.819e12, 90e9, 3.125e9, 256),
        Chip("v5p", 459e12, 95 * 2**30, 2.765e12, 180e9, 6.25e9, 8960),
        Chip("v6e", 918e12, 32 * 2**30, 1.64e12, 180e9, 12.5e9, 256),
    )
}


def find_chip(text: str) -> Chip:
    """Returns the chip that a text names, with numbers of one's own where it has them.

    Arguments:
        text: a name such as "h100"; or the numbers of another chip; or a name and the numbers
            that differ.

    Raises:
        ValueError: if there is no such chip, or a number is missing or none.

    Example:
        >>> find_chip("h100,far=25e9").far
        25000000000.0
    """
    first, *rest = (part.strip() for part in text.split(","))
    known = CHIPS.get(first.lower())
    if known is None and "=" not in first:
        close = difflib.get_close_matches(first.lower(), CHIPS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        numbers = ",".join(f"{name}=..." for name in NUMBERS)
        raise ValueError(
            f"a chip must be one of {', '.join(CHIPS)}, or numbers of your own such as {numbers}, "
            f"got {text!r:.80}.{hint}"
        )
    given = {} if known is None else known._asdict()
    for part in rest if known is not None else [first, *rest]:
        name, _, number = part.partition("=")
        if name not in NUMBERS:
            raise ValueError(
                f"a chip has the numbers {', '.join(NUMBERS)}, got {part!r:.80} in {text!r:.80}."
            )
        given[name] = _positive(name, number)
    missing = [name for name in NUMBERS if name not in given]
    if missing:
        raise ValueError(
            f"the chip {text!r:.80} has no {' and no '.join(missing)}. Add {missing[0]}=..., or "
            f"begin with a name, such as h100,{text!s:.60}."
        )
    return Chip(**{**given, "name": text if rest or known is None else first.lower()})


NUMBERS = Chip._fields[1:]


def _positive(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    whole = name != "island" or number == math.floor(number) if math.isfinite(number) else False
    if not (whole and number > 0):
        kind = "a whole number" if name == "island" else "a number"
        raise ValueError(
            f"{name} of a chip must be {kind} above 0, such as 4e11, got {text!r:.80}."
        )
    return int(number) if name == "island" else number
