"""How far checkpoints loaded here are from transformers: writes docs/parity.md.

    python benchmarks/parity.py [NAME ...]

Needs `pip install 'jaxformers[hf,parity]'`. The checkpoints are those of the tests: tiny, random,
one or more of every family. With names, only these are compared, and printed instead of written.
"""

import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from hf_cases import CASES  # noqa: E402
from hf_checkpoints import make  # noqa: E402

from jaxformers.cli.compare import (  # noqa: E402
    FARTHER,
    LEAST,
    LEFT,
    NO_PADDING,
    RATIO,
    RIGHT,
    ROUNDINGS,
    Row,
    verify,
)
from jaxformers.cli.reference import torch_without_gradients  # noqa: E402

PACKAGES = "jax", "equinox", "torch", "transformers"
# What rows a column holds: those whose names match.
COLUMNS = {
    "no padding": f".*{NO_PADDING}",
    "right padding": f".*{RIGHT}",
    "left padding": f".*{LEFT}",
    "greedy": ".*log-probs, greedy",
    "beam search": ".*log-probs, beam search",
    "other tokens": "tokens, (greedy|beam search)",
    "16 bits": f".*{RATIO}",
    "saved": ".*, saved",
}
HEAD = f"""# Parity with transformers

Tiny random checkpoints of every family, loaded here and in transformers, in float32. Written by
`python benchmarks/parity.py`; `python -m jaxformers verify PATH` makes the same comparison of a
checkpoint of your own.

- *no padding*, *right padding*, *left padding*: largest difference of log-probabilities, hidden
  states, pooled vectors and logits of classes, whichever of them the model has.
- *greedy*, *beam search*: of the log-probabilities of generated tokens (of whole beams).
- *other tokens*: how many generated tokens differ.
- *16 bits*: how far the outputs in bfloat16 (float16, if the file has that) are from those in
  float32 with the same weights, as a multiple of how far transformers' own are: below 1 is nearer.
  By root mean squares, with or without padding, whichever gives more.
- *saved*: tensors and outputs that differ after `save_pretrained` here and loading there.

In the first five columns, {ROUNDINGS} times as much is allowed as transformers in float32 differs
from transformers in float64, and {LEAST:.0e} in any case. In the column of 16 bits {FARTHER} is
allowed, and more where chance decides more because rows are few; in the other two, nothing. JAX is
asked for products with all bits of float32 (`jax.default_matmul_precision("highest")`): on GPUs and
TPUs it takes fewer if it is not told, and whoever compares has to tell it.

"""


def cells(name: str, rows: list[Row]) -> list[str]:
    """A line of the table: the largest difference of each column's rows."""
    line = [f"`{name}`", CASES[name].architecture]
    for title, pattern in COLUMNS.items():
        found = [row for row in rows if re.fullmatch(pattern, row.name)]
        if title == "16 bits":
            line.append(f"{max(row.difference for row in found):.1f}")
        elif found:
            line.append(f"{max(row.difference for row in found):.0e}".replace("0e+00", "0"))
        else:
            line.append("")
    return line


def compare(name: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory, torch_without_gradients():
        make(name, directory)
        return verify(directory)


def main() -> int:
    torch.set_num_threads(1)  # on arrays this small, more threads only wait for each other
    names = sys.argv[1:] or list(CASES)
    lines, failed = [["checkpoint", "class in transformers", *COLUMNS]], []
    lines.append(["---"] * len(lines[0]))
    for name in names:
        rows = compare(name)
        failed += [f"{name}: {row.name}" for row in rows if not row.passed]
        lines.append(cells(name, rows))
        print(*lines[-1], flush=True)
    if not sys.argv[1:]:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "parity.md").write_text(f"{HEAD}With {versions}.\n\n{table}\n")
    print("\n".join(["beyond what is allowed:", *failed]) if failed else "all equal")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
