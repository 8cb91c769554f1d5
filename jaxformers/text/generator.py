"""`TextGenerator`: a generative model with its tokenizer, from text to text."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from jaxformers.checks import check_flag, check_size, explain_options
from jaxformers.generation.options import AllOptions
from jaxformers.pretrained import from_pretrained
from jaxformers.text.answers import answer, compile_ahead, stream
from jaxformers.text.call import (
    BEFORE,
    DEFAULT_NEW_TOKENS,
    Call,
    encode_rows,
    is_several,
    read_call,
    render,
)
from jaxformers.text.conversation import Conversation
from jaxformers.text.directory import tokenizer_beside
from jaxformers.text.scores import TextScore, choose, score_texts
from jaxformers.text.stream import TextStream
from jaxformers.tokenizers.rows import check_texts
from jaxformers.tokenizers.tokenizer import Tokenizer, check_tokenizer
from jaxformers.transformer import Transformer
from jaxformers.transformer_lm import TransformerLM

Messages = Sequence[Mapping[str, Any]]


class TextGenerator:
    """A model that generates, with its tokenizer: text in, text out.

    It is usually made by `from_pretrained`.

    Arguments:
        model: a `TransformerLM`, or a `Transformer`, whose sources are the prompts then.
        tokenizer: its tokenizer.

    Raises:
        ValueError: if they are not of this kind.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({f"word{i}": i for i in range(65)}))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer({"tokenizer.json": words.to_str().encode()})
        >>> text = TextGenerator(model, tokenizer)
        >>> answer = text("word1 word2", max_new_tokens=3)
        >>> answer == "".join(text.stream("word1 word2", max_new_tokens=3))
        True
        >>> [len(x.split()) for x in text(["word1", "word2 word3"], max_new_tokens=4)]
        [4, 4]
    """

    def __init__(self, model: TransformerLM | Transformer, tokenizer: Tokenizer):
        if not isinstance(model, TransformerLM | Transformer):
            raise ValueError(
                "model must be a TransformerLM or a Transformer, which generate, got a "
                f"{type(model).__name__}. TextEmbedder and TextClassifier take encoders."
            )
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(
        cls, path_or_hub_name: str | os.PathLike, **options: Any
    ) -> "TextGenerator":
        """Returns the model of a Hugging Face checkpoint with its tokenizer.

        Arguments:
            path_or_hub_name: a directory, a GGUF file or a name on the hub.
            **options: `dtype`, `sharding` and `quantized`, as for `jaxformers.from_pretrained`.

        Raises:
            ValueError: if there is no such checkpoint, or one that does not generate.
            ImportError: if a package is missing.
        """
        model: Any = from_pretrained(path_or_hub_name, **options)
        return cls(model, tokenizer_beside(model, path_or_hub_name))

    @explain_options
    def __call__(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        batch_size: int = 16,
        skip_special_tokens: bool = True,
        progress: bool | None = None,
        **options: Unpack[AllOptions],
    ) -> Any:
        """Returns the text that continues a prompt, without the prompt.

        Arguments:
            prompt: a text, or a list of texts of any lengths. For an encoder-decoder they are the
                sources, and the result is the target.
            max_new_tokens: the most new tokens of each prompt. None, the default, is 256, or as
                many as the model has positions for.
            stop: one or several strings. The text ends before the first of them.
            batch_size: how many prompts are read at a time, 16. The texts do not depend on it.
            skip_special_tokens: whether to leave special tokens out of the text, True.
            progress: whether to show a bar; None shows one for more prompts than `batch_size` on a
                terminal.
            **options: those of `generate`: `temperature`, `key`, `num_beams` and so on.

        Returns:
            A string, or a list of strings for a list. With `return_scores=True` a `TextGeneration`
            in place of each. With `num_return_sequences`, the texts of a prompt follow one another
            in a list.

        Raises:
            ValueError: if an argument is not of this kind, or the new tokens do not fit.

        Example:
            >>> text = TextGenerator.from_pretrained(path)  # doctest: +SKIP
            >>> text("Once upon", 40, stop="\\n\\n", temperature=0.8, key=key)  # doctest: +SKIP
            ' a time, there was a little girl who lived in a village near the forest.'
        """
        texts = check_texts("prompt", prompt)
        call = self._read(texts, max_new_tokens, stop, skip_special_tokens, options)
        given = call, isinstance(prompt, str), batch_size, progress
        return answer(self.model, self.tokenizer, *given)

    @explain_options
    def stream(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        **options: Unpack[AllOptions],
    ) -> TextStream:
        """Returns the text of the call for the same arguments in pieces, as it comes.

        A piece has whole characters. See `TextStream` for a list of prompts.
        """
        texts = check_texts("prompt", prompt)
        call = self._read(texts, max_new_tokens, stop, skip_special_tokens, options)
        return stream(self.model, self.tokenizer, call, isinstance(prompt, str))

    @explain_options
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        variables: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        skip_special_tokens: bool = True,
        progress: bool | None = None,
        **options: Unpack[AllOptions],
    ) -> Any:
        """Returns the answer to a conversation, written in the form the model was trained on.

        Arguments:
            messages: dicts such as `{"role": "user", "content": "Hello"}` in order, or a list of
                such conversations.
            variables: arguments of `Tokenizer.apply_chat_template`, such as `{"tools": [...]}`,
                `{"enable_thinking": False}` or `{"continue_final_message": True}`.
            max_new_tokens, stop, batch_size, skip_special_tokens, progress, **options: as for a
                prompt.

        Raises:
            ValueError: if there is no chat template, or it refuses the messages; and as for a
                prompt.

        Example:
            >>> text.chat([{"role": "user", "content": "Name three colors."}])  # doctest: +SKIP
            'Red, blue and green.'
        """
        given = max_new_tokens, stop, skip_special_tokens, options
        call, is_single = self._read_chat(messages, variables, *given)
        return answer(self.model, self.tokenizer, call, is_single, batch_size, progress)

    @explain_options
    def chat_stream(
        self,
        messages: Messages | Sequence[Messages],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        variables: Mapping[str, Any] | None = None,
        skip_special_tokens: bool = True,
        **options: Unpack[AllOptions],
    ) -> TextStream:
        """Returns the answer of `chat` for the same arguments in pieces, as it comes."""
        given = max_new_tokens, stop, skip_special_tokens, options
        call, is_single = self._read_chat(messages, variables, *given)
        return stream(self.model, self.tokenizer, call, is_single)

    @explain_options
    def conversation(
        self,
        messages: Messages = (),
        *,
        stop: str | Sequence[str] | None = None,
        variables: Mapping[str, Any] | None = None,
        skip_special_tokens: bool = True,
        **options: Unpack[AllOptions],
    ) -> Conversation:
        """Returns a conversation that keeps its cache, so that each turn reads only what is new.

        Arguments:
            messages: those at its beginning, such as `[{"role": "system", "content": "..."}]`.
            stop, variables, skip_special_tokens, **options: as for `chat`, for every turn.
        """
        given = messages, variables, stop, skip_special_tokens, options
        return Conversation(self.model, self.tokenizer, *given)

    def choose(
        self,
        prompt: str | Messages,
        answers: Sequence[str],
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Returns the probability of each of some answers, given that it is one of them.

        The prompt is read once. A probability is that of the answer's text as the beginning of what
        follows the prompt, so answers should not begin with one another.

        Arguments:
            prompt: a text, or the messages of a conversation.
            answers: at least two different texts. After a text that ends without a space they
                usually begin with one.
            variables: as for `chat`; None for a text.

        Raises:
            ValueError: if an argument is not of this kind, or there is no room for an answer.

        Example:
            >>> text.choose("Is the sky blue? Answer:", [" yes", " no"])  # doctest: +SKIP
            {' yes': 0.74, ' no': 0.26}
        """
        is_chat = not isinstance(prompt, str)
        if is_chat:
            prompt = render(self.tokenizer, prompt, variables)
        elif variables is not None:
            raise ValueError("variables are for messages, got a text as prompt. Leave them out.")
        else:
            check_texts("prompt", prompt)
        if isinstance(answers, str):
            raise ValueError(f"answers must be a list of texts, got the text {answers!r:.60}.")
        listed = check_texts("answers", answers)
        return choose(self.model, self.tokenizer, str(prompt), listed, is_chat)

    def score(
        self, texts: str | Sequence[str], given: str | Sequence[str] | None = None
    ) -> TextScore | list[TextScore]:
        """Returns the log-probability of each token of a text.

        Arguments:
            texts: a text, or a list of texts. Its first token is not scored, unless the tokenizer
                adds a start token or something is given.
            given: what comes before the text, or the source of an encoder-decoder: one text, or
                one for each. Its tokens are not scored.

        Raises:
            ValueError: if there is no token to score, or a text is too long.

        Example:
            >>> text.score("Paris.", given="The capital of France is ").total  # doctest: +SKIP
            -2.41
        """
        listed = check_texts("texts", texts)
        before = None if given is None else check_texts("given", given)
        if before is not None and isinstance(given, str):
            before = before * len(listed)
        if before is not None and len(before) != len(listed):
            raise ValueError(
                f"given must be one text, or one for each of {len(listed)} texts, got "
                f"{len(before)}."
            )
        scores = score_texts(self.model, self.tokenizer, listed, before)
        return scores[0] if isinstance(texts, str) else scores

    @explain_options
    def warm_up(
        self,
        prompt_tokens: int = 128,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        batch_size: int = 1,
        streams: bool = False,
        stop: str | Sequence[str] | None = None,
        **options: Unpack[AllOptions],
    ) -> float:
        """Compiles what later calls need, and returns the seconds that it took.

        Lengths and batch sizes are rounded up to some sizes, and every pair of sizes has a program
        of its own. Afterwards, calls with prompts up to these sizes compile nothing if
        `max_new_tokens` is rounded up to the same size and the options are of the same kind.

        Arguments:
            prompt_tokens: the longest prompt in tokens, 128.
            max_new_tokens: as in the calls to come, 256.
            batch_size: the largest number of prompts at a time, 1.
            streams: whether to compile for `stream` and conversations instead, False.
            stop: stop strings like those of the calls to come. Calls with any have programs of
                their own; streams have the same ones with and without.
            **options: those of the calls to come.
        """
        check_size(
            prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        check_flag(streams=streams)
        sizes = prompt_tokens, max_new_tokens, batch_size
        return compile_ahead(self.model, self.tokenizer, *sizes, streams, stop, options)

    def _read(
        self,
        texts: list[str],
        max_new_tokens: int | None,
        stop: str | Sequence[str] | None,
        skip_special_tokens: bool,
        options: Mapping[str, Any],
    ) -> Call:
        """Returns a call with prompts, checked."""
        rows = encode_rows(self.tokenizer, texts)
        before = [row[-BEFORE:] for row in rows]
        given = max_new_tokens, stop, skip_special_tokens, options
        return read_call(self.model, self.tokenizer, rows, before, *given)

    def _read_chat(
        self,
        messages: Any,
        variables: Mapping[str, Any] | None,
        max_new_tokens: int | None,
        stop: str | Sequence[str] | None,
        skip_special_tokens: bool,
        options: Mapping[str, Any],
    ) -> tuple[Call, bool]:
        """Returns a call with conversations, checked, and whether there is a single one."""
        is_single = not is_several(messages)
        conversations = [messages] if is_single else messages
        texts = [render(self.tokenizer, one, variables) for one in conversations]
        rows = encode_rows(self.tokenizer, texts, add_special_tokens=False)
        continues = bool((variables or {}).get("continue_final_message"))
        before = [row[-BEFORE:] if continues else [] for row in rows]
        given = max_new_tokens, stop, skip_special_tokens, options
        return read_call(self.model, self.tokenizer, rows, before, *given), is_single
