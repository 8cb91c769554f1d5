"""The weights and the data that the contenders of train.py share."""

import math
from functools import partial

import numpy as np

RATE, B1, B2, EPS, DECAY = 3e-4, 0.9, 0.95, 1e-8, 0.1


def normal(rng: np.random.Generator, *shape: int, scale: float = 0.02) -> np.ndarray:
    return rng.normal(0, scale, shape).astype(np.float32)


def decoder_weights(config: dict) -> dict[str, np.ndarray]:
    """Returns the arrays of a decoder of nanoGPT's shape by name, layers stacked."""
    draw = partial(normal, np.random.default_rng(0))
    v, d, n, t = config["vocab"], config["d_model"], config["layers"], config["t"]
    residual = 0.02 / math.sqrt(2 * n)
    return {
        "tokens": draw(v, d),
        "positions": draw(t, d),
        "qkv": draw(n, d, 3 * d),
        "out": draw(n, d, d, scale=residual),
        "up": draw(n, d, 4 * d),
        "down": draw(n, 4 * d, d, scale=residual),
    }


def decoder_text(config: dict) -> np.ndarray:
    """Returns rows of t + 1 tokens, which hold the inputs and, shifted by one, the targets."""
    shape = config["batch"], config["t"] + 1
    return np.random.default_rng(1).integers(0, config["vocab"], shape)


def seq2seq_weights(config: dict) -> dict[str, np.ndarray]:
    """Returns the arrays of an encoder-decoder by name; an attention has four maps."""
    draw = partial(normal, np.random.default_rng(0), scale=0.05)
    d, n, v = config["d_model"], config["layers"], config["vocab"]
    tables = {"src": (v, d), "tgt": (v, d), "head": (d, v)}
    places = {"src_positions": (config["source"], d), "tgt_positions": (config["t"], d)}
    maps = {"encoder": (n, 4, d, d), "decoder": (n, 4, d, d), "cross": (n, 4, d, d)}
    for stack in ("encoder", "decoder"):
        maps |= {f"{stack}_up": (n, d, 4 * d), f"{stack}_down": (n, 4 * d, d)}
    return {name: draw(*shape) for name, shape in (tables | places | maps).items()}


def seq2seq_text(config: dict) -> tuple[np.ndarray, np.ndarray]:
    rng, b = np.random.default_rng(1), config["batch"]
    shapes = (b, config["source"]), (b, config["t"] + 1)
    return tuple(rng.integers(0, config["vocab"], shape) for shape in shapes)


def timed(step, count: int = 4):
    """Returns a step and the losses of its first calls."""
    return step, lambda: [float(step()) for _ in range(count)]
