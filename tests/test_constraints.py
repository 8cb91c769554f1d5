"""Constraints in every loop of `generate`: what they allow, and what does not fit."""

import re

import jax
import numpy as np
import pytest

from jaxformers import (
    Regex,
    RotaryPositionalEncoding,
    Tokenizer,
    TransformerLM,
)

tokenizers = pytest.importorskip("tokenizers")
KEY = jax.random.key(5)
WORDS = ["yes", "no", "ab", "aba", '"a', '":', ' "', "né"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(WORDS)


def byte_tokenizer(words):
    """A token for each byte, some for words, and one that ends a text."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = sorted(level.alphabet())
    names += [level.pre_tokenize_str(word)[0][0] for word in words]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = level, tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    config = b'{"eos_token": "</s>"}'
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config}
    return Tokenizer(files)


@pytest.fixture(scope="module")
def lm(tokenizer):
    """Its vocabulary is larger than the tokenizer's, as padded ones are."""
    sizes = {"d_model": 24, "num_heads": 4, "d_ff": 40, "num_layers": 1, "max_seq_length": 512}
    rotary = RotaryPositionalEncoding()
    return TransformerLM(tokenizer.vocab_size + 7, **sizes, position=rotary, key=jax.random.key(0))


PROMPT = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
SAMPLED = {"key": KEY, "temperature": 2.0}
LOOPS = {
    "greedy": {},
    "sampled": SAMPLED,
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, **SAMPLED},
    "lookup": {"prompt_lookup": 2, "draft_length": 3},
    "draft": {"draft_length": 3, **SAMPLED},
}
PATTERNS = "(ab|né){1,3}", "[0-9]{3}-(yes|no)"


def texts_of(tokenizer, tokens, start=5):
    """The new text of each row, and whether it has ended."""
    ended = (np.asarray(tokens)[:, start:] == tokenizer.end_token).any(1)
    return tokenizer.decode(np.asarray(tokens)[:, start:].tolist()), ended


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_gives_texts_of_the_constraint_of_the_row(lm, tokenizer, name):
    options = dict(LOOPS[name])
    if name == "draft":
        options["draft_model"] = lm
    constraint = [Regex(PATTERNS[0], tokenizer), None, Regex(PATTERNS[1], tokenizer)]
    options |= {"end_token": tokenizer.end_token, "constraint": constraint}
    tokens = lm.generate(PROMPT, 14, **options)
    texts, ended = texts_of(tokenizer, tokens)
    for text, end, pattern in zip(texts, ended, [PATTERNS[0], None, PATTERNS[1]], strict=True):
        if pattern is not None:
            assert end and re.fullmatch(pattern, text), text
    free = lm.generate(PROMPT, 14, **options | {"constraint": None})
    if "beams" not in name:
        np.testing.assert_array_equal(tokens[1], free[1])
    if "beams" not in name and "draft_length" not in options:
        columns = np.stack(list(lm.stream(PROMPT, 14, **options)), axis=1)
        np.testing.assert_array_equal(columns, tokens[:, 5 : 5 + columns.shape[1]])
