"""How far checkpoints loaded here are from transformers: writes docs/parity.md.

    python benchmarks/parity.py [NAME ...]

Needs `pip install 'jaxformers[hf,parity]'`. The checkpoints are those of the tests: tiny, random,
one or more of every family. With names, only these are compared, and printed instead of written.
"""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from hf_cases import CASES  # noqa: E402
from hf_checkpoints import make  # noqa: E402

from jaxformers.hf.reference import torch_without_gradients  # noqa: E402
from jaxformers.hf.verify import LEFT, NO_PADDING, RIGHT, TOLERANCE, Row, verify  # noqa: E402

PACKAGES = "jax", "equinox", "torch", "transformers"
# What rows a column holds: those with this in their name.
COLUMNS = {
    "no padding": NO_PADDING,
    "right padding": RIGHT,
    "left padding": LEFT,
    "greedy": "log-probs, greedy",
    "beam search": "log-probs, beam search",
    "other tokens": "tokens, ",
    "saved": ", saved",
}
HEAD = f"""# Parity with transformers

Tiny random checkpoints of every family, loaded here and in transformers, in float32. Written by
`python benchmarks/parity.py`; `python -m jaxformers verify PATH` makes the same comparison of a
checkpoint of your own. At most {TOLERANCE:.0e} is allowed in the first five columns, nothing in the
other two.

- *no padding*, *right padding*, *left padding*: largest difference of log-probabilities, hidden
  states, pooled vectors and logits of classes, whichever of them the model has.
- *greedy*, *beam search*: of the log-probabilities of generated tokens (of whole beams).
- *other tokens*: how many generated tokens differ.
- *saved*: tensors and outputs that differ after `save_pretrained` here and loading there.

"""


def cells(name: str, rows: list[Row]) -> list[str]:
    """A line of the table: the largest difference of each column's rows."""
    line = [f"`{name}`", CASES[name].architecture]
    for column in COLUMNS.values():
        found = [row.difference for row in rows if column in row.name]
        line.append(f"{max(found):.0e}".replace("0e+00", "0") if found else "")
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
