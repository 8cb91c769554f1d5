"""A call of `generate`: its arguments checked, and turned into what the compiled loops take."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxformers.cache import SPARE, Cache
from jaxformers.checks import check_size, check_usable, is_known
from jaxformers.generation import checkpoint_settings
from jaxformers.generation.beams import Beams
from jaxformers.generation.plan import Plan, make_plan
from jaxformers.generation.processors import StopTable
from jaxformers.generation.prompts import (
    Prompt,
    Source,
    Tokens,
    check_cache,
    check_ids,
    check_room,
    read_prompt,
    rows_for,
    to_source,
    warn_of_unmasked,
)
from jaxformers.generation.sampling import per_row
from jaxformers.generation.speculative import LookupDraft, ModelDraft
from jaxformers.mistakes import special_of, warn_of_length
from jaxformers.one_program import bucket
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.output import check_output


def gather(
    end_token: Any, temperature: Any, top_k: Any, top_p: Any, key: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Returns all options by name."""
    named = {"end_token": end_token, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {**options, **named, "key": key}


class Request(NamedTuple):
    """A call of `generate` or `stream`, checked."""

    plan: Plan
    prompt: Prompt
    source: Source | None
    columns: int  # of the prompt's bucket
    slots: int  # the columns of the prompt's and the budget's bucket
    rows: int  # of the batch's bucket
    start: int  # the column of the first new token, and one past that of the last
    stop: int

    @property
    def arrays(self) -> tuple[Array, Array, int, Source | None]:
        """The prompt in its bucket, its real columns, the slots to decode in, and the source."""
        return *self.prompt.to_bucket(self.columns, self.rows), self.slots, self.source


def read_request(
    model: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    padding_mask: Any = None,
    source: Prompt | None = None,
) -> Request:
    """Checks a call's arguments and returns them as arrays.

    Special tokens that the options do not name are those of the model's checkpoint.
    """
    check_size(max_new_tokens=max_new_tokens)
    max_new_tokens = int(max_new_tokens)
    vocab_size, max_seq_length, origin = model.vocab_size, model.max_seq_length, model.origin
    check_cache(model, options.get("cache"))
    is_target = isinstance(prompt, Prompt)
    if not isinstance(prompt, Prompt):
        prompt = read_prompt(prompt, padding_mask, vocab_size)
    longest = check_room(prompt, max_new_tokens, max_seq_length, options.get("cache"))
    batch_size, start = prompt.tokens.shape
    checkpoint_settings.warn_of_neglected(origin, options)
    is_beginning = start == 1 and options.get("cache") is None
    options = checkpoint_settings.complete(origin, options, is_beginning)
    if not is_target:  # targets may begin with the token that is padding elsewhere
        warn_of_unmasked(prompt, padding_mask, "prompt", special_in(options, origin, vocab_size))
    if is_known(prompt.real):
        warn_of_length(longest, origin, max_seq_length, "with its new tokens a row may reach")
    columns = bucket(start, max_seq_length)
    slots, stop = columns + bucket(max_new_tokens), start + max_new_tokens
    if max_seq_length is not None:
        slots = max(min(slots, max_seq_length), columns, stop)
    slots += read_draft_length(options)  # guesses may go beyond the last column
    rows = rows_for(prompt, slots, source) if may_be_padded(options) else batch_size
    plan = make_plan(batch_size, vocab_size, start, max_new_tokens, options, rows)
    read = None if source is None else to_source(model, source, rows)
    return Request(plan, prompt, read, columns, slots, rows, start, stop)


def may_be_padded(options: dict[str, Any]) -> bool:
    """Returns whether rows may be added to a call with these options.

    They may not where they would be seen: by a function or a processor of the user, or in a cache,
    which has the rows of the call. Numbers that are not known are not made longer.
    """
    own = options.get("processors")
    if isinstance(own, list | tuple):
        own = [x for x in own if not isinstance(x, StopTable)]  # which is the same for all rows
    if own or any(options.get(name) for name in ("cache", "return_cache", "logits_fn")):
        return False
    return all(map(is_known, jax.tree.leaves(options)))


def special_in(options: dict[str, Any], origin: Origin | None, vocab_size: int) -> SpecialTokens:
    """Returns the special tokens of a call, whose options are `complete`, and of its checkpoint."""
    special = special_of(origin)
    ends, pads = (
        check_ids(name, options.get(name), vocab_size).tolist()
        for name in ("end_token", "pad_token")
    )
    pad = next(iter(pads), None)
    # What a call fills rows with need not be padding where it stands in a prompt.
    filling = () if pad in (None, special.pad_token) else (pad,)
    return special._replace(end_token=(*special.end_token, *ends, *filling), pad_token=pad)


def read_beams(
    options: dict[str, Any], batch_size: int, rows: int, max_new_tokens: int
) -> tuple[Beams, int] | None:
    """Returns how to search and how many sequences to return, or None without beam search."""
    num_beams, count = options.get("num_beams", 1), options.get("num_return_sequences", 1)
    check_size(num_beams=num_beams, num_return_sequences=count)
    if num_beams == 1:
        for name in ("num_return_sequences", "length_penalty", "early_stopping"):
            if name in options:
                raise ValueError(
                    f"{name} is for beam search, got num_beams 1. Pass num_beams=, or leave it out."
                )
        return None
    if count > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams, got {count} and {num_beams}."
        )
    for name in ("cache", "return_cache"):
        if options.get(name):
            raise ValueError(f"{name} does not go with num_beams, got both. Leave one out.")
    early_stopping = options.get("early_stopping", False)
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}.')
    # Scores are divided by a length to this power, which must not leave what float32 holds.
    least, most = (power / np.log(max(max_new_tokens, 2)) for power in (-60, 80))
    range_ = (
        np.float32,
        lambda x: (least <= x) & (x <= most),
        f"a number from {least:.1f} to {most:.1f} where max_new_tokens is {max_new_tokens}",
    )
    penalty = per_row(
        "length_penalty", options.get("length_penalty", 1.0), batch_size, *range_, rows=rows
    )
    return Beams(jnp.asarray(penalty), num_beams, early_stopping), count


def read_draft_length(options: dict[str, Any]) -> int:
    """Returns how many tokens are guessed at a time, 0 if none are."""
    given = [name for name in ("draft_model", "prompt_lookup") if options.get(name) is not None]
    if len(given) == 2:
        raise ValueError(
            "draft_model and prompt_lookup both guess tokens, got both. Leave one out."
        )
    if not given:
        if "draft_length" in options:
            raise ValueError(
                "draft_length is how many tokens are guessed at a time, got neither draft_model "
                "nor prompt_lookup to guess them. Pass one of these, or leave it out."
            )
        return 0
    if options.get("num_beams"):
        raise ValueError(f"num_beams does not go with {given[0]}, got both. Leave one out.")
    length = options.get("draft_length", 4)
    check_size(draft_length=length)
    if length > SPARE:
        raise ValueError(
            f"draft_length must be at most {SPARE}, got {length}. Longer guesses are hardly ever "
            "right to the end."
        )
    return length


def read_draft(
    model: Any, options: dict[str, Any], request: Request
) -> ModelDraft | LookupDraft | None:
    """Returns what guesses tokens, or None for plain decoding."""
    if not read_draft_length(options):
        return None
    draft = options.get("draft_model")
    if draft is None:
        check_size(prompt_lookup=options["prompt_lookup"])
        return LookupDraft(options["prompt_lookup"])
    check_usable(model=draft)
    check_output(draft)
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft_model must have the model's vocabulary of {model.vocab_size} tokens, got one "
            f"of {draft.vocab_size}."
        )
    new = request.stop - request.start
    check_room(request.prompt, new, draft.max_seq_length, options.get("cache"))
    return ModelDraft(draft)


def room_for(cache: Cache | None, slots: int) -> Cache | None:
    """Returns the cache with room for `slots` more columns; None stays None."""
    if cache is None:
        return None
    free = cache.slots - int(cache.columns) if is_known(cache.columns) else 0
    return cache if free >= slots else cache.resize(bucket(cache.slots + slots - free))
