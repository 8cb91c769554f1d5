"""Compares checkpoints loaded here with transformers, and writes docs/parity.md.

    python benchmarks/parity.py [NAME ...]

The script needs `pip install -e '.[hf,parity]'`. The checkpoints are those of the tests: tiny,
random, one or more of every family. With names it compares only these, and prints the table
instead.
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
# A column holds the rows whose names match.
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

The checkpoints are tiny and random, one or more of every family. They are loaded here and in
transformers, and compared in float32. `python benchmarks/parity.py` writes this page, and
`python -m jaxformers verify PATH` compares your own checkpoint in the same way.

- *no padding*, *right padding*, *left padding*: the largest difference of log-probabilities, hidden
  states, pooled vectors and logits of classes, as far as the model has them.
- *greedy*, *beam search*: the largest difference of the log-probabilities of generated tokens (of
  whole beams).
- *other tokens*: the number of generated tokens that differ.
- *16 bits*: the distance of the outputs in bfloat16 (float16, if the file has that) from those in
  float32 with the same weights, divided by the same distance in transformers. Below 1 is nearer.
  Distances are root mean squares, and the column has the larger of the results with and without
  padding.
- *saved*: the number of tensors and outputs that differ after `save_pretrained` here and loading
  there.

In the first five columns, {ROUNDINGS} times the difference between transformers in float32 and in
float64 is allowed, and {LEAST:.0e} in any case. In the column of 16 bits {FARTHER} is allowed, and
more where few rows leave more to chance. In the other two nothing is allowed. The comparison asks
JAX for products with all bits of float32 (`jax.default_matmul_precision("highest")`), because JAX
uses fewer bits on GPUs and TPUs by default.

"""


def cells(name: str, rows: list[Row]) -> list[str]:
    """Returns a line of the table: the largest difference among the rows of each column."""
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
    torch.set_num_threads(1)  # more threads only wait for each other on arrays this small
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
