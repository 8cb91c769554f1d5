"""Loads a checkpoint as a model, by the table of its family."""

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxformers.checks import check_flag
from jaxformers.files.gguf_file import find_gguf
from jaxformers.files.hub import TensorFiles, check_there, has_safetensors, locate
from jaxformers.files.json_file import read_json
from jaxformers.hf.architecture.record import Architecture, option_name
from jaxformers.hf.arrays import read_arrays
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.harmless import REDUNDANT, check_not_quantized
from jaxformers.hf.config.settings import Only
from jaxformers.hf.family import Family
from jaxformers.hf.fresh_head import FreshHead
from jaxformers.hf.generation_config import read_origin
from jaxformers.hf.gguf.checkpoint import open_gguf
from jaxformers.hf.model_type import KEY, choose_table, family_of, guess_family
from jaxformers.hf.plan import WeightPlan, abstract
from jaxformers.hf.quantized.checkpoint import open_quantized
from jaxformers.hf.tensors import FileTensors
from jaxformers.origin import Origin
from jaxformers.tokenizers.files import TOKENIZER_FILES

# The files that are fetched from a repository of a hub, beside the tokenizer's.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.*",
    "model*.safetensors",
    "*.safetensors.index.json",
)
# The files that are fetched only where there are no safetensors.
TORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def load(
    path: Any,
    found: Path,
    classes: Mapping[str, Any],
    dtype: Any = None,
    sharding: Any = None,
    head: FreshHead | None = None,
    quantized: bool = False,
) -> Any:
    """Returns the model of a checkpoint.

    Arguments:
        path: as in `jaxformers.from_pretrained`.
        found: where it is, from `find_checkpoint`.
        classes: our classes by shape. A checkpoint of another shape is refused.
        dtype: as in `jaxformers.from_pretrained`.
        sharding: as in `jaxformers.from_pretrained`.
        head: a classifier that the checkpoint shall get.
        quantized: as in `jaxformers.from_pretrained`.
    """
    check_flag(quantized=quantized)
    plan, stored, origin = plan_checkpoint(path, found, classes, head)
    arrays = read_arrays(plan, stored, dtype, sharding, quantized)
    return with_origin(jax.tree.map(lambda path: arrays[path], plan.paths), origin)


def outline(path: Any, classes: Mapping[str, Any]) -> Any:
    """Returns the model of a checkpoint with shapes and types in place of its arrays.

    No weights are read. Arguments are those of `load`.
    """
    plan, stored, origin = plan_checkpoint(path, find_checkpoint(path), classes)
    shapes = {
        ours: jax.ShapeDtypeStruct(plan.leaves[ours].shape, stored.dtype(rule.theirs[0]))
        for rule in plan.rules
        for ours in rule.ours
    }
    return with_origin(jax.tree.map(lambda path: shapes[path], plan.paths), origin)


def plan_checkpoint(
    path: Any, found: Path, classes: Mapping[str, Any], head: FreshHead | None = None
) -> tuple[WeightPlan, FileTensors, Origin]:
    """Returns the plan for the model of a checkpoint, its tensors, and its origin; see `load`."""
    directory, config, files = open_checkpoint(path, found)
    family = choose_table(family_of(config), config, files, classes) if KEY in config else None
    if family is not None and family.shape not in classes:
        raise ValueError(
            f"{directory} holds a {family.model_type}, a model of shape {family.shape!r}, which "
            f"{' or '.join(x.__name__ for x in classes.values())} is not. Load it with "
            "jaxformers.from_pretrained, which knows the class."
        )
    if family is None:
        family = guess_family(
            config, files, partial(fits, config=config, files=files, classes=classes)
        )
        config[KEY] = family.model_type
        family = choose_table(family, config, files, classes)
    stored = FileTensors(family, files)
    config = config if head is None else head.begin(stored, config)
    a, plan = plan_model(config, stored, classes, head)
    return plan, stored, read_origin(directory, config, family, a.vocab_size, stored.bare)


def find_checkpoint(path: Any) -> Path:
    """Returns the GGUF file of a checkpoint, or its directory, downloaded if it is on the hub."""
    return find_gguf(path) or locate(path, [*PATTERNS, *TOKENIZER_FILES])


def open_checkpoint(path: Any, directory: Path) -> tuple[Path, dict[str, Any], TensorFiles]:
    """Returns the directory or GGUF file of a checkpoint, its config.json and its tensors."""
    if os.path.isfile(directory):
        return directory, *open_gguf(directory)
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
    return directory, *open_quantized(config, TensorFiles(directory, complete=False))


def warn_of_adapter(directory: Path) -> None:
    """Warns of an adapter beside the weights of a whole model, which transformers would apply."""
    if (directory / "adapter_config.json").exists():
        warnings.warn(
            f"{directory} has an adapter beside the model (adapter_config.json), which is not "
            f"applied: jaxformers.load_adapter(model, {str(directory)!r}) puts it on the model. "
            "Remove the file if the weights hold it already, as after merge_and_unload() of peft.",
            stacklevel=4,
        )


def plan_model(
    config: Mapping[str, Any],
    stored: FileTensors,
    classes: Mapping[str, Any],
    head: FreshHead | None = None,
) -> tuple[Architecture, WeightPlan]:
    """Returns the architecture of a checkpoint and the plan for its arrays.

    Raises:
        ValueError: if config.json describes a model that we do not have, or other tensors.
    """
    family = stored.family
    a = read_settings(family, config, stored)
    check_sizes(a, stored)
    try:
        shapes = abstract(a, classes[family.shape])
    except ValueError as error:
        raise ValueError(f"config.json describes no model that can be built: {error}") from error
    plan = WeightPlan.of(family, shapes, a)
    if head is not None:
        head.finish(stored, plan, config.get("initializer_range"))
    stored.discard_empty_biases(plan.shapes())
    plan.check(stored)
    return a, plan


def fits(
    family: Family, config: Mapping[str, Any], files: TensorFiles, classes: Mapping[str, Any]
) -> bool:
    """Returns whether a family understands a config.json and needs just these tensors."""
    try:
        family = choose_table(family, config, files, classes)
        stored = FileTensors(family, files)
        return family.shape in classes and bool(plan_model(config, stored, classes))
    except ValueError:
        return False


def read_settings(family: Family, entries: Mapping[str, Any], tensors: Any) -> Architecture:
    """Returns the architecture that a config.json describes.

    Raises:
        ValueError: if an entry has the wrong type or a meaning that is not handled.
    """
    check_not_quantized(entries)
    config = Config(entries, tensors, family.classes.get("base"))
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
        config.used.add("is_decoder")  # all of them are
    a = Architecture.of({k: x for k, x in fields.items() if not k.startswith("_")})
    flat = a.flat()
    unknown = {
        key: value
        for key, value in config.unknown().items()
        if key not in REDUNDANT or value is True or value != flat[REDUNDANT[key]]
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
    """Raises if a config.json asks for more than its file can hold, before anything is built."""
    tensors = len(stored.names)
    counts = {
        "layers": a.num_layers,
        "decoder layers": a.num_decoder_layers or 0,
        "experts in all layers": a.num_layers * (a.feed_forward.experts or 0),
    }
    for what, count in counts.items():
        if count > tensors:
            raise ValueError(
                f"config.json asks for {count} {what}, the file has {tensors} tensors."
            )
    # Shapes show a wrong size, but an absurd one would fill the memory before they are compared.
    longest = max([2**20, *(n for name in stored.names for n in stored.shape(name))])
    flat = a.flat()
    for name in AXES:
        size = flat[name] or 0
        if size > longest:
            raise ValueError(
                f"config.json asks for a {option_name(name)} of {size}, no tensor of the file is "
                "so long."
            )


AXES = (
    *("vocab_size", "src_vocab_size", "embedding.dim", "d_model", "feed_forward.d_ff"),
    *("feed_forward.decoder_d_ff", "attention.num_heads", "attention.num_kv_heads"),
    *("attention.decoder_num_heads", "attention.head_dim", "position.t5_buckets"),
    *("embedding.token_types", "position.max_seq_length", "position.offset"),
)


def with_origin(model: Any, origin: Origin) -> Any:
    """Returns the same model, which knows where it came from."""
    model = jax.tree.map(lambda x: x, model)
    object.__setattr__(model, "origin", origin)  # a fresh copy that nobody has seen yet
    return model
