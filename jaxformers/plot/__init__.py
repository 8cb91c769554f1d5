"""Pictures, drawn by matplotlib: training, attention, what layers and heads do, positions.

Each function returns a `matplotlib.figure.Figure`, which notebooks show, and writes it to a file
with `save=`. Nothing is changed in matplotlib: there is no current figure. The look is that of its
style, so a dark picture is drawn within `matplotlib.style.context("dark_background")`. Text is
drawn as it is, without formulas. A character of a token that no font has is drawn as its escape.
"""

try:
    import matplotlib
except ImportError:
    raise ImportError(
        "jaxformers.plot needs matplotlib: pip install 'jaxformers[train]'."
    ) from None

from jaxformers.plot.attention import attention_grid
from jaxformers.plot.heads import head_heat_map
from jaxformers.plot.labels import token_labels
from jaxformers.plot.logit_lens import logit_lens_table
from jaxformers.plot.losses import loss_curve
from jaxformers.plot.positions import position_bias, position_vectors, rotary_angles

__all__ = [
    "attention_grid",
    "head_heat_map",
    "logit_lens_table",
    "loss_curve",
    "position_bias",
    "position_vectors",
    "rotary_angles",
    "token_labels",
]
