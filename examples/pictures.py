"""Draws the pictures of docs/looking-inside.md, of a model that learns a rhyme in half a minute.

python examples/pictures.py docs/pictures
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from jaxformers import (
    AdamW,
    RotaryPositionalEncoding,
    TransformerLM,
    YarnScaling,
    attention_maps,
    fit,
    keep_compiled_programs,
    language_model_loss,
)
from jaxformers.data import Windows
from jaxformers.inspect import logit_lens
from jaxformers.plot import attention_grid, logit_lens_table, rotary_angles

RHYME = b"How doth the little crocodile improve his shining tail,\n" * 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    keep_compiled_programs()
    position = RotaryPositionalEncoding()
    model = TransformerLM(256, 64, 4, 2, 256, position=position, key=jax.random.key(0))
    batches = Windows(np.frombuffer(RHYME, np.uint8), length=64, batch_size=8)
    options = {"loss": language_model_loss, "steps": args.steps, "key": jax.random.key(1)}
    model = fit(model, AdamW(3e-3), batches, **options).model
    tokens = np.frombuffer(RHYME[:19], np.uint8)[None]
    labels = characters(tokens[0].tolist())
    maps, logits = attention_maps(model, tokens), logit_lens(model, tokens)
    attention_grid(maps, labels, heads=[0, 1, 2], save=args.directory / "attention.png")
    logit_lens_table(logits, characters, labels, save=args.directory / "logit_lens.png")
    scaled = RotaryPositionalEncoding(scaling=YarnScaling(8.0, 256))
    rotary_angles(scaled, save=args.directory / "yarn.png")


def characters(ids: list[int]) -> list[str]:
    return [chr(i) for i in ids]


if __name__ == "__main__":
    main()
