"""The methods by which an encoder-decoder generates and scores targets.

The source goes into the cache once, and the target begins with its start token. All else is the
code of `TransformerLM`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from jaxtyping import Array, ArrayLike, Float

from jaxformers.checks import check_size, explain_options
from jaxformers.generation.generate import generate
from jaxformers.generation.options import AllOptions, Options
from jaxformers.generation.prompts import Prompt, check_ids, read_prompt, read_source
from jaxformers.generation.request import gather
from jaxformers.generation.sampling import Keys, Numbers
from jaxformers.generation.scoring import score
from jaxformers.generation.stream import TokenStream, stream
from jaxformers.ids import Tokens
from jaxformers.mistakes import special_of
from jaxformers.output import check_output


@explain_options
def generate_target(
    self: Any,
    src: Tokens | None,
    max_length: int,
    start_token: int | None = None,
    end_token: int | Sequence[int] | None = None,
    temperature: Numbers = 1.0,
    key: Keys | None = None,
    *,
    top_k: Numbers | None = None,
    top_p: Numbers | None = None,
    src_padding_mask: ArrayLike | None = None,
    tgt: Tokens | None = None,
    tgt_padding_mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """Returns target sequences for the source, beginning with `start_token`.

    Arguments:
        src: source ids, `(b, s)` or `(s,)`. With `cache` it is None, since the cache has what the
            encoder made of the source; a `draft_model` alone has to read it once more.
        max_length: length of the result, the start token or `tgt` included.
        start_token: the first target token; None is that of the checkpoint the model came from.
        end_token: a row ends with this token (one or several ids); None is that of the
            checkpoint the model came from, `[]` is none.
        temperature, key, top_k, top_p, **options: as for `TransformerLM.generate`.
        src_padding_mask: shape of `src`, True where a token is real.
        tgt: what targets begin with instead, the start token included, `(b, t)` or `(t,)`. With
            `cache` it is what comes after the tokens of the cache.
        tgt_padding_mask: shape of `tgt`, True where a token is real.

    Returns:
        int32, `(b, max_length)`, or `(max_length,)` for a source without a batch axis.

    Raises:
        ValueError: if an option is out of its range or would be without effect, or
            `max_length` is beyond `max_seq_length`.
        FloatingPointError: if the logits are NaN.
    """
    given = gather(end_token, temperature, top_k, top_p, key, dict(options))
    text = read_given_source(self, src, src_padding_mask, given)
    prompt = begin_target(self, text, start_token, tgt, tgt_padding_mask)
    return generate(self, prompt, count_new(prompt, max_length), given, source=text)


@explain_options
def stream_target(
    self: Any,
    src: Tokens | None,
    max_length: int,
    start_token: int | None = None,
    *,
    src_padding_mask: ArrayLike | None = None,
    tgt: Tokens | None = None,
    tgt_padding_mask: ArrayLike | None = None,
    **options: Unpack[AllOptions],
) -> TokenStream:
    """Returns the new tokens of `generate` for the same arguments, one by one as they come.

    Returns:
        An iterator of int32, `(b,)`, or `()` for a source without a batch axis; until all rows
        have ended. Its attributes `cache` and `finish_reason` are explained at `TokenStream`.
    """
    text = read_given_source(self, src, src_padding_mask, options)
    prompt = begin_target(self, text, start_token, tgt, tgt_padding_mask)
    return stream(self, prompt, count_new(prompt, max_length), dict(options), source=text)


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
    return score(self, tgt, tgt_padding_mask, read_source(self, src, src_padding_mask))


def read_given_source(
    model: Any, src: Tokens | None, padding_mask: ArrayLike | None, options: Mapping[str, Any]
) -> Prompt | None:
    """Checks the source of a call, and returns it; None where a cache has it.

    Raises:
        ValueError: if the model has no output layer, if there is no source, if the cache has it
            already, or as `read_source`.
    """
    check_output(model)
    continued, draft = (options.get(x) is not None for x in ("cache", "draft_model"))
    if not continued:
        return read_source(model, src, padding_mask)
    if (src is not None) != draft:
        wanted = "ids, which the draft_model has to read" if draft else "None, for the cache has it"
        raise ValueError(
            f"src must be {wanted}, where a cache is continued, got "
            f"{'None' if src is None else 'ids'}."
        )
    if src is not None:
        return read_source(model, src, padding_mask)
    if padding_mask is not None:
        raise ValueError("src_padding_mask is of src, got no src. Leave it out.")
    return None


def begin_target(
    model: Any,
    source: Prompt | None,
    start_token: int | None,
    tgt: Tokens | None,
    padding_mask: ArrayLike | None,
) -> Prompt:
    """Returns the beginning of targets: `tgt` if there is one, or else the start token alone.

    Raises:
        ValueError: if there are both or neither, or `tgt` does not fit the source.
    """
    if tgt is None:
        if source is None:
            raise ValueError(
                "tgt must be the ids that come after those of the cache, got None. Pass tgt=."
            )
        if padding_mask is not None:
            raise ValueError("tgt_padding_mask is of tgt, got no tgt. Leave it out, or pass tgt=.")
        return source.begin(_start_token(model, start_token))
    if start_token is not None:
        raise ValueError(
            "start_token is what targets begin with where tgt does not say so, got both. Leave "
            "start_token out, and begin tgt with it."
        )
    prompt = read_prompt(tgt, padding_mask, model.vocab_size, "tgt")
    if source is None:
        return prompt
    here, there = (x.tokens.shape[:1] if x.batched else () for x in (prompt, source))
    if here != there:
        raise ValueError(
            f"tgt must have a row for each row of src, batch axes {there}, got {here}."
        )
    return prompt._replace(sharding=prompt.sharding or source.sharding)


def count_new(prompt: Prompt, max_length: int) -> int:
    """Returns how many tokens come after the beginning of targets of so many.

    Raises:
        ValueError: if there is no room for one.
    """
    check_size(max_length=max_length)
    columns = prompt.tokens.shape[1]
    if max_length <= columns:
        raise ValueError(
            f"max_length must be an integer of at least {columns + 1}, the {columns} that targets "
            f"begin with and one more, got {max_length!r}."
        )
    return max_length - columns


def _start_token(model: Any, start_token: int | None) -> int:
    """Returns the id that targets begin with, by default that of the model's checkpoint."""
    if start_token is None:
        start_token = special_of(model.origin).start_token
    if start_token is None:
        raise ValueError(
            "start_token must be the id that targets begin with, got None, and this model "
            "comes from no checkpoint that names one. Pass start_token=."
        )
    (start,) = check_ids("start_token", [start_token], model.vocab_size)
    return int(start)
