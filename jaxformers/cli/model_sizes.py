"""The model that `jaxformers plan` is about: a checkpoint, a config.json, or sizes alone."""

import os
from pathlib import Path
from typing import Any

# Published sizes of Llama 3 (Grattafiori et al. 2024, table 3).
_NAMES = "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "vocab_size"
KNOWN = {
    "8b": dict(zip(_NAMES, (4096, 32, 32, 8, 14336, 128256), strict=True)),
    "70b": dict(zip(_NAMES, (8192, 80, 64, 8, 28672, 128256), strict=True)),
    "405b": dict(zip(_NAMES, (16384, 126, 128, 8, 53248, 128256), strict=True)),
}
OPTIONAL = ("head_dim", "num_kv_heads", "tied")
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
LARGEST = 10**8  # of a size; products of two are then whole numbers of 64 bits


def find_model(text: str) -> Any:
    """Returns a model with shapes in place of its arrays, with scanned layers if they can be.

    Arguments:
        text: sizes, such as "8b" or "8b,num_layers=16"; a config.json; or a checkpoint.

    Raises:
        ValueError: if there is no such model.
    """
    import equinox as eqx

    from jaxformers.layer_stack import scan_layers

    if "=" in text or (text.lower() in KNOWN and not os.path.exists(text)):
        return sized(read_sizes(text))
    model = _outline(text)
    try:
        return eqx.filter_eval_shape(scan_layers, model)
    except ValueError:  # its layers differ, and run one by one
        return model


def _outline(text: str) -> Any:
    from jaxformers.hf.load import outline
    from jaxformers.hf.outline import outline_of_config
    from jaxformers.transformer_lm import TransformerLM

    classes, path = {"lm": TransformerLM}, Path(text)
    if path.is_file() and path.suffix == ".json":
        return outline_of_config(path, classes)
    config = path / "config.json"
    weights = [x for kind in WEIGHTS for x in path.glob(kind)]
    alone = config.is_file() and not weights
    return outline_of_config(config, classes) if alone else outline(text, classes)


def read_sizes(text: str) -> dict[str, int]:
    """Returns the sizes in a text.

    Raises:
        ValueError: if one is unknown, missing, there twice or no whole number above 0.

    Example:
        >>> read_sizes("8b,num_layers=16")["num_layers"]
        16
    """
    first, *rest = (part.strip() for part in text.split(","))
    found = dict(KNOWN.get(first.lower(), {}))
    names, seen = (*_NAMES, "head_dim", "tied"), set()
    for part in rest if found else [first, *rest]:
        name, _, number = part.partition("=")
        if name not in names or name in seen:
            raise ValueError(
                f"the sizes of a model are {', '.join(names)}, each once, perhaps after one of "
                f"{', '.join(KNOWN)}, got {part!r:.80} in {text!r:.80}."
            )
        seen.add(name)
        least = 0 if name == "tied" else 1
        most = 1 if name == "tied" else LARGEST
        if not number.isascii() or not number.isdigit() or not least <= int(number[:20]) <= most:
            raise ValueError(
                f"{name} must be a whole number from {least} to {most}, got {number!r:.80}."
            )
        found[name] = int(number)
    missing = [name for name in _NAMES if name not in found and name not in OPTIONAL]
    if missing:
        raise ValueError(
            f"the sizes {text!r:.80} have no {' and no '.join(missing)}. Add {missing[0]}=..., or "
            f"begin with one of {', '.join(KNOWN)}."
        )
    return found


def sized(sizes: dict[str, int]) -> Any:
    """Returns a model like Llama of these sizes, with shapes in place of its arrays."""
    import equinox as eqx
    import jax

    from jaxformers.layer_stack import scan_layers
    from jaxformers.layers import GatedFeedForward
    from jaxformers.norms import RMSNorm
    from jaxformers.positions.rotary import RotaryPositionalEncoding
    from jaxformers.transformer_lm import TransformerLM

    given: dict[str, Any] = {name: x for name, x in sizes.items() if name != "tied"}

    def build(key: Any) -> Any:
        model = TransformerLM(
            **{**given, "num_layers": 1},
            norm=RMSNorm,
            feed_forward=GatedFeedForward,
            position=RotaryPositionalEncoding(),
            use_bias=False,
            tie_embeddings=bool(sizes.get("tied", 0)),
            key=key,
        )
        return scan_layers(model)

    model = eqx.filter_eval_shape(build, jax.random.key(0))

    def all_layers(x: Any) -> Any:
        return jax.ShapeDtypeStruct((sizes["num_layers"], *x.shape[1:]), x.dtype)

    layers = jax.tree.map(
        lambda x: all_layers(x) if hasattr(x, "shape") else x, model.decoder.layers
    )
    return eqx.tree_at(lambda x: x.decoder.layers, model, layers)
