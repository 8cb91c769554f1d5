"""The methods by which an encoder-decoder generates and scores targets.

The source goes into the cache once, and the target begins with its start token. All else is the
code of `TransformerLM`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from jaxtyping import Array, ArrayLike, Float, Int

from jaxformers.checks import explain_options
from jaxformers.generation.generate import generate, stream
from jaxformers.generation.options import AllOptions, Options
from jaxformers.generation.prompts import begin_target, read_source
from jaxformers.generation.request import gather
from jaxformers.generation.sampling import Keys, Numbers
from jaxformers.generation.scoring import score
from jaxformers.ids import Tokens


@explain_options
def generate_target(
    self: Any,
    src: Tokens,
    max_length: int,
    start_token: int | None = None,
    end_token: int | Sequence[int] | None = None,
    temperature: Numbers = 1.0,
    key: Keys | None = None,
    *,
    top_k: Numbers | None = None,
    top_p: Numbers | None = None,
    src_padding_mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """Returns target sequences for the source, beginning with `start_token`.

    Arguments:
        src: source ids, `(b, s)` or `(s,)`.
        max_length: length of the result, the start token included.
        start_token: the first target token; None is that of the checkpoint the model came from.
        end_token: a row ends with this token (one or several ids); None is that of the
            checkpoint the model came from, `[]` is none.
        temperature, key, top_k, top_p, **options: as for `TransformerLM.generate`.
        src_padding_mask: shape of `src`, True where a token is real.

    Returns:
        int32, `(b, max_length)`, or `(max_length,)` for a source without a batch axis.

    Raises:
        ValueError: if an option is out of its range or would be without effect, or
            `max_length` is beyond `max_seq_length`.
        FloatingPointError: if the logits are NaN.
    """
    prompt, source = begin_target(self, src, max_length, start_token, src_padding_mask)
    given = gather(end_token, temperature, top_k, top_p, key, dict(options))
    return generate(self, prompt, max_length - 1, given, source=source)


@explain_options
def stream_target(
    self: Any,
    src: Tokens,
    max_length: int,
    start_token: int | None = None,
    *,
    src_padding_mask: ArrayLike | None = None,
    **options: Unpack[AllOptions],
) -> Iterator[Int[Array, "*b"]]:
    """Returns the tokens of `generate` after `start_token`, one by one as they come.

    Yields:
        int32, `(b,)`, or `()` for a source without a batch axis; until all rows have ended.
    """
    prompt, source = begin_target(self, src, max_length, start_token, src_padding_mask)
    return stream(self, prompt, max_length - 1, dict(options), source=source)


@explain_options
def score_target(
    self: Any,
    src: Tokens,
    tgt: Tokens,
    src_padding_mask: ArrayLike | None = None,
    tgt_padding_mask: ArrayLike | None = None,
) -> Float[Array, "*b t"]:
    """Returns the log-probability of each target token given those before it and the source.

    Angles that depend on how long a row is are those of the whole row, as in
    `TransformerLM.score`.

    Returns:
        float32, shape of `tgt`; 0 for padding and for the first token of each row.

    Raises:
        ValueError: if tokens are not ids within the vocabularies, or too long.
    """
    return score(self, tgt, tgt_padding_mask, read_source(self, src, src_padding_mask)[1])
