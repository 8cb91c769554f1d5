"""Tiny random checkpoints, written by transformers itself.

    model = make("gemma2", directory)

writes one of `CASES`, `HEADLESS` or `REFUSED` and returns the torch model that it is. No parameter
keeps a value that would hide whether it is read, such as a bias of 0.
"""

import copy
import json
from pathlib import Path

from hf_cases import CASES, HEADLESS, MAX, REFUSED, H

ALL = CASES | HEADLESS | REFUSED


def make(name, directory, seed=0):
    """Write a checkpoint; the torch model that transformers reads from it, in eval and float32."""
    import torch
    import transformers

    made = ALL[name]
    architecture = getattr(transformers, made.architecture)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = architecture.config_class(**copy.deepcopy(made.config))
        model = architecture(config, **made.options)
        if made.untied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        randomize(model)
    model.to(getattr(torch, made.dtype)).save_pretrained(directory)
    respell(Path(directory), made, model.state_dict())
    return load(name, directory)


def load(name, directory, **settings):
    """The checkpoint as transformers reads it, with other settings where they are given."""
    import transformers

    made = ALL[name]
    architecture = getattr(transformers, made.architecture)
    written = json.loads((Path(directory) / "config.json").read_text())
    config = architecture.config_class.from_dict(written | copy.deepcopy(settings))
    options = {"config": config, "attn_implementation": "eager", "dtype": "float32"}
    return architecture.from_pretrained(directory, **options, **made.options)


def randomize(model):
    """Random values everywhere: no bias is 0, no gain is 1, and attention is far from even."""
    import torch

    seen = set()
    # Embeddings first: they may be tied to an output layer, and are then drawn as embeddings.
    modules = sorted(
        model.named_modules(), key=lambda named: not isinstance(named[1], torch.nn.Embedding)
    )
    for name, module in modules:
        weights = [x for x in module.parameters(recurse=False) if x.requires_grad]
        for x in weights + saved_buffers(module):
            if id(x) in seen:  # tied to another
                continue
            seen.add(id(x))
            noise = torch.randn(x.shape)
            if isinstance(module, torch.nn.Embedding):
                # Tokens small, so that the layers have a say in what comes next.
                places = any(part in name for part in ("pos", "wpe", "relative"))
                x.data.copy_(noise if places else 0.5 * noise)
            elif x.ndim == 1 or x.shape[0] == 1 or "Norm" in type(module).__name__:
                x.data.add_(0.3 * noise)  # around what a gain or a bias is before training
            else:
                inputs = x.shape[0 if type(module).__name__ == "Conv1D" else -1]
                # T5 divides no scores by the square root of the size of a head.
                inputs *= H if name.endswith("Attention.q") else 1
                sharp = name.endswith((".q_proj", ".k_proj", ".query", ".key", "_lin"))
                x.data.copy_((1.7 if sharp else 1.2) * noise / inputs**0.5)


def saved_buffers(module):
    """Values that are no parameters and are written all the same, such as a bias of the logits."""
    buffers = module.named_buffers(recurse=False)
    return [x for name, x in buffers if name not in module._non_persistent_buffers_set]


def respell(directory, made, state):
    """Write config.json and the tensors as an older file has them."""
    import torch
    from safetensors.torch import load_file, save_file

    path = directory / "config.json"
    config = json.loads(path.read_text()) | made.json
    removed = {key for key, value in made.json.items() if value is None}
    config = {key: value for key, value in config.items() if key not in removed}
    path.write_text(json.dumps(config, indent=2))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for old, new in made.renames.items():
        tensors = {name.replace(old, new): x for name, x in tensors.items()}
    for name, source in made.added.items():
        if isinstance(source, str):
            tensors[name] = state[source].clone()
        elif name.endswith("position_ids"):
            tensors[name] = torch.arange(MAX)[None]
        else:
            tensors[name] = torch.zeros(source)
    save_file(tensors, path, {"format": "pt"})
