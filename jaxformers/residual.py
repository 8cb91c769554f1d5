"""The residual stream, and how a sublayer is joined to it."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_choice, check_positive, check_rate
from jaxformers.layers import as_module, construct, dropout
from jaxformers.precision import scaled
from jaxformers.sites import site

# Where a sublayer's norms stand.
PLACEMENTS = ("pre", "post", "sandwich", "output", "none")


class Residual(eqx.Module):
    """How a sublayer is joined to the residual stream, the sum that runs through a stack.

    A layer reads from the stream, computes, and writes back, so that the sublayer stands in plain
    sight between the two calls. The norms stand

    - "pre": before, `x + sublayer(norm(x))`, which trains without care at any depth (Xiong et al.
      2020);
    - "post": after, the paper's `norm(x + sublayer(x))` (Vaswani et al. 2017, section 3.1);
    - "sandwich": on both sides, `x + norm'(sublayer(norm(x)))` (Ding et al. 2021; Gemma 2);
    - "output": `x + norm(sublayer(x))` (OLMo 2);
    - "none": nowhere.

    Arguments:
        norm: constructor of the norms, called `norm(d_model)`.
        d_model: width of the stream.
        dropout_rate: dropout on what is written.
        placement: one of the above.
        scale: factor on what is written, 1.

    Raises:
        ValueError: if the placement is another, or a number is out of range.

    Example:
        >>> x = residual.write(x, feed_forward(residual.read(x)), key)
    """

    norm: Callable | None
    output_norm: Callable | None
    dropout_rate: float = eqx.field(static=True)
    placement: str = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        norm: Callable,
        d_model: int,
        dropout_rate: float = 0.1,
        placement: str = "pre",
        scale: float = 1.0,
    ):
        check_rate(dropout_rate=dropout_rate)
        check_choice(PLACEMENTS, norm_placement=placement)
        check_positive(residual_scale=scale)
        around = placement in ("pre", "post", "sandwich")
        after = placement in ("sandwich", "output")
        self.norm = as_module(construct("norm", norm, {"d_model": d_model})) if around else None
        self.output_norm = (
            as_module(construct("norm", norm, {"d_model": d_model})) if after else None
        )
        self.placement = placement
        self.dropout_rate = float(dropout_rate)
        self.scale = float(scale)

    def read(self, x: Float[Array, "*b t d"]) -> Float[Array, "*b t d"]:
        """What the sublayer gets to see of the stream."""
        return x if self.norm is None or self.placement == "post" else self.norm(x)

    def write(
        self, x: Float[Array, "*b t d"], y: Float[Array, "*b t d"], key: PRNGKeyArray | None
    ) -> Float[Array, "*b t d"]:
        """The stream after the sublayer's output `y` has been added."""
        y = site(y, "sublayer_output")
        y = y if self.output_norm is None else self.output_norm(y)
        x = x + dropout(scaled(y, self.scale), self.dropout_rate, key)
        after = self.norm is not None and self.placement == "post"
        return site(self.norm(x) if after else x, "residual")  # type: ignore[misc]
