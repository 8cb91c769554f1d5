"""What a compiled program sends between devices, read from its text."""

import re
from collections import Counter

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}


def computations(text):
    """The lines of each computation of a program by name, and the name of the first to run."""
    found, entry, lines = {}, None, []
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            lines = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return found, entry


def shapes(result):
    """The arrays in the type of a result, as pairs of bytes and dimensions."""
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result):
        dims = tuple(int(n) for n in sizes.split(",") if n)
        size = BYTES[kind]
        for n in dims:
            size *= n
        yield size, dims


def collectives(text):
    """Each collective of a program: its kind, the bytes and sizes of a result, and how often."""
    found, entry = computations(text)

    def walk(name, times):
        for line in found.get(name, ()):
            match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if match is None:
                continue
            result, kind = match[1], match[2].removesuffix("-start")
            if kind in KINDS:
                for size, dims in shapes(result):
                    yield kind, size, dims, times
            often = times
            if kind == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                often = times * int(trips[1]) if trips else times
            called = r"(?:body|calls|to_apply|branch_computations)=\{?([%\w.\-]+(?:, %[\w.\-]+)*)"
            for inner in re.findall(called, line):
                for one in inner.replace("%", "").split(", "):
                    yield from walk(one, often)

    return list(walk(entry, 1))


def moved(text):
    """The bytes of results of each kind of collective in one run of a program."""
    total = Counter()
    for kind, size, _, times in collectives(text):
        total[kind] += size * times
    return total
