"""Measures loading a checkpoint: the peak of memory beside the size of its files, and the time.

    python benchmarks/loading.py [--gigabytes 1] [--dtype bfloat16] [--shard-gigabytes 5]

The script writes a Llama of random weights to a temporary directory. Fresh processes load its
tensors alone (`tensors`) and as a model (`model`). "Over the process" is the memory that loading
adds to that of Python and JAX. It should stay below 1.2 times the size of the files. Linux only.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxformers
from jaxformers.files.hub import TensorFiles, write_tensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def layer_shapes():
    d, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    queries, keys = (
        CONFIG[f"num_{name}_heads"] * CONFIG["head_dim"] for name in ("attention", "key_value")
    )
    return {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }


def model_shapes(layers):
    d, v = CONFIG["hidden_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens": (v, d), "model.norm": (d,), "lm_head": (v, d)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": s for name, s in layer_shapes().items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(directory, gigabytes, dtype, shard_gigabytes):
    """Writes layers until the files are at least this large, and returns their number."""

    def size(layers):
        return dtype.itemsize * sum(math.prod(s) for s in model_shapes(layers).values()) / 1e9

    def random(shape):
        return (0.02 * generator.standard_normal(shape, np.float32)).astype(dtype)

    generator = np.random.default_rng(0)
    layers = max(1, math.ceil((gigabytes - size(0)) / (size(1) - size(0))))
    shapes = model_shapes(layers).items()
    tensors = [(name, shape, dtype, partial(random, shape)) for name, shape in shapes]
    write_tensors(directory, tensors, round(shard_gigabytes * 1e9))
    config = CONFIG | {"num_hidden_layers": layers, "dtype": dtype.name}
    (Path(directory) / "config.json").write_text(json.dumps(config))
    return layers


def load_tensors(directory):
    files = TensorFiles(directory)
    return [jax.device_put(files.read(name)) for name in files.names]


def memory(key):
    """Returns the bytes of this process as Linux counts them: VmRSS now, VmHWM at its peak."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(what, directory):
    """Prints the bytes before, the bytes at the peak and the seconds, in a fresh process."""
    load = load_tensors if what == "tensors" else jaxformers.from_pretrained
    jax.block_until_ready(jnp.ones(3) + 1)  # starts the device
    before, start = memory("VmRSS"), time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(load(directory)))
    print(json.dumps([before, memory("VmHWM"), time.perf_counter() - start]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)

    with tempfile.TemporaryDirectory() as directory:
        sizes = options.gigabytes, jnp.dtype(options.dtype), options.shard_gigabytes
        layers = write_checkpoint(directory, *sizes)
        size = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        print(f"{size / 1e9:.3f} GB of {options.dtype}, {layers} layers")
        print("          process GB  peak GB  peak / size  over the process / size  seconds")
        for what in "tensors", "model":
            command = [sys.executable, __file__, "--measure", what, directory]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            before, peak, seconds = json.loads(run.stdout)
            figures = before / 1e9, peak / 1e9, peak / size, (peak - before) / size, seconds
            print("{:8} {:11.3f} {:8.3f} {:12.3f} {:24.3f} {:8.2f}".format(what, *figures))


if __name__ == "__main__":
    main()
