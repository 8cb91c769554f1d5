"""What a family's table consists of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxformers.hf.layouts import Rule


class Family(NamedTuple):
    """One `model_type` of Hugging Face: data only, read in both directions.

    Arguments:
        model_type: its name in config.json.
        shape: "lm", "seq2seq" or "encoder".
        classes: the class of transformers for a model with an output layer ("output"), without
            one ("base"), with a classifier of sequences ("sequence") or of tokens ("tokens"; with
            a dense layer before it "discriminator"), with both ("pretraining").
        settings: how config.json relates to an `Architecture`, read in this order.
        weights: how tensors relate to arrays.
        prefix: what names begin with in files of whole models and not in those of bare ones.
        ignored: patterns of tensors that hold nothing to learn, or belong to heads we do not have.
        copies: tensors that some files store a second time, each with its main name.
        repeats: tensors that we store a second time where the output layer is not tied, each with
            its main name: versions of transformers look under different ones.
        special: token ids that config.json leaves out where they are the class's defaults.
        aliases: other names that older files use: (pattern, replacement).
        newer: keys of config.json that version 5 of transformers knows and version 4 does not.
    """

    model_type: str
    shape: str
    classes: dict[str, str]
    settings: tuple[Any, ...]
    weights: tuple[Rule, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    repeats: tuple[tuple[str, str], ...] = ()
    special: Mapping[str, Any] = {}
    aliases: tuple[tuple[str, str], ...] = ()
    newer: tuple[str, ...] = ("rope_parameters",)


def linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A linear map and its bias; `ours` is the path of the weight, `theirs` that of the module."""
    return (
        Rule((ours,), (f"{theirs}.weight",), "linear"),
        Rule((_bias(ours),), (f"{theirs}.bias",), "flat"),
    )


def _bias(weight: str) -> str:
    """The path of the bias beside a weight: `b...` for `w...`."""
    module, _, name = weight.rpartition(".")
    return f"{module}.b{name[1:]}"


def conv1d(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The same as `linear` for GPT-2's way to store a map, which is ours."""
    weight, bias = linear(ours, theirs)
    return weight._replace(layout="conv1d"), bias


def fused(ours: tuple[str, ...], theirs: str, layout: str) -> tuple[Rule, Rule]:
    """Several linear maps in one tensor, and their biases; `layout` is such as "linear rows"."""
    biases = tuple(map(_bias, ours))
    flat = f"flat {'heads' if layout.endswith('heads') else 'rows'}"
    return (
        Rule(ours, (f"{theirs}.weight",), layout),
        Rule(biases, (f"{theirs}.bias",), flat),
    )


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A norm's gain and bias."""
    return (
        Rule((f"{ours}.gain",), (f"{theirs}.weight",), "flat"),
        Rule((f"{ours}.b",), (f"{theirs}.bias",), "flat"),
    )


def same(ours: str, theirs: str) -> tuple[Rule]:
    """A tensor of the same shape."""
    return (Rule((ours,), (theirs,), "same"),)


def when(condition: Callable[[Any], bool], *groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules that hold for the architectures of which the condition is true."""
    return tuple(rule._replace(when=condition) for rule in rules(*groups))


def rules(*groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Groups of rules, one after the other."""
    return tuple(rule for group in groups for rule in group)
