"""The options of `generate`: checked, and turned into the arrays the program reads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxformers.cache import Cache
from jaxformers.checks import check_size, is_known
from jaxformers.generation.constraints import Constraints, History, marked, sequences
from jaxformers.generation.prompts import check_ids, put
from jaxformers.generation.sampling import Keys, Numbers, Warper, draw, per_row, row_keys


class Options(TypedDict, total=False):
    """What `generate` takes besides the arguments it names; every name may be left out.

    Numbers may be arrays of one per row, and then compile nothing when they change.

    Arguments:
        pad_token: what rows are filled with once they have ended; default the (first) end token,
            or 0 where there is none.
        stop_sequences: token sequences; a row ends once its new tokens end with one of them.
        min_p: sample from tokens at least this times as probable as the likeliest one, in [0, 1].
        typical_p: sample from the tokens whose surprise is nearest to the entropy, this much
            probability of them, in (0, 1]; those tied with the last one as well, as transformers.
        repetition_penalty: logits of tokens in the row are divided by it if positive, else times
            it; above 1 discourages.
        frequency_penalty: taken off a logit for each time its token was generated.
        presence_penalty: taken off once if it was generated at all.
        no_repeat_ngram_size: no sequence of this many tokens comes twice.
        bad_words: token sequences that do not come; `[]` is none, where the model's checkpoint
            names some.
        suppress_tokens: tokens that do not come; `[]` is none, where the model's checkpoint names
            some.
        begin_suppress_tokens: tokens that do not come first (after `forced_first_token`, if there
            is one); `[]` as above.
        min_new_tokens: no row ends before it has so many: the end token does not come, and stop
            sequences do not count.
        forced_first_token: the first new token.
        forced_last_token: the token of the last column, for rows that come so far.
        logits_fn: a function `(logits, tokens, real) -> logits` of your own, after all of the
            above and before sampling: logits `(b, v)`, tokens `(b, s)` of the row so far where
            `real` is True.
        num_beams: how many continuations of each row beam search follows; 1 is no beam search.
        num_return_sequences: how many of them are returned for each row, best first, one below
            the other; default 1.
        length_penalty: scores of beams are divided by their length to this power; default 1,
            above 0 favors long ones.
        early_stopping: when a row's search ends: True as soon as `num_beams` sequences have
            ended, False (default) when no running one of the same length could beat them, "never"
            when no longer one could either.
        draft_model: a smaller model of the same kind and vocabulary, whose guesses the model
            checks several at a time: the same tokens, in less time if the guesses are good.
        prompt_lookup: guesses instead what followed the last n tokens where the row had them
            before; this is the largest n tried.
        draft_length: how many tokens are guessed at a time; default 4.
        return_scores: True returns a `Generation` with log-probabilities beside the tokens.
        cache: the `cache` of an earlier `Generation`, or of `model.forward`: the prompt continues
            those rows. The new tokens are those for the prompt with the cache's tokens before it:
            penalties, bans and `logits_fn` see them all, while "generated" and "new" mean the
            tokens of this call.
        return_cache: True returns a `Generation` with the cache, to be continued by a later call.
    """

    pad_token: int | None
    stop_sequences: Sequence[Sequence[int]] | None
    min_p: Numbers | None
    typical_p: Numbers | None
    repetition_penalty: Numbers | None
    frequency_penalty: Numbers | None
    presence_penalty: Numbers | None
    no_repeat_ngram_size: Numbers | None
    bad_words: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    min_new_tokens: Numbers | None
    forced_first_token: Numbers | None
    forced_last_token: Numbers | None
    logits_fn: Callable | None
    num_beams: int
    num_return_sequences: int
    length_penalty: Numbers
    early_stopping: bool | str
    draft_model: Any
    prompt_lookup: int
    draft_length: int
    return_scores: bool
    cache: Cache | None
    return_cache: bool


class AllOptions(Options, total=False):
    """These, and those that `generate` names itself."""

    end_token: int | Sequence[int] | None
    temperature: Numbers
    top_k: Numbers | None
    top_p: Numbers | None
    key: Keys | None


class Plan(eqx.Module):
    """What to do with logits and when to stop, all numbers as arrays: new ones compile nothing."""

    start: Int[Array, ""]  # the column of the first new token
    limit: Int[Array, ""]  # one past the column of the last
    keys: Key[Array, " b"] | None  # None is greedy
    warper: Warper
    constraints: Constraints
    end_tokens: Int[Array, " e"]
    stop_sequences: Int[Array, "p w"] | None
    pad_token: Int[Array, ""]

    def history(
        self, tokens: Int[Array, "b s"], first: Int[Array, " b"], length: Int[Array, ""]
    ) -> History:
        """The tokens of the columns before `length`."""
        return History(tokens, first, self.start, length)

    def warp(self, logits: Float[Array, "b v"], history: History) -> Float[Array, "b v"]:
        """The logits that a token is chosen from."""
        logits = self.constraints(logits, history, self.limit, self.end_tokens)
        return logits if self.keys is None else self.warper(logits)

    def choose(self, logits: Float[Array, "b v"], history: History) -> Int[Array, " b"]:
        """The next token of each row."""
        logits = self.warp(logits, history)
        if self.keys is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return draw(logits, self.keys, history.length - self.start)

    def ends(self, history: History) -> Bool[Array, " b"]:
        """Whether each row's last token ends it."""
        last = jnp.take(history.tokens, history.length - 1, axis=1)
        ends = (last[:, None] == self.end_tokens).any(-1)
        if self.stop_sequences is not None:
            new = history._replace(first=jnp.maximum(history.first, self.start))
            ends = ends | new.ends_with(self.stop_sequences).any(-1)
        least = self.constraints.min_new_tokens
        if least is not None:  # candidates of beams are more rows than there are numbers
            least = jnp.repeat(least, len(ends) // len(least))
            ends = ends & (history.length - self.start >= least)
        return ends

    def after(self, columns: Int[Array, ""]) -> "Plan":
        """The same for tokens that follow so many columns."""
        return dataclasses.replace(self, start=self.start + columns, limit=self.limit + columns)

    def repeat(self, times: int) -> "Plan":
        """The same for each row `times` times over; keys stay one per row."""
        fields: dict[str, Any] = {
            field.name: jnp.repeat(value, times)
            for field in dataclasses.fields(self.warper)
            if eqx.is_array(value := getattr(self.warper, field.name))
        }
        warper = dataclasses.replace(self.warper, **fields)
        return dataclasses.replace(self, warper=warper, constraints=self.constraints.repeat(times))


# The numbers among the options: their type, what is allowed, and that in words.
POSITIVE = np.float32, lambda x: x > 0, "a number above 0"
FRACTION = np.float32, lambda x: (x > 0) & (x <= 1), "a number in (0, 1]"
ANY = np.float32, lambda x: x == x, "a number"
COUNT = np.int32, lambda x: x >= 1, "an integer of at least 1"
# The limit of the temperature is no division.
LIMIT = (
    " Its limit at 0 is greedy decoding: leave out key, or pass top_k=1 (for some rows of several "
    "an array, as top_k=[1, 50])."
)
SAMPLING = {
    "temperature": (*POSITIVE, LIMIT),
    "top_k": COUNT,
    "top_p": FRACTION,
    "min_p": (np.float32, lambda x: (x >= 0) & (x <= 1), "a number in [0, 1]"),
    "typical_p": FRACTION,
}
CONSTRAINTS = {
    "repetition_penalty": POSITIVE,
    "frequency_penalty": ANY,
    "presence_penalty": ANY,
    "no_repeat_ngram_size": COUNT,
    "min_new_tokens": (np.int32, lambda x: x >= 0, "an integer of at least 0"),
}
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def make_plan(
    batch_size: int,
    vocab_size: int,
    start: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> Plan:
    """The options as a `Plan`, checked.

    Raises:
        ValueError: if an option is out of its range or would be without effect.
    """
    key, num_beams = options.get("key"), options.get("num_beams", 1)
    check_size(num_beams=num_beams)
    end_tokens = check_ids("end_token", options.get("end_token"), vocab_size)
    pad = check_ids("pad_token", options.get("pad_token"), vocab_size)
    check_effect(key, max_new_tokens, options)
    # With beams, one token more than there are end tokens has to survive the cuts.
    keep = 1 if num_beams == 1 else len(end_tokens) + 1
    return Plan(
        start=put(start),
        limit=put(start + max_new_tokens),
        keys=row_keys(key, batch_size),
        warper=Warper()
        if key is None
        else Warper(**_rows(SAMPLING, options, batch_size), keep=keep),
        constraints=Constraints(
            **_rows(CONSTRAINTS, options, batch_size),
            **_forced(options, vocab_size, batch_size),
            bad_words=sequences("bad_words", _allowed(options, end_tokens), vocab_size),
            **{name: marked(name, options.get(name), vocab_size) for name in SUPPRESSED},
            logits_fn=options.get("logits_fn"),
        ),
        end_tokens=put(end_tokens),
        stop_sequences=sequences("stop_sequences", options.get("stop_sequences"), vocab_size),
        pad_token=put([*pad, *end_tokens, 0][0]),
    )


def check_effect(key: Keys | None, max_new_tokens: int, options: dict[str, Any]) -> None:
    """Raise for an option that would be without effect."""
    given = [name for name in SAMPLING if options.get(name) is not None]
    one = options.get("temperature")
    if isinstance(one, int | float) and one == 1:
        given.remove("temperature")  # the default, which greedy decoding does not contradict
    if key is None and given:
        raise ValueError(
            f"{' and '.join(given)} can only matter when sampling, got no key, which means greedy "
            "decoding. Pass key=jax.random.key(0) to sample, or leave them out."
        )
    least = options.get("min_new_tokens")
    if least is not None and is_known(least) and np.max(least) > max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be at most max_new_tokens, got {least!r} and {max_new_tokens}."
        )


def _rows(numbers: dict, options: dict[str, Any], batch_size: int) -> dict[str, Array | None]:
    return {
        name: per_row(name, options.get(name), batch_size, *range_)
        for name, range_ in numbers.items()
    }


def _forced(options: dict[str, Any], vocab_size: int, batch_size: int) -> dict[str, Array | None]:
    wanted = f"an id from 0 to {vocab_size - 1} (the vocabulary has {vocab_size})"
    ids = np.int32, lambda x: (x >= 0) & (x < vocab_size), wanted
    return _rows({"forced_first_token": ids, "forced_last_token": ids}, options, batch_size)


def _allowed(options: dict[str, Any], end_tokens: np.ndarray) -> Sequence[Sequence[int]] | None:
    """The bad words, of which a lone end token is none: rows could never end (as in HF)."""
    words = options.get("bad_words")
    if words is None or (isinstance(words, list | tuple) and not words):
        return None
    ends = [[end] for end in end_tokens.tolist()]
    return [word for word in words if np.ravel(word).tolist() not in ends] or None
