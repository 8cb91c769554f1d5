"""What may come next by the rules of a checkpoint, beside those of a request."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from jaxformers.origin import SpecialTokens
from jaxformers.serving.job import Follower


class Both:
    """Tokens that two followers allow.

    Arguments:
        one, other: what allows them.
    """

    def __init__(self, one: Follower, other: Follower):
        self._one, self._other = one, other

    def legal(self, tokens: tuple[int, ...]) -> Bool[np.ndarray, " v"]:
        """Returns which tokens may come after some."""
        return self._one.legal(tokens) & self._other.legal(tokens)


class CheckpointRules:
    """The tokens that a checkpoint forbids or forces, as `generate` does without options.

    Arguments:
        special: of the checkpoint, without lone end tokens among its bad words.
        vocab_size: of the model.
        prompt: the tokens before the new ones.
        most: the largest number of new tokens, the last of which may be forced.
    """

    def __init__(self, special: SpecialTokens, vocab_size: int, prompt: Sequence[int], most: int):
        self._special, self._prompt, self._most = special, tuple(prompt), most
        self._usual = np.ones(vocab_size, np.bool_)
        single = [word[0] for word in special.bad_words if len(word) == 1]
        self._usual[[*special.suppress_tokens, *single]] = False

    @classmethod
    def of(
        cls, special: SpecialTokens, vocab_size: int, prompt: Sequence[int], most: int
    ) -> "CheckpointRules | None":
        """Returns the rules, or None if the checkpoint has none."""
        ends = set(special.end_token)
        words = tuple(x for x in special.bad_words if len(x) > 1 or x[0] not in ends)
        special = special._replace(bad_words=words)
        first, last = special.forced_first_token, special.forced_last_token
        bans = special.bad_words or special.suppress_tokens or special.begin_suppress_tokens
        forces = last is not None or (first is not None and len(prompt) == 1)
        return cls(special, vocab_size, prompt, most) if bans or forces else None

    def legal(self, tokens: tuple[int, ...]) -> Bool[np.ndarray, " v"]:
        """Returns which tokens may come after some new ones."""
        special, is_beginning = self._special, len(self._prompt) == 1
        first = special.forced_first_token if is_beginning else None
        forced = first if not tokens else None
        if len(tokens) == self._most - 1 and special.forced_last_token is not None:
            forced = special.forced_last_token
        if forced is not None:
            return np.arange(len(self._usual)) == forced
        legal = self._usual.copy()
        if len(tokens) == (first is not None):
            legal[list(special.begin_suppress_tokens)] = False
        for word in special.bad_words:
            before = tuple(word[:-1])
            row = (*self._prompt, *tokens)[-len(before) :] if before else ()
            if before and row == before:
                legal[word[-1]] = False
        return legal


def both(one: Follower | None, other: Follower | None) -> Follower | None:
    """Returns what allows the tokens that two followers allow, of which None allows all."""
    if one is None or other is None:
        return other if one is None else one
    return Both(one, other)
