"""Texts for fine-tuning from files of chats, of prompts with answers, or of plain text."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers.data.padded import Rewritten, chat, check_unicode, count_spans
from jaxformers.data.text_files import check_inputs, read_pieces
from jaxformers.files.json_file import shorten

Text = tuple[np.ndarray, np.ndarray]  # ids, and for each whether it counts as a target
LINES = ".jsonl", ".ndjson"
TABLES = ".json", ".csv", ".tsv", ".parquet", ".gz"  # which are no lines and no plain text
FORMS = "messages; prompt and completion; instruction and output; or text"


def read_examples(path: str | os.PathLike, tokenizer: Any) -> list[Text]:
    """Returns the texts of a file, and which of their tokens count as targets.

    Each line of a `.jsonl` file is a JSON object of one of these forms. Other keys are not read.

    - `{"messages": [{"role": "user", "content": "Hi"}, ...]}`, a chat: the answers of the
      assistant count. `"tools"` beside them are passed to the chat template.
    - `{"prompt": "2 + 2 =", "completion": " 4"}`: the completion and the end token count.
    - `{"instruction": "Add.", "input": "2, 2", "output": "4"}`: a chat of two messages if the
      tokenizer has a chat template, else a prompt and a completion.
    - `{"text": "..."}`: all tokens count, and the end token.

    Any other file is plain text, one document, but tables such as `.json` and `.csv` are refused.

    Arguments:
        path: the file, UTF-8.
        tokenizer: a `jaxformers.Tokenizer`; chats need its chat template.

    Returns:
        A list of `(ids, counts)`, as `chat` and `answer` return them, for `PackedDocuments` or
        `PaddedTexts`. A chat whose template rewrites earlier answers, for instance without their
        thoughts, is one text for each answer.

    Raises:
        ValueError: if the file is missing or empty, or a line is of no such form or has nothing to
            learn. The error names the line.

    Example:
        >>> import tempfile, tokenizers
        >>> from pathlib import Path
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({"2": 0, "+": 1, "=": 2, "4": 3, "</s>": 4}))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer({
        ...     "tokenizer.json": words.to_str().encode(),
        ...     "tokenizer_config.json": b'{"eos_token": "</s>"}',
        ... })
        >>> path = Path(tempfile.mkdtemp(), "sums.jsonl")
        >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": "4"}')
        >>> read_examples(path, tokenizer)
        [(array([0, 1, 0, 2, 3, 4]), array([False, False, False, False,  True,  True]))]
    """
    return [text for group in read_groups(path, tokenizer) for text in group]


def read_groups(path: str | os.PathLike, tokenizer: Any) -> list[list[Text]]:
    """Returns the texts of each line of a file; arguments and errors are those of `read_examples`.

    An evaluation holds out whole lines, because the texts of one line repeat each other.
    """
    path = Path(path)
    check_inputs([path])
    if path.suffix.lower() in TABLES:
        raise ValueError(
            f"{path} is no plain text. Write one JSON object per line to a .jsonl file."
        )
    if path.suffix.lower() not in LINES:
        text = "".join(piece.text for piece in read_pieces(path))
        return [[_whole(tokenizer, text)]]
    examples = []
    for number, record in _records(path):
        try:
            made = texts_of_record(tokenizer, record)
            if not any(counts[1:].any() for _, counts in made):
                raise ValueError("no token of it counts as a target: there is nothing to learn.")
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
        examples.append(made)
    if not examples:
        raise ValueError(f"{path} has no line with an example.")
    return examples


def texts_of_record(tokenizer: Any, record: Mapping[str, Any]) -> list[Text]:
    """Returns the texts of one line, see `read_examples`.

    Raises:
        ValueError: if the line has no known form.
    """
    if "messages" in record:
        tools = record.get("tools")
        return conversation(tokenizer, record["messages"], **({"tools": tools} if tools else {}))
    if {"prompt", "completion"} <= record.keys():
        prompt, reply = (_string(record, key) for key in ("prompt", "completion"))
        return [_answered(tokenizer, prompt, reply)]
    if {"instruction", "output"} <= record.keys():
        given = [_string(record, key) for key in ("instruction", "input") if record.get(key)]
        return [_instructed(tokenizer, "\n\n".join(given), _string(record, "output"))]
    if "text" in record:
        return [_whole(tokenizer, _string(record, "text"))]
    raise ValueError(f"an example must have {FORMS}; got the keys {sorted(record)!r:.200}.")


def conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list:
    """Returns the texts of a chat, in which the answers of the assistant count.

    It is one text where the template writes a message in the same way whatever follows, as `chat`
    returns it, and else one text for each answer, in which the last answer counts.
    """
    if not isinstance(messages, list) or not all(isinstance(x, dict) for x in messages):
        raise ValueError(f"messages must be a list of objects, got {shorten(messages)}.")
    for k, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {k} must have a role, such as user, got {shorten(message)}.")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and "tool_calls" in message):
            raise ValueError(f"the content of message {k} must be a text, got {shorten(content)}.")
    try:
        return [chat(tokenizer, messages, **variables)]
    except Rewritten:
        ends = [k + 1 for k, x in enumerate(messages) if x.get("role") == "assistant"]
        return [_last_answer(tokenizer, messages[:end], **variables) for end in ends]


def _last_answer(tokenizer: Any, messages: list[dict], **variables: Any) -> Text:
    """Returns a chat in which its last message counts, as far as it differs from its opening."""
    text, opened, asked = (
        tokenizer.apply_chat_template(part, add_generation_prompt=prompt, **variables)
        for part, prompt in ((messages, False), (messages[:-1], True), (messages[:-1], False))
    )
    # A template may open an answer with more than it writes before a given one, such as "<think>".
    begin = len(os.path.commonprefix([text, opened]))
    if begin < len(asked.rstrip()):
        raise ValueError(
            f"the chat template writes the messages before number {len(messages) - 1} differently "
            "when it follows, so that nobody can tell where the answer begins. Pass a prompt and a "
            "completion instead."
        )
    return count_spans(tokenizer, text, [(begin, len(text.rstrip()))])


def _answered(tokenizer: Any, prompt: str, reply: str) -> Text:
    """Returns a prompt and a reply of which the reply and the end token count."""
    ids, ends = _encoded(tokenizer, prompt + reply)
    if not len(ids) or ends[0] > len(prompt):
        raise ValueError("the prompt must have at least one token, got none.")
    return np.append(ids, _end(tokenizer)), np.append(ends > len(prompt), True)


def _instructed(tokenizer: Any, instruction: str, reply: str) -> Text:
    if not tokenizer.chat_templates:
        return _answered(tokenizer, f"{instruction}\n\n", reply)
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": reply}]
    [text] = conversation(tokenizer, messages)
    return text


def _whole(tokenizer: Any, text: str) -> Text:
    ids = np.append(_encoded(tokenizer, text)[0], _end(tokenizer))
    return ids, np.ones(len(ids), np.bool_)


def _encoded(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a text and the places where they end in it.

    The special tokens before a text end at 0, and those after it are left out.
    """
    check_unicode(text)
    encoding = tokenizer.backend.encode(text)
    ids, special = np.array(encoding.ids, np.int64), encoding.special_tokens_mask
    while len(ids) and special[len(ids) - 1] and ids[-1] == tokenizer.end_token:
        ids = ids[:-1]
    return ids, np.array([end for _, end in encoding.offsets[: len(ids)]], np.int64)


def _end(tokenizer: Any) -> int:
    if tokenizer.end_token is None:
        raise ValueError(
            "the tokenizer has no end token, so that a model could not learn where an answer ends. "
            'Name it in its tokenizer_config.json: "eos_token".'
        )
    return tokenizer.end_token


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be a text, got {shorten(record[key])}.")
    return record[key]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a file with the numbers of their lines."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {path} is no JSON in UTF-8: {error}.") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"line {number} of {path} must be a JSON object, got {shorten(record)}."
                )
            yield number, record
