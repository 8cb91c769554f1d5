"""A conversation, which reads only what is new."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxformers.cache import SPARE, Cache
from jaxformers.checks import check_flag, check_key, check_size, explain_options
from jaxformers.files.json_file import shorten
from jaxformers.generation.options import AllOptions
from jaxformers.text.answers import as_tokens
from jaxformers.text.call import default_length, encode_rows, read_call, read_stop, render
from jaxformers.text.scores import common_length
from jaxformers.text.stream import TextStream
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer import Transformer


class Conversation:
    """A conversation with a model, which remembers what it has read.

    Every turn answers all messages so far, as `TextGenerator.chat` does. The keys and values of
    the earlier turns are kept, so that a turn reads the new message alone. `messages` holds all
    messages so far, and `tokens_read` is the number of tokens of messages that the model has read.
    It is made by `TextGenerator.conversation`.

    Arguments:
        model, tokenizer: those of the generator. The tokenizer has a chat template.
        messages: the messages at its beginning, such as those of the system.
        variables, stop, skip_special_tokens: as for `TextGenerator.chat`, for every turn.
        options: those of `generate` for every turn. A `key` gives each turn one of its own.

    Raises:
        ValueError: if the model is an encoder-decoder, or an argument is not of this kind.

    Example:
        >>> chat = text.conversation([{"role": "system", "content": "Be brief."}])  # doctest: +SKIP
        >>> chat("Name a color."), chat("And another one.")  # doctest: +SKIP
        ('Red.', 'Blue.')
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        options: Mapping[str, Any] | None = None,
    ):
        if isinstance(model, Transformer):
            raise ValueError(
                "a conversation needs a model without an encoder, got a Transformer, which reads "
                "its whole source anew. Call the TextGenerator."
            )
        is_list = isinstance(messages, list | tuple)
        if not is_list or not all(isinstance(x, Mapping) for x in messages):
            raise ValueError(
                'messages must be a list of dicts such as {"role": "system", "content": "..."}, '
                f"got {shorten(messages)}."
            )
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._model, self._tokenizer = model, tokenizer
        self._variables, self._options = variables, dict(options or {})
        check_flag(skip_special_tokens=skip_special_tokens)
        self._stop, self._skip_special_tokens = read_stop(stop), skip_special_tokens
        self._beginning = list(self.messages)
        self._cache: Cache | None = None
        self._open: TextStream | None = None
        self.tokens_read = 0

    @explain_options
    def __call__(
        self,
        message: str | Mapping[str, Any],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        **options: Unpack[AllOptions],
    ) -> str:
        """Returns the answer to a message.

        Arguments:
            message: the text of the user, or a message such as
                `{"role": "tool", "content": "..."}`.
            max_new_tokens: the most new tokens; None is 256. The answer ends in any case where the
                context of the model does.
            stop, **options: as for `TextGenerator.chat`, for this turn in place of those of every
                turn.

        Raises:
            ValueError: if the conversation with the message is longer than the model's context;
                and as for `TextGenerator.chat`. After an error or an interrupt it is as before.
        """
        stream = self.stream(message, max_new_tokens, stop=stop, **options)
        before = self.messages
        try:
            for _ in stream:
                pass
        except BaseException:  # an interrupt too
            stream.close()
            self.messages = before
            raise
        return stream.text

    @explain_options
    def stream(
        self,
        message: str | Mapping[str, Any],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        **options: Unpack[AllOptions],
    ) -> TextStream:
        """Returns the answer in pieces, as it comes.

        Where the stream is closed early or interrupted, or another turn begins before its end, the
        answer is what came until then. After an error the conversation is as it was before.
        """
        if self._open is not None:
            self._open.close()
        messages = [*self.messages, as_message(message)]
        text = render(self._tokenizer, messages, self._variables)
        [ids] = encode_rows(self._tokenizer, [text], add_special_tokens=False)
        room = self._room(len(ids))
        if max_new_tokens is None:
            max_new_tokens = default_length(self._model, len(ids))
        check_size(max_new_tokens=max_new_tokens)
        max_new_tokens = min(max_new_tokens, room)
        stop = self._stop if stop is None else stop
        given = max_new_tokens, stop, self._skip_special_tokens, self._of_turn(options)
        call = read_call(self._model, self._tokenizer, [ids], [[]], *given)
        known, cache = self._continue(ids)
        tokens, mask = as_tokens(self._model, [ids[known:]])
        columns = self._model.stream(tokens, max_new_tokens, cache=cache, **mask, **call.options)
        rows = call.row_texts(self._model, self._tokenizer)
        self.tokens_read += tokens.size
        self._cache = None  # until the end of the turn

        def keep(stream: TextStream) -> None:
            self._open = None
            self.messages = [*messages, {"role": "assistant", "content": stream.text}]
            with contextlib.suppress(ValueError):  # what an interrupt has lost is read again
                self._cache = columns.cache

        self._open = TextStream(columns, rows, True, keep)
        return self._open

    def reset(self) -> None:
        """Forgets all messages but those at the beginning of the conversation."""
        if self._open is not None:
            self._open.close()
        self.messages, self._cache, self.tokens_read = list(self._beginning), None, 0

    def _of_turn(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options of a turn; the key of all turns is another one in each."""
        both = {**self._options, **options}
        if options.get("key") is None and both.get("key") is not None:
            one = check_key(both["key"], "to sample every turn with")
            both["key"] = jax.random.fold_in(one, len(self.messages))
        return both

    def _room(self, length: int) -> int:
        """Returns the number of tokens that fit after so many, or raises if none do."""
        origin = self._model.origin
        trained = None if origin is None else origin.trained_length
        context = self._model.max_seq_length or trained
        if context is None:
            return 2**31 - 1
        if length >= context:
            raise ValueError(
                f"the conversation has outgrown the model's context of {context} tokens: with this "
                f"message it has {length}, and there must be room for an answer. Shorten the "
                "message, remove some of .messages, or begin anew with reset()."
            )
        return context - length

    def _continue(self, ids: list[int]) -> tuple[int, Cache | None]:
        """Returns how many of the tokens need not be read, and the cache that holds these."""
        cache = self._cache
        if cache is None:
            return 0, None
        length = int(cache.columns)
        seen = np.asarray(cache.tokens)[0, :length].tolist()
        # The last token is read in any case, because the first new one follows from it.
        known = min(common_length([seen, ids]), len(ids) - 1)
        back = length - known
        rolls = any(layer.positions is not None for layer in cache.layers)
        if known == 0 or (rolls and back > SPARE):  # these layers have lost older tokens
            return 0, None
        return known, _rewind(cache, jnp.int32(back)) if back else cache


def as_message(message: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message, which a text is from the user.

    Example:
        >>> as_message("Hello")
        {'role': 'user', 'content': 'Hello'}
    """
    if isinstance(message, str):
        return {"role": "user", "content": message}
    if not isinstance(message, Mapping):
        raise ValueError(
            'message must be a text or a dict such as {"role": "user", "content": "Hello"}, got '
            f"{shorten(message)}."
        )
    return dict(message)


@eqx.filter_jit
def _rewind(cache: Cache, columns: Int[Array, ""]) -> Cache:
    return cache.rewind(columns)
