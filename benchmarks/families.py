"""Writes the table of families into docs/families.md, from the tables that read and write them.

python benchmarks/families.py
"""

from pathlib import Path

from jaxformers.hf.families import FAMILIES
from jaxformers.hf.family import Family

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- written by benchmarks/families.py -->\n\n", "\n<!-- until here -->\n"
MODELS = {"lm": "TransformerLM", "seq2seq": "Transformer", "encoder": "TransformerEncoder"}


def classes_of(family: Family) -> list[str]:
    """Returns the classes of transformers that a family's checkpoints are of."""
    encoder = [] if family.encoder is None else classes_of(family.encoder)
    return list(dict.fromkeys([*family.classes.values(), *encoder]))


def table() -> str:
    """Returns a row for each family: its model_type, our class, and the classes of transformers."""
    rows = [
        "| `model_type` in config.json | our class | classes in transformers |",
        "|---|---|---|",
    ]
    for shape, model in MODELS.items():
        for name, family in sorted(FAMILIES.items()):
            if family.shape == shape:
                classes = ", ".join(f"`{x}`" for x in classes_of(family))
                rows.append(f"| `{name}` | `{model}` | {classes} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """Returns the page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE.name} must have {BEGIN.strip()!r} and {END.strip()!r}.")
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
