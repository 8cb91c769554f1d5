"""Measures decoding: the bytes of a call beside those of its cache, and the time per token.

    python benchmarks/decoding.py [--d-model 256] [--layers 4] [--batch 4]

Temporary memory should be the cache and a remainder that does not grow with the number of tokens.
The time per token should grow with the slots, which the attention reads, and not with the number of
tokens generated before. Times are medians of several calls, minus the time of a call for few
tokens.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from jaxformers import RotaryPositionalEncoding, TransformerLM
from jaxformers.generation.loop import run
from jaxformers.generation.request import read_request

VOCABULARY = 512


def cache_bytes(model, batch, slots):
    shapes = jax.eval_shape(lambda: model.init_cache(batch, slots))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def memory(model, prompt, new):
    """Returns the bytes of the cache, and of the compiled call's temporary buffers and results."""
    request = read_request(model, prompt, new, {})
    program = run.lower(model, request.plan, *request.arrays, None, False).compile().compiled
    analysis = program.memory_analysis()
    cache = cache_bytes(model, len(prompt), request.slots)
    return request.slots, cache, analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def seconds(model, prompt, budgets, rounds=9):
    """Returns the median time of a call for each budget, measured in turns on a busy machine."""
    times = {new: [] for new in budgets}
    for new in budgets:
        model.generate(prompt, new)
    for _ in range(rounds):
        for new in budgets:
            start = time.perf_counter()
            model.generate(prompt, new).block_until_ready()
            times[new].append(time.perf_counter() - start)
    return {new: statistics.median(values) for new, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    sizes = VOCABULARY, options.d_model, 4, options.layers, 4 * options.d_model
    model = TransformerLM(*sizes, position=RotaryPositionalEncoding(), key=jax.random.key(0))
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, 16))

    print("   new  slots  cache MB  temporary MB  of it not cache  result MB")
    for new in (64, 256, 1024, 2048):
        slots, cache, temporary, output = (x for x in memory(model, prompt, new))
        megabytes = [x / 1e6 for x in (cache, temporary, temporary - cache, output)]
        print("{:6} {:6} {:9.2f} {:13.2f} {:16.2f} {:10.2f}".format(new, slots, *megabytes))

    budgets = 769, 832, 896, 960, 1024  # one program, since they share a bucket and so the slots
    times = seconds(model, prompt, budgets)
    print("one program of 1040 slots; tokens generated, ms per token on average")
    for new in budgets:
        print(f"{new:6} {1e3 * times[new] / new:9.3f}")


if __name__ == "__main__":
    main()
