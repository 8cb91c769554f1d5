"""Constraints in every loop of `generate`: what they allow, and what does not fit."""

import dataclasses
import functools
import gc
import itertools
import json
import re
from typing import Literal

import jax
import numpy as np
import pytest

from jaxformers import (
    Choices,
    JSONSchema,
    LarkGrammar,
    Regex,
    RotaryPositionalEncoding,
    Tokenizer,
    TransformerLM,
)
from jaxformers.constraints.automaton import determine
from jaxformers.constraints.expressions import normalize
from jaxformers.constraints.json_schema import read_schema
from jaxformers.constraints.regex_syntax import PYTHON, parse
from jaxformers.constraints.tables import make_tables
from jaxformers.constraints.utf8 import to_bytes
from jaxformers.constraints.vocabulary import Vocabulary

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


@pytest.mark.few(3)
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


def test_options_that_leave_nothing_and_what_does_not_fit(lm, tokenizer):
    end = {"end_token": tokenizer.end_token}
    yes = Choices(["yes"], tokenizer)
    with pytest.raises(ValueError, match="in row 0 of the batch no token is left to choose"):
        lm.generate(PROMPT, 14, constraint=yes, min_new_tokens=9, **end)
    with pytest.raises(ValueError, match="no token is left to choose"):
        list(lm.stream(PROMPT, 14, constraint=yes, min_new_tokens=9, **end))
    with pytest.raises(ValueError, match="Pass end_token="):
        lm.generate(PROMPT, 14, constraint=yes)
    with pytest.raises(ValueError, match="one per row, 3 of them"):
        lm.generate(PROMPT, 14, constraint=[yes], **end)
    with pytest.raises(ValueError, match="fewer sequences than num_return_sequences"):
        one = Choices(["q"], tokenizer)  # "yes" is a token, and three
        lm.generate(PROMPT, 14, constraint=one, num_beams=3, num_return_sequences=2, **end)
    out = lm.generate(
        PROMPT, 4, constraint=Regex("a{9}", byte_tokenizer([])), return_scores=True, **end
    )
    assert out.finish_reason == ["length"] * 3


def test_another_constraint_of_the_size_compiles_nothing(lm, tokenizer):
    options = {"end_token": tokenizer.end_token, "return_scores": True}
    lm.generate(PROMPT, 14, constraint=Regex("[0-9]{3}", tokenizer), **options)
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for other in (Choices(["yes", "no"], tokenizer), JSONSchema(schema, tokenizer)):
        assert lm.generate(PROMPT, 14, constraint=other, **options).compile_seconds == 0


def random_pattern(random, depth):
    """A pattern without endless repetition, and the length of its longest text."""
    kind = random.integers(6) if depth else 0
    if kind < 2:
        return str(random.choice(["a", "é", "日", ".", "[aé]", "[éq]"])), 1
    one, length = random_pattern(random, depth - 1)
    if kind < 4:
        other, more = random_pattern(random, depth - 1)
        return (one + other, length + more) if kind == 2 else (f"(?:{one}|{other})", length + more)
    least, most = sorted(random.integers(0, 3, 2).tolist())
    return f"(?:{one}){{{least},{most}}}", length * most


LETTERS = "aé日q"
PIECES = [x.encode() for x in ("a", "é", "日", "aa", "é日")]
PIECES += [b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5", b"\xa9a", b"\xa5\xc3", b"q"]


def test_masks_equal_brute_force():
    """Every state is compared; tokens may begin and end within a letter, or be missing."""
    random, patterns = np.random.default_rng(3), 0
    while patterns < 300:
        pattern, longest = random_pattern(random, 3)
        if longest > 5:
            continue
        patterns += 1
        every = ("".join(x) for n in range(6) for x in itertools.product(LETTERS, repeat=n))
        texts = [x.encode() for x in every if re.fullmatch(pattern, x)]
        kept = random.random(len(PIECES)) < 0.8
        tokens = [x if keep else None for x, keep in zip(PIECES, kept, strict=True)]
        compare_masks(pattern, texts, tokens)


def compare_masks(pattern, texts, tokens):
    @functools.cache
    def can_be_written(rest):
        pairs = [(x, rest[len(x) :]) for x in tokens if x and rest.startswith(x)]
        return not rest or any(can_be_written(after) for _, after in pairs)

    def is_legal(before):
        return any(x.startswith(before) and can_be_written(x[len(before) :]) for x in texts)

    end, size = len(tokens), len(tokens) + 3
    automaton = to_bytes(determine(parse(pattern, ASKED)))
    tables = make_tables(automaton, Vocabulary(tokens), size, {end})
    if tables is None:
        assert not is_legal(b""), pattern
        return
    waiting = {b"": 0}
    while waiting:
        before, state = waiting.popitem()
        after = tables.next[state, tables.class_of]
        wanted = [token is not None and is_legal(before + token) for token in tokens]
        assert ((after >= 0) == [*wanted, before in texts, False, False]).all(), (pattern, before)
        waiting |= {before + x: after[i] for i, x in enumerate(tokens) if wanted[i]}


# The letters of the texts that are tried, so that no others come for ".".
ASKED = PYTHON._replace(any_character=normalize((ord(x), ord(x)) for x in LETTERS))

SCHEMAS = [
    {"type": "integer", "minimum": -17, "exclusiveMaximum": 205},
    {"type": "number", "minimum": -2.5, "maximum": 3},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": '^["\\\\a-c\n]+$', "maxLength": 4},
    {"type": "string", "pattern": "[0-9]{3}"},
    {
        "properties": {
            '"\\é': {"type": ["null", "string"]},
            "b": {},
            "c": {"const": [1, {"": "\n"}]},
        }
    },
    {"properties": {"a": False, "b": {"type": "boolean"}}, "required": ["b", "z"]},
    {"items": {"$ref": "#/$defs/x"}, "minItems": 2, "$defs": {"x": {"enum": [1, "1", None]}}},
    {"anyOf": [{"type": "array", "maxItems": 2}, {"minLength": 3}]},
    {},
]


def random_text(tables, vocabulary, random):
    """A text by random legal tokens, and after some of them by those nearest to its end."""
    columns = tables.next.shape[1]
    distance = np.where(tables.next[:, 1] >= 0, 0, 10**6)
    for _ in range(len(distance)):
        after = np.where(tables.next[:, 2:] >= 0, distance[tables.next[:, 2:]], 10**6)
        nearer = np.minimum(distance, after.min(1, initial=10**6) + 1)
        if (nearer == distance).all():
            break
        distance = nearer
    tokens = [np.flatnonzero(tables.class_of == x) for x in range(columns)]
    state, text = 0, b""
    while distance[state] or (len(text) < 60 and random.random() < 0.8):
        legal = [x for x in range(2, columns) if tables.next[state, x] >= 0]
        if not legal:
            break
        if len(text) >= 60:
            legal = [min(legal, key=lambda x: distance[tables.next[state, x]])]
        column = random.choice(legal)
        text, state = (
            text + vocabulary[int(random.choice(tokens[column]))],
            tables.next[state, column],
        )
    return text.decode()


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_texts_of_a_schema_are_valid(schema, tokenizer):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    constraint, random = JSONSchema(json.dumps(schema), tokenizer), np.random.default_rng(2)
    tables = constraint.tables(tokenizer.vocab_size, frozenset([tokenizer.end_token]))
    for _ in range(10):
        validator.validate(json.loads(random_text(tables, constraint.vocabulary, random)))


REFUSED = {
    "keyword format": {"type": "string", "format": "date"},
    "keyword uniqueItems": {"items": {"uniqueItems": True}},
    "recursive": {"properties": {"a": {"$ref": "#"}}},
    "leads nowhere": {"$ref": "#/$defs/b"},
    "anyOf beside type": {"anyOf": [{}], "type": "string"},
    "type must be": {"type": "text"},
    "has \\^ or": {"pattern": "^a|b$"},
    "look-ahead": {"pattern": "(?=a)b"},
    "too large": {"maxLength": 10**9},
    "schema must be": 5,
    "schema must be JSON": '{"items":' * 100_000,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_enforced_is_refused_by_name(message, tokenizer):
    with pytest.raises(ValueError, match=message):
        JSONSchema(REFUSED[message], tokenizer)


@pytest.mark.parametrize(
    "pattern", ["(", "(a)\\1", "a(?=b)", "a\\b", "a^b", "a*+", "(?m)a", ".*a.{30}"]
)
def test_patterns_that_no_automaton_follows_are_refused(pattern, tokenizer):
    with pytest.raises(ValueError, match="pattern|too large"):
        Regex(pattern, tokenizer)


def test_constraints_that_no_token_can_write(tokenizer):
    tables = Regex("(?:x[^\\W\\w]|a)b", tokenizer).tables(tokenizer.vocab_size, frozenset())
    assert len(tables.next) == 3  # nothing follows x
    with pytest.raises(ValueError, match="no text that the tokens"):
        Choices(["q"], tokenizer).tables(5, frozenset([1]))


@dataclasses.dataclass
class Point:
    x: int
    name: str | None = None


@dataclasses.dataclass
class Line:
    points: list[Point]
    kind: Literal["solid", "dotted"]


def test_schemas_of_dataclasses_and_pydantic(tokenizer):
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    point["properties"]["name"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    found = read_schema(Line)
    assert found["properties"]["points"]["items"] == point | {"additionalProperties": False}
    assert found["required"] == ["points", "kind"]
    pydantic = pytest.importorskip("pydantic")
    JSONSchema(pydantic.create_model("Model", a=(int, ...), b=(list[str], [])), tokenizer)


NESTED = 'start: "(" start ")" | "yes" | "no"'


def is_nested(text):
    return re.fullmatch(r"(\(*)(yes|no)(\)*)", text) and text.count("(") == text.count(")")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", LOOPS)
def test_a_recursive_grammar_in_every_loop(lm, tokenizer, name):
    pytest.importorskip("llguidance")
    options = dict(LOOPS[name])
    if name == "draft":
        options["draft_model"] = lm
    grammar, end = LarkGrammar(NESTED, tokenizer), tokenizer.end_token
    constraints = [grammar, None, Regex(PATTERNS[1], tokenizer)]
    out = lm.generate(
        PROMPT, 40, constraint=constraints, end_token=end, return_scores=True, **options
    )
    texts, _ = texts_of(tokenizer, out.tokens)
    assert not out.finished[0] or is_nested(texts[0])
    assert re.fullmatch(PATTERNS[1], texts[2])
    one = lm.generate(PROMPT[:1], 3, constraint=grammar, end_token=end, **options)
    [text], _ = texts_of(tokenizer, one)  # which may be cut in the middle
    assert re.fullmatch(r"\(*(y|ye|yes|n|no)?\)*", text)


def test_recursive_json_and_streams(lm, tokenizer):
    pytest.importorskip("llguidance")
    nodes = {"type": "array", "items": {"$ref": "#/$defs/node"}}
    node = {"type": "object", "properties": {"ab": nodes}, "additionalProperties": False}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    grammar, end = LarkGrammar.of_json_schema(schema, tokenizer), tokenizer.end_token
    options = {"constraint": grammar, "end_token": end, **SAMPLED}
    finished = 0
    for seed in range(4):
        options["key"] = jax.random.key(seed)
        out = lm.generate(PROMPT, 60, **options, return_scores=True)
        for text, done in zip(texts_of(tokenizer, out.tokens)[0], out.finished, strict=True):
            finished += bool(done)
            assert not done or isinstance(json.loads(text), dict)
        columns = np.stack([*lm.stream(PROMPT, 60, **options)], axis=1)
        np.testing.assert_array_equal(columns, out.tokens[:, 5 : 5 + columns.shape[1]])
    assert finished > 5


def test_tables_are_followed_on_the_host(tokenizer):
    """As the tables say, in any order of questions, and all is legal after an illegal token."""
    constraint, ends = Regex(PATTERNS[0], tokenizer), frozenset([tokenizer.end_token])
    size = tokenizer.vocab_size + 7
    tables, follower = constraint.tables(size, ends), constraint.follower(size, ends)
    random, ended = np.random.default_rng(2), 0
    for _ in range(20):
        state, tokens = 0, []
        while len(tokens) < 12:
            wanted = tables.next[state, tables.class_of] >= 0
            np.testing.assert_array_equal(follower.legal(tuple(tokens)), wanted)
            assert not wanted[tokenizer.vocab_size :].any()
            tokens.append(int(random.choice(np.flatnonzero(wanted))))
            state = tables.next[state, tables.class_of[tokens[-1]]]
            ended += tokens[-1] in ends
    fresh = constraint.follower(size, ends)
    np.testing.assert_array_equal(fresh.legal(tuple(tokens)), follower.legal(tuple(tokens)))
    assert ended > 20 and follower.legal((*tokens[:1], 1, 1)).all()
    assert follower.nbytes == tables.next.nbytes + tables.class_of.nbytes


def test_a_stream_keeps_its_grammar(lm, tokenizer):
    pytest.importorskip("llguidance")
    options = {"end_token": tokenizer.end_token, "key": KEY}
    stream = lm.stream(PROMPT[:1], 8, constraint=LarkGrammar(NESTED, tokenizer), **options)
    gc.collect()
    assert re.fullmatch(r"\(*(y|ye|yes|n|no)?\)*(</s>)*", tokenizer.decode(np.ravel([*stream])))


def test_grammars_that_cannot_be_followed(tokenizer, no_shape_checker):
    pytest.importorskip("llguidance")
    for grammar in ("", "start: x", "start: /(?=a)b/", 3, "START: /a/"):
        with pytest.raises(ValueError, match="grammar"):
            LarkGrammar(grammar, tokenizer)
    for schema in ({"not": {}}, "{", {"format": "none"}, {"$ref": "#/nowhere"}, {"x": object()}):
        with pytest.raises(ValueError, match="of_json_schema|schema must"):
            LarkGrammar.of_json_schema(schema, tokenizer)


def test_masks_are_those_of_llguidance():
    """It forces the tokens of text that has to come; where several texts may come, masks agree."""
    llguidance = pytest.importorskip("llguidance")
    random, compared = np.random.default_rng(3), 0
    for _ in range(60):
        words = ["".join(random.choice([*LETTERS], random.integers(2, 4))) for _ in range(9)]
        tokenizer = byte_tokenizer(words)
        pattern, _ = random_pattern(random, 3)
        end = tokenizer.end_token
        ours = Regex(pattern, tokenizer).tables(tokenizer.vocab_size, frozenset([end]))
        grammar = LarkGrammar.__new__(LarkGrammar)
        grammar._begin(llguidance.LLMatcher.grammar_from_regex(pattern), tokenizer, pattern)
        follower = grammar.follower(tokenizer.vocab_size, frozenset([end]))
        for _ in range(4):
            state, tokens = 0, []
            while len(tokens) < 12:
                legal = ours.next[state][ours.class_of] >= 0
                theirs = follower.legal(tuple(tokens))
                assert not (theirs & ~legal).any(), (pattern, tokens)
                if theirs.sum() > 1:
                    compared += 1
                    np.testing.assert_array_equal(legal, theirs, err_msg=f"{pattern} {tokens}")
                token = int(random.choice(np.flatnonzero(legal)))
                if token == end:
                    assert follower.may_end(tuple(tokens))
                    break
                state = ours.next[state, ours.class_of[token]]
                tokens.append(token)
    assert compared > 100
