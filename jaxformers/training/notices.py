"""Warnings of a run that goes on."""

import logging
import warnings
from typing import Any

import jax
from jax.sharding import Mesh

from jaxformers.layer_stack import has_separate_layers
from jaxformers.sharding.mesh import FSDP, as_auto, sizes_of
from jaxformers.warn import warn_once

# The bytes of a model from which it is worth a warning that all its weights are gathered at once.
LARGE = 2**30

LOGGER = logging.getLogger("jaxformers.training")


def warn_and_go_on(text: str, level: int) -> None:
    """Shows a warning, or logs the text if warnings are errors, since the run must not end here."""
    try:
        warnings.warn(text, stacklevel=level)
    except UserWarning:
        LOGGER.warning(text)


def warn_of_separate_layers(model: Any, mesh: Mesh) -> None:
    """Warns once of a large model that is divided over "fsdp" while its layers are not scanned."""
    size = sum(x.nbytes for x in jax.tree.leaves(model) if isinstance(x, jax.Array))
    if size < LARGE or FSDP not in sizes_of(as_auto(mesh)) or not has_separate_layers(model):
        return
    warn_once(
        f"the layers of this model are not scanned, so that fsdp saves less memory than it could: "
        f"XLA gathers the weights of all layers early, which takes up to {2 * size / 2**30:.1f} "
        "GiB of each device beside its part. Pass scan_layers(model)."
    )
