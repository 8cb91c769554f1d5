"""Descriptions of the files in a directory that is not a checkpoint, with advice.

Other tools write other files. An error that only names a missing file does not help then, so the
errors of loading end with the sentences of this module.
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxformers.files.json_file import shorten

MAX_NAMES = 2000  # the limit in a directory; in each folder below it is a tenth


class Kind(NamedTuple):
    """A kind of files: patterns of their names, and advice on them."""

    patterns: tuple[str, ...]
    advice: str


TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.spm"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json", "tekken.json"),
)
# The weights of a checkpoint, or their index.
WHOLE = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.th")
# The kind of a file is the first one with a pattern that matches.
KINDS = (
    Kind(
        (
            *("adapter_config.json", "adapter_model.*", "adapter.*", "adapters.*"),
            *("pytorch_adapter.bin", "pytorch_lora_weights.*", "*lora*.safetensors"),
        ),
        "An adapter has to be merged into its model, unless it is a directory of PEFT with "
        "adapter_config.json and adapter_model.safetensors: jaxformers.load_adapter(model, "
        "directory) puts it on its model.",
    ),
    Kind(
        ("*.gguf", "*.ggml", "ggml-*.bin", "*.llamafile"),
        "GGUF files, of llama.cpp, are read one at a time: fetch one, such as with hf download "
        "owner/name model.gguf --local-dir ., and pass its path. Other formats of llama.cpp are "
        "not read.",
    ),
    Kind(
        (
            *("*.onnx", "*.onnx_data", "*.onnx.data", "*.ort", "*.tflite", "*.mlmodel", "*.pte"),
            *("*.mlpackage", "*.mlpackage/*", "*.engine", "*.plan", "openvino_*.xml"),
            *("openvino_*.bin", "*.neuron", "*.hef"),
        ),
        "An exported graph (ONNX, Core ML, TensorRT, OpenVINO and the like) has lost the names of "
        "the model's weights. Pass the checkpoint that it was exported from.",
    ),
    Kind(
        ("model_index.json",),
        "It is a pipeline of diffusers with several models. Pass the directory within it that has "
        "the language model, such as text_encoder.",
    ),
    Kind(
        ("*zero_to_fp32.py", "global_step*", "*zero_pp_rank*", "*mp_rank_*", "bf16_zero_pp*"),
        "They are parts of a training with DeepSpeed. Put them together with its script, python "
        "zero_to_fp32.py . pytorch_model.bin, beside the model's config.json.",
    ),
    Kind(
        ("*.distcp", "pytorch_model_fsdp*", "distributed_checkpoint*", ".metadata"),
        "They are parts of a distributed training with PyTorch. Put them together once: accelerate "
        "merge-weights directory other_directory.",
    ),
    Kind(
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "It is the format of the model's authors. Pass the same model in the format of Hugging "
        "Face, with config.json and model.safetensors; transformers has a script that converts "
        "it (src/transformers/models/<family>/convert_*.py).",
    ),
    Kind(
        ("*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*", "*.ckpt-*", "saved_model.pb", "*.keras"),
        "They are files of TensorFlow, which is not supported. transformers 4 has scripts for the "
        "first checkpoints of BERT and its variants "
        "(convert_*_original_tf_checkpoint_to_pytorch.py).",
    ),
    Kind(
        ("*.msgpack", "*.h5", "*.hdf5"),
        "Weights of Flax and TensorFlow are not read. transformers 4 converts them once: "
        "from_pretrained(directory, from_flax=True) or from_tf=True, then "
        "save_pretrained(directory).",
    ),
    Kind(
        ("_CHECKPOINT_METADATA", "ocdbt.process_*", "orbax_checkpoint*"),
        "They are files of orbax, which trainings in JAX write. jaxformers.load(directory) returns "
        "the model of a training with OrbaxCheckpoints. Other libraries can export their models.",
    ),
    Kind(
        ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar", "*.nemo", "*.mar"),
        "Unpack the archive, and pass the directory with config.json.",
    ),
    Kind(
        ("*.npz", "*.npy"),
        "Arrays of NumPy are not read, because they do not say which model they belong to.",
    ),
    Kind(
        PICKLES,
        "A pickle is read only as pytorch_model.bin, or as shards with "
        "pytorch_model.bin.index.json: rename the file, if it holds the tensors of the whole "
        "model.",
    ),
    Kind(
        ("*.safetensors",),
        "A file of all weights must have the first of these names, shards need their index, and an "
        "adapter has to be merged into its model.",
    ),
)
NATIVE = "It is a file of jaxformers.save. Read it with jaxformers.load({path!r})."


def describe_directory(directory: Path) -> str:
    """Returns sentences about a directory that is not a checkpoint, or "" if no file is known."""
    sentences = describe_names(list(_names(directory)))
    adapter = directory / "adapter_config.json"
    base = _text(adapter, "base_model_name_or_path")
    return sentences + (f" Its model is {shorten(base)}." if base else "")


def describe_names(names: Sequence[str]) -> str:
    """Returns sentences about the names of files in one directory or one folder below it."""
    advice: dict[str, list[str]] = {}
    for name in names:
        kind = next((k for k in KINDS if any(fnmatch.fnmatch(name, p) for p in k.patterns)), None)
        below = kind is not None and kind.patterns in (PICKLES, ("*.safetensors",)) and "/" in name
        if kind is not None and not below:
            advice.setdefault(kind.advice, []).append(name)
    found = sorted({name for some in advice.values() for name in some})
    sentences = [f"It has {list_names(found)}.", *advice] if found else []
    if not found:
        here = [name for name in names if "/" not in name]
        texts = sorted(x for x in here if any(fnmatch.fnmatch(x, p) for p in TOKENIZER))
        if texts:
            sentences.append(
                f"It has {list_names(texts)}: files of a tokenizer, without the model's weights."
            )
    return " ".join([*sentences, *_below(names)])


def _below(names: Sequence[str]) -> Iterator[str]:
    """Yields sentences about folders that hold checkpoints."""
    known = set(names)
    folders = sorted({x.partition("/")[0] for x in names if x.count("/") == 1})
    folders = [
        x
        for x in folders
        if f"{x}/config.json" in known and any(f"{x}/{y}" in known for y in WHOLE)
    ]
    if folders:
        last = max(folders, key=_step)
        yield (
            f"There are checkpoints in its folders {list_names(folders)}: pass one of those, such "
            f"as {last}."
        )
    if any(x.startswith("snapshots/") for x in names) and "refs/" in names:
        yield (
            "It is an entry of the cache of huggingface_hub: pass the name of the model on the "
            "hub, or the folder within snapshots."
        )


def _step(folder: str) -> int:
    """Returns the number of a folder such as checkpoint-500, or -1."""
    number = folder.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 12 else -1


def describe_file(path: Path) -> str:
    """Returns sentences about a file that was passed in place of a directory."""
    with path.open("rb") as file:
        if b'"jaxformers ' in file.read(4096):
            return NATIVE.format(path=str(path))
    if (path.parent / "config.json").is_file():
        return f"That may be {str(path.parent)!r}."
    kinds = (kind for kind in KINDS if any(fnmatch.fnmatch(path.name, p) for p in kind.patterns))
    return next((kind.advice for kind in kinds), "")


def describe_untrained(directory: Path) -> str:
    """Returns sentences about a directory in which no training has saved its state."""
    if (directory / "config.json").exists():
        return (
            f"{directory} is a checkpoint in the format of Hugging Face. Load it by "
            f"from_pretrained({str(directory)!r})."
        )
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if files:
        return (
            f"{directory} is a directory without checkpoints of a training. Pass the file that is "
            f"to be loaded, such as {str(directory / files[0])!r}."
        )
    return (
        f"{directory} is a directory without checkpoints of a training. Pass the file that save "
        "wrote, or the directory of Checkpoints(directory) when fit has saved its first step."
    )


def describe_hub(name: str) -> str:
    """Returns sentences about a hub repository without a checkpoint, or "" if it fails."""
    try:
        from huggingface_hub import list_repo_files

        return describe_names(list_repo_files(name)[:MAX_NAMES])
    except Exception:  # the errors have no common class, and another error is about to be raised
        return ""


def list_names(names: Iterable[str]) -> str:
    """Returns the first five names as one text, and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(shorten(name) for name in names[:5]) or "none") + more


def _names(directory: Path) -> Iterator[str]:
    """Yields the names in a directory and in its folders. Names of folders end with a slash."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)[:MAX_NAMES]
        for entry in entries:
            if not entry.is_dir():
                yield entry.name
                continue
            yield f"{entry.name}/"
            inner = sorted(x.name for x in os.scandir(entry.path))[: MAX_NAMES // 10]
            yield from (f"{entry.name}/{name}" for name in inner)
    except OSError:
        return  # a directory that cannot be read is not described


def _text(path: Path, key: str) -> str | None:
    """Returns an entry of a JSON file if it is a string and the file is small, else None."""
    try:
        entries = json.loads(path.read_bytes()) if path.stat().st_size < 2**20 else None
    except (OSError, ValueError, RecursionError):
        return None
    value = entries.get(key) if isinstance(entries, dict) else None
    return value if isinstance(value, str) and value else None
