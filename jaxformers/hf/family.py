"""The table of a family, and the rules for weights that tables consist of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxformers.hf.config.settings import ConfigSetting
from jaxformers.hf.layouts import Rule


class Family(NamedTuple):
    """One `model_type` of Hugging Face. It is data only, which is read in both directions.

    Arguments:
        model_type: its name in config.json.
        shape: "lm", "seq2seq" or "encoder".
        classes: the class of transformers for a model with an output layer ("output"), without
            one ("base"), with a classifier of sequences ("sequence") or of tokens ("tokens"; with
            a dense layer before it "discriminator"), with both ("pretraining").
        settings: how config.json relates to an `Architecture`. They are read in this order.
        weights: how tensors relate to arrays.
        prefix: the beginning of names in files of whole models, which those of bare ones lack.
        ignored: patterns of tensors that hold nothing to learn, or belong to heads we do not have.
        copies: pairs of a tensor that some files store a second time, and its main name.
        repeats: pairs of a tensor that is written a second time where the output layer is not
            tied, and its main name, because versions of transformers look under different names.
        special: token ids that config.json leaves out where they are the class's defaults.
        aliases: pairs of a pattern of older names, and its replacement.
        newer: keys of config.json that version 5 of transformers knows and version 4 does not.
        encoder: the table for the encoder alone, if transformers has a class for it.
    """

    model_type: str
    shape: str
    classes: dict[str, str]
    settings: tuple[ConfigSetting, ...]
    weights: tuple[Rule, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    repeats: tuple[tuple[str, str], ...] = ()
    special: Mapping[str, Any] = {}
    aliases: tuple[tuple[str, str], ...] = ()
    newer: tuple[str, ...] = ("rope_parameters",)
    encoder: "Family | None" = None

    def of_shape(self, shape: str) -> "Family":
        """Returns the table for models of a shape: that of the encoder, or else this one."""
        encoder = self.encoder
        return encoder if encoder is not None and encoder.shape == shape else self


def linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Returns the rules of a linear map; `ours` is its weight's path, `theirs` the module's."""
    return (
        Rule((ours,), (f"{theirs}.weight",), "linear"),
        Rule((_bias(ours),), (f"{theirs}.bias",), "flat"),
    )


def _bias(weight: str) -> str:
    """Returns the path of the bias beside a weight: `b...` for `w...`."""
    module, _, name = weight.rpartition(".")
    return f"{module}.b{name[1:]}"


def conv1d(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Returns the rules of a linear map that is stored in GPT-2's layout, which is ours."""
    weight, bias = linear(ours, theirs)
    return weight._replace(layout="conv1d"), bias


def fused(ours: tuple[str, ...], theirs: str, layout: str) -> tuple[Rule, Rule]:
    """Returns the rules of linear maps in one tensor, with a layout such as "linear rows"."""
    biases = tuple(map(_bias, ours))
    flat = f"flat {'heads' if layout.endswith('heads') else 'rows'}"
    return (
        Rule(ours, (f"{theirs}.weight",), layout),
        Rule(biases, (f"{theirs}.bias",), flat),
    )


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Returns the rules of a norm."""
    return (
        Rule((f"{ours}.gain",), (f"{theirs}.weight",), "flat"),
        Rule((f"{ours}.b",), (f"{theirs}.bias",), "flat"),
    )


def same(ours: str, theirs: str) -> tuple[Rule]:
    """Returns the rule of a tensor that has our shape."""
    return (Rule((ours,), (theirs,), "same"),)


def when(condition: Callable[[Any], bool], *groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns rules that hold for the architectures that meet the condition."""
    return tuple(rule._replace(when=condition) for rule in rules(*groups))


def rules(*groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns groups of rules, one after the other."""
    return tuple(rule for group in groups for rule in group)
