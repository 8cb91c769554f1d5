"""Measures causal attention alone, forward and backward, on longer and longer sequences.

    python benchmarks/long_context.py [1k 4k 16k ...] [--contenders ours torch ...] [--json FILE]

The input is one sequence with 12 heads of 64 features (GPT-2's), the same for all contenders. Some
outputs and gradients must agree. The peak memory shows which contenders make all scores: at 16k
these take 13 GB in float32. `plain` makes them, so it is left out where they would not fit. Where
JAX finds a GPU, the inputs are in bfloat16 and up to 128k long.
"""

import sys
from functools import partial

import contest
import numpy as np

HEADS, FEATURES = 12, 64
LENGTHS = {"1k": 2**10, "4k": 2**12, "16k": 2**14}
ON_GPU = {"32k": 2**15, "64k": 2**16, "128k": 2**17}
LONGEST_PLAIN = 2**12
REPEATS = {"1k": 4}


def configs(gpu: bool) -> dict[str, dict]:
    lengths = LENGTHS | (ON_GPU if gpu else {})
    return {
        name: {
            "t": t,
            "dtype": "bfloat16" if gpu else "float32",
            "without": ["plain"] if t > LONGEST_PLAIN else [],
        }
        for name, t in lengths.items()
    }


def numbers(config: dict) -> list[np.ndarray]:
    """Returns queries, keys, values and the gradient of the outputs."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, HEADS, config["t"], FEATURES), np.float32) for _ in range(4)]


def samples(arrays) -> list[float]:
    """Returns a few numbers from the beginning, the middle and the end of each array."""
    places = np.linspace(0, arrays[0].shape[2] - 1, 5).astype(int)
    return [float(x) for array in arrays for x in np.asarray(array[0, 3, places, 7], np.float32)]


def ours(config, kernel="fast_attention"):
    import jax
    import jax.numpy as jnp

    import jaxformers

    mask = jaxformers.AttentionMask(causal=True)
    q, k, v, gradient = (jnp.asarray(x, config["dtype"]) for x in numbers(config))

    @jax.jit
    def run(q, k, v, gradient):
        attend = partial(getattr(jaxformers, kernel), mask=mask)
        if config.get("forward_only"):
            return (attend(q, k, v),)
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
        return out, *pull(gradient)

    def step():
        return jax.block_until_ready(run(q, k, v, gradient))

    return step, lambda: samples(step())


def plain(config):
    return ours(config, "dot_product_attention")


def torch_attention(config):
    """Builds torch's fused attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config["dtype"])
    *qkv, gradient = (torch.from_numpy(x).to(device, dtype) for x in numbers(config))
    forward_only = config.get("forward_only", False)
    for x in qkv:
        x.requires_grad_(not forward_only)

    def step():
        out = scaled_dot_product_attention(*qkv, is_causal=True)
        grads = () if forward_only else torch.autograd.grad(out, qkv, gradient)
        if device == "cuda":
            torch.cuda.synchronize()
        return out.detach(), *grads

    return step, lambda: samples([x.float().cpu() for x in step()])


CONTENDERS = {"ours": ours, "plain": plain}
if contest.installed("torch"):
    CONTENDERS |= {"torch": torch_attention}

if __name__ == "__main__":
    gpu = "--child" not in sys.argv and contest.found_gpu() is not None
    contest.main(
        __doc__, CONTENDERS, configs(gpu), repeats=REPEATS, tolerance=0.05 if gpu else 1e-3
    )
