"""Checkpoints to models: the one engine, which reads the families' tables."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.files.hub import TensorFiles, check_there, has_safetensors, locate
from jaxformers.files.json_file import read_json
from jaxformers.hf.architecture import Architecture
from jaxformers.hf.family import Family
from jaxformers.hf.generation_config import read_origin
from jaxformers.hf.harmless import REDUNDANT, check_not_quantized
from jaxformers.hf.layouts import to_ours
from jaxformers.hf.model_type import KEY, family_of, guess_family
from jaxformers.hf.plan import WeightPlan, abstract
from jaxformers.hf.settings import Config, Only
from jaxformers.hf.tensors import FileTensors
from jaxformers.origin import Origin
from jaxformers.placement import put
from jaxformers.precision import check_float_dtype
from jaxformers.tokenizers.files import TOKENIZER_FILES

# What is fetched of a hub's repository beside the tokenizer's files.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model*.safetensors",
    "*.safetensors.index.json",
)
# What is fetched only where there are no safetensors.
TORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def load(path: Any, classes: Mapping[str, Any], dtype: Any = None, sharding: Any = None) -> Any:
    """The model of a checkpoint; `classes` are ours by shape. See `jaxformers.from_pretrained`."""
    directory = locate(path, [*PATTERNS, *TOKENIZER_FILES])
    if any(directory.glob("step-*.safetensors")):
        raise ValueError(
            f"{directory} has the states of a training, which is no checkpoint of Hugging Face. "
            f"jaxformers.load({str(directory)!r}) gives the model of the newest one."
        )
    if not has_safetensors(directory):
        directory = locate(path, [*PATTERNS, *TORCH_PATTERNS, *TOKENIZER_FILES])
    check_there(path, directory)
    warn_of_adapter(directory)
    config = read_json(directory / "config.json")
    family = family_of(config) if KEY in config else None
    if family is not None and family.shape not in classes:
        raise ValueError(
            f"{directory} holds a {family.model_type}, a model of shape {family.shape!r}, which "
            f"{' or '.join(x.__name__ for x in classes.values())} is not. Load it with "
            "jaxformers.from_pretrained, which knows the class."
        )
    files = TensorFiles(directory, complete=False)
    if family is None:
        family = guess_family(
            config, files, partial(fits, config=config, files=files, classes=classes)
        )
        config[KEY] = family.model_type
    a, plan, stored = plan_model(family, config, files, classes)
    origin = read_origin(directory, config, family, a.vocab_size)
    arrays = read_arrays(plan, stored, dtype, sharding)
    return with_origin(jax.tree.map(lambda path: arrays[path], plan.paths), origin)


def warn_of_adapter(directory: Path) -> None:
    """Warn of an adapter beside the weights of a whole model, which transformers would apply."""
    if (directory / "adapter_config.json").exists():
        warnings.warn(
            f"{directory} has an adapter beside the model (adapter_config.json), which is not "
            "applied. Merge it in peft, with merge_and_unload(), or remove the file if the weights "
            "hold it already.",
            stacklevel=4,
        )


def plan_model(
    family: Family, config: Mapping[str, Any], files: TensorFiles, classes: Mapping[str, Any]
) -> tuple[Architecture, WeightPlan, FileTensors]:
    """The architecture of a checkpoint, and how its tensors make the arrays of a model.

    Raises:
        ValueError: if config.json asks for what we do not have, or for other tensors.
    """
    stored = FileTensors(family, files)
    a = read_settings(family, config, stored)
    check_sizes(a, stored)
    try:
        shapes = abstract(a, classes[family.shape])
    except ValueError as error:
        raise ValueError(f"config.json describes no model that can be built: {error}") from error
    plan = WeightPlan.of(family, shapes, a)
    plan.check(stored)
    return a, plan, stored


def fits(
    family: Family, config: Mapping[str, Any], files: TensorFiles, classes: Mapping[str, Any]
) -> bool:
    """Whether a family understands a config.json and calls for just the tensors of its files."""
    try:
        return family.shape in classes and bool(plan_model(family, config, files, classes))
    except ValueError:
        return False


def read_settings(family: Family, entries: Mapping[str, Any], tensors: Any) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ValueError: if an entry has the wrong type or a meaning that is not handled.
    """
    check_not_quantized(entries)
    config = Config(entries, tensors)
    fields: dict[str, Any] = {"shape": family.shape}
    for setting in family.settings:
        try:
            setting.read(config, fields)
        except (ValueError, ArithmeticError) as error:
            if str(error).startswith("config.json"):
                raise
            raise ValueError(f"config.json: its numbers do not fit together: {error}") from error
    if family.shape != "encoder":
        Only("is_causal", (True,), True).read(config, fields)
    if family.shape == "lm":
        config.used.add("is_decoder")  # as it is
    a = Architecture(**{k: x for k, x in fields.items() if not k.startswith("_")})
    unknown = {
        key: value
        for key, value in config.unknown().items()
        if key not in REDUNDANT or value is True or value != getattr(a, REDUNDANT[key])
    }
    if unknown:
        pairs = [f"{key:.80} = {value!r:.60}" for key, value in sorted(unknown.items())]
        listed = ", ".join(pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
        raise ValueError(
            f"config.json of this {family.model_type} has settings that are not handled, and a "
            f"model that ignored them could give other numbers: {listed}. Remove those of which "
            "you know that they change nothing."
        )
    return a


def check_sizes(a: Architecture, stored: FileTensors) -> None:
    """Raise before anything is built of a config.json that asks for more than its file can hold."""
    tensors = len(stored.names)
    counts = {
        "layers": a.num_layers,
        "decoder layers": a.num_decoder_layers or 0,
        "experts in all layers": a.num_layers * (a.experts or 0),
    }
    for what, count in counts.items():
        if count > tensors:
            raise ValueError(
                f"config.json asks for {count} {what}, the file has {tensors} tensors."
            )
    # A size that is only wrong shows in the shapes, an absurd one would be felt before.
    longest = max([2**20, *(n for name in stored.names for n in stored.shape(name))])
    for name in AXES:
        size = getattr(a, name) or 0
        if size > longest:
            raise ValueError(
                f"config.json asks for a {name} of {size}, no tensor of the file is so long."
            )


AXES = (
    *("vocab_size", "src_vocab_size", "embedding_dim", "d_model", "d_ff", "decoder_d_ff"),
    *("num_heads", "num_kv_heads", "decoder_num_heads", "head_dim", "t5_buckets", "token_types"),
    *("max_seq_length", "position_offset"),
)


def read_arrays(
    plan: WeightPlan, stored: FileTensors, dtype: Any, sharding: Any
) -> dict[str, jax.Array]:
    """The arrays of a model, read one tensor at a time and put where they belong."""
    if isinstance(sharding, Mesh):
        raise ValueError("sharding must be a Sharding, got a Mesh: pass NamedSharding(mesh, spec).")
    names = [name for rule in plan.rules for name in rule.theirs]
    dtype = read_dtype(dtype, {stored.dtype(name) for name in names})
    arrays = {}
    for rule in plan.rules:
        tensors = [check_finite(name, stored.read(name)) for name in rule.theirs]
        made = to_ours(rule, tensors, [plan.leaves[path].shape for path in rule.ours])
        for path, x in zip(rule.ours, made, strict=True):
            x = cast(rule.theirs[0], x, dtype)
            arrays[path] = put(path, x, sharding)
    return arrays


def read_dtype(dtype: Any, stored: set[Any]) -> Any:
    """The type that weights get: as asked, else that of the file (the widest, if it mixes them)."""
    if dtype is not None:
        return check_float_dtype(dtype=dtype)
    widest = jnp.float32 if len(stored) > 1 else next(iter(stored))
    return jax.dtypes.canonicalize_dtype(widest)


def cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers of a tensor in another type, or an error if they are too large for it."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if not is_finite(x):
        raise ValueError(
            f"the tensor {name} holds numbers that are too large for {dtype}. Pass another dtype=, "
            "such as jnp.float32."
        )
    return x


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """The tensor itself, or an error if it holds NaN or infinity."""
    if not is_finite(x):
        raise ValueError(
            f"the tensor {name} holds numbers that are NaN or infinite: the file is damaged."
        )
    return x


def is_finite(x: np.ndarray) -> bool:
    """Looked at in steps: of the whole, the answers would take a quarter of its memory."""
    flat, step = x.ravel(order="K"), 1 << 22  # no copy, even of what is transposed
    return all(np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step))


def with_origin(model: Any, origin: Origin) -> Any:
    """The same model, which knows where it came from."""
    model = jax.tree.map(lambda x: x, model)
    object.__setattr__(model, "origin", origin)  # a fresh copy that nobody has seen yet
    return model
