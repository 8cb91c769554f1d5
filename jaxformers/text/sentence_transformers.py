"""The files of sentence-transformers: what its directory says of a model of embeddings.

`modules.json` lists what makes a vector of a text: the model, the pooling, and layers after it.
Each is in a folder with a config.json of its own. `sentence_bert_config.json` beside the model says
how texts are read, and `config_sentence_transformers.json` holds prompts. What a file asks for and
is not handled is an error, since the vectors would be others.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxformers.files.json_file import parse_json, read_json, shorten
from jaxformers.text.layers import read_layer, settings_of
from jaxformers.text.similarity import SIMILARITIES

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# The settings of the model's module; older versions named them by the kind of model.
READING = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The files that are fetched from a repository of a hub, beside those of a checkpoint.
FILES = (
    *(MODULES, SETTINGS, "sentence_*_config.json", "*_Pooling/*", "*_Dense/*", "*_LayerNorm/*"),
    *("*_Normalize/*", "*_Dropout/*", "0_*/*.json", "0_*/*.txt", "0_*/model*.safetensors"),
)

# Our classes for the kinds of models.
CLASSES = {"SentenceTransformer": "TextEmbedder", "CrossEncoder": "TextClassifier"}

# The names of poolings, in the order of their vectors in older files, with ours.
POOLINGS = {
    "cls": "first",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
OLDER_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Settings of how PyTorch runs the model, which change no numbers that count here.
_HARMLESS = (
    *("add_pooling_layer", "attn_implementation", "device_map", "dtype", "torch_dtype"),
    *("low_cpu_mem_usage", "padding_side", "trust_remote_code", "use_cache", "use_fast"),
    *("use_memory_efficient_attention", "unpad_inputs"),
)


class Described(NamedTuple):
    """What a directory says of how a text becomes a vector.

    Arguments:
        transformer: the directory of the model.
        pooling: the names of the poolings, ours; None if no file says it.
        include_prompt: whether the tokens of a prompt are pooled.
        layers: what is applied after the pooling.
        max_seq_length: the largest number of tokens in a row; None if no file says it.
        do_lower_case: whether texts are put into lower case first.
        prompts: by name.
        default_prompt: the name of the one that is used if none is named.
        similarity: how vectors are compared.
        truncate_dim: the number of features that are kept; None keeps all.
    """

    transformer: Path
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    layers: tuple[Callable, ...] = ()
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = {}
    default_prompt: str | None = None
    similarity: str = "cosine"
    truncate_dim: int | None = None


def describe(directory: Path) -> Described:
    """Returns what the files of a directory say; of a plain checkpoint they say nothing.

    Raises:
        ValueError: if a file is damaged or asks for what we do not have.
    """
    if not (directory / MODULES).exists():
        return Described(directory)
    settings = _read_settings(directory, "SentenceTransformer")
    modules = read_modules(directory)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ValueError(
            f"{directory / MODULES} must list Transformer and Pooling first, got "
            f"{', '.join(kinds)}. Other modules make no vector of hidden states."
        )
    transformer, folder = modules[0][1], modules[1][1]
    names, include_prompt = _read_pooling(settings_of(folder), folder)
    layers = [read_layer(kind, path) for kind, path in modules[2:]]
    return Described(
        transformer,
        names,
        include_prompt,
        tuple(layer for layer in layers if layer is not None),
        **read_reading(transformer, "feature-extraction"),
        **settings,
    )


def describe_classifier(directory: Path) -> Described:
    """Returns what the files of a CrossEncoder say; of a plain checkpoint they say nothing.

    Raises:
        ValueError: if a file is damaged or asks for what we do not have.
    """
    if not (directory / MODULES).exists():
        return Described(directory)
    settings = _read_settings(directory, "CrossEncoder")
    [(kind, transformer), *others] = read_modules(directory)
    if kind != "Transformer" or others:
        raise ValueError(
            f"{directory / MODULES} must list a Transformer alone, got "
            f"{', '.join([kind, *(name for name, _ in others)])}, which is not handled."
        )
    return Described(
        transformer, **read_reading(transformer, "sequence-classification"), **settings
    )


def read_modules(directory: Path) -> list[tuple[str, Path]]:
    """Returns the modules that `modules.json` lists: the name of each class, and its folder."""
    path = directory / MODULES
    # The file holds a list, and the strict reader is for objects.
    listed = parse_json(b'{"modules":' + path.read_bytes() + b"}", str(path))["modules"]
    if not (isinstance(listed, list) and listed and all(isinstance(x, dict) for x in listed)):
        raise ValueError(f"{path} must be a list of modules, got {shorten(listed)}.")
    modules = []
    for entry in listed:
        kind, folder = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not re.fullmatch(r"sentence_transformers\.[\w.]+", kind):
            raise ValueError(
                f"{path}: modules of sentence-transformers are read, got {shorten(kind)}, whose "
                "code is elsewhere."
            )
        if not isinstance(folder, str) or not re.fullmatch(r"(\w[\w .-]*)?", folder):
            raise ValueError(f"{path}: path must name a folder beside it, got {shorten(folder)}.")
        modules.append((kind.rpartition(".")[2], directory / folder))
    return modules


def read_reading(transformer: Path, task: str) -> dict[str, Any]:
    """Returns how texts are read: `max_seq_length` and `do_lower_case`.

    Arguments:
        transformer: the directory of the model.
        task: of the model, in sentence-transformers' words.

    Raises:
        ValueError: if the texts are read in a way that we do not have.
    """
    path = next((transformer / name for name in READING if (transformer / name).exists()), None)
    if path is None:
        return {}
    settings = read_json(path)
    _check_inputs(path, settings, task)
    for old, name in (("tokenizer_args", "processor_kwargs"), ("model_args", "model_kwargs")):
        if old in settings:
            settings[name] = settings.pop(old)
    options = _object(path, settings, "processor_kwargs")
    longest = settings.get("max_seq_length") or options.pop("model_max_length", None)
    for name in ("processor_kwargs", "model_kwargs", "config_args", "config_kwargs"):
        others = {k: x for k, x in _object(path, settings, name).items() if k not in _HARMLESS}
        if others.keys() - ({"model_max_length"} if name == "processor_kwargs" else set()):
            raise ValueError(f"{path} has {name} that are not handled: {shorten(others)}.")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{path}: max_seq_length must be a number above 0, got {longest!r:.60}.")
    lower = settings.get("do_lower_case", False)
    if not isinstance(lower, bool):
        raise ValueError(f"{path}: do_lower_case must be true or false, got {shorten(lower)}.")
    return {"max_seq_length": longest, "do_lower_case": lower}


def _object(path: Path, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns an object within the settings, empty if there is none."""
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} must be an object, got {shorten(value)}.")
    return value


def _check_inputs(path: Path, settings: dict[str, Any], task: str) -> None:
    """Raises unless the model reads plain texts and gives what a model of the task gives."""
    output = {"feature-extraction": "last_hidden_state"}.get(task, "logits")
    expected: dict[str, Any] = {
        "transformer_task": task,
        "module_output_name": {"feature-extraction": "token_embeddings"}.get(task, "scores"),
        "modality_config": {"text": {"method": "forward", "method_output_name": output}},
        "processing_kwargs": {},
        "query_length": None,
        "document_length": None,
        "query_expansion": None,
    }
    known = {
        *("max_seq_length", "do_lower_case", "unpad_inputs", "tokenizer_args", "model_args"),
        *("processor_kwargs", "model_kwargs", "config_args", "config_kwargs"),
    }
    for name, value in settings.items():
        if name in expected and value not in (None, expected[name]):
            raise ValueError(
                f"{path}: {name} must be {expected[name]!r}, got {shorten(value)}, which is not "
                "handled."
            )
        if name not in expected and name not in known:
            raise ValueError(f"{path} has a setting that is not handled: {name} = {value!r:.60}.")


def _read_pooling(settings: dict[str, Any], folder: Path) -> tuple[tuple[str, ...], bool]:
    """Returns the names of the poolings, ours, and whether the tokens of a prompt count."""
    path = folder / "config.json"
    known = {*OLDER_POOLINGS, "pooling_mode", "include_prompt"}
    known |= {"word_embedding_dimension", "embedding_dimension"}
    if unknown := settings.keys() - known:
        raise ValueError(f"{path} has settings that are not handled: {sorted(unknown)}.")
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for name, mode in OLDER_POOLINGS.items() if settings.get(name)]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if not isinstance(modes, list) or not all(
        isinstance(mode, str) and mode in POOLINGS for mode in modes
    ):
        raise ValueError(
            f"{path}: pooling_mode must be of {', '.join(POOLINGS)}, got {shorten(modes)}."
        )
    include = settings.get("include_prompt", True)
    if not isinstance(include, bool):
        raise ValueError(f"{path}: include_prompt must be true or false, got {shorten(include)}.")
    return tuple(POOLINGS[mode] for mode in modes), include


def _read_settings(directory: Path, model_type: str) -> dict[str, Any]:
    """Returns what `config_sentence_transformers.json` says, by the names of `Described`."""
    path = directory / SETTINGS
    settings = read_json(path) if path.exists() else {}
    kind = settings.get("model_type", model_type)
    if kind != model_type:
        reader = CLASSES.get(kind) if isinstance(kind, str) else None
        raise ValueError(
            f"{directory} holds a {shorten(kind)}, not a {model_type}. "
            + (f"{reader} reads it." if reader else "Nothing here reads it.")
        )
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise ValueError(f"{path}: prompts must be an object of texts, got {shorten(prompts)}.")
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(
            f"{path}: default_prompt_name must be one of {list(prompts)}, got {shorten(default)}."
        )
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"{path}: similarity_fn_name must be one of {', '.join(SIMILARITIES)}, got "
            f"{shorten(similarity)}."
        )
    dim = settings.get("truncate_dim")
    if dim is not None and (type(dim) is not int or dim < 1):
        raise ValueError(f"{path}: truncate_dim must be a number above 0, got {shorten(dim)}.")
    return {
        "prompts": {name: text or "" for name, text in prompts.items()},
        "default_prompt": default,
        "similarity": similarity,
        "truncate_dim": dim,
    }
