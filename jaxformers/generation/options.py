"""The options of `generate` by name."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from jaxformers.cache import Cache
from jaxformers.constraints import Constraint, LarkGrammar
from jaxformers.generation.processors import Processor
from jaxformers.generation.sampling import Keys, Numbers


class Options(TypedDict, total=False):
    """The options of `generate` besides the arguments it names; every name may be left out.

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
        processors: a list of `Processor`s, which change the logits in their order, after all of the
            above. The options above are short forms of some of them.
        constraint: what the new tokens of a row have to be as text, such as `Regex("[0-9]+",
            tokenizer)`, or a list of one per row with None for a free row. It comes after all of
            the above and needs an `end_token`. A row ends only where its text is complete, also
            with a stop sequence.
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
            tokens of this call. The cache itself stays as it is. It goes with streams and drafts
            (a `draft_model` reads the cache's tokens anew for its own memory), not with beams.
            With an encoder, it has the source as well: see `Transformer.generate`.
        return_cache: True returns a `Generation` with the cache, to be continued by a later call. A
            stream has its cache as an attribute.
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
    processors: Sequence[Processor]
    constraint: Constraint | LarkGrammar | Sequence[Constraint | LarkGrammar | None] | None
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
