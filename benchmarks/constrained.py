"""Measures constraints: their tables, their cost per token, and the schemas that are accepted.

    python benchmarks/constrained.py CHECKPOINT [--suite DIRECTORY] [--rounds N]

CHECKPOINT is a language model with its tokenizer, a directory or a GGUF file. For each constraint
it prints the time to build its tables over the tokens, and their size. Then prompts are continued
by 64 tokens with a constraint that allows every text and without one, in turns, greedily; the cost
is the median of the ratios. DIRECTORY holds files of the JSON-Schema-Test-Suite, such as
tests/draft2020-12. Of each schema that is accepted, random texts are drawn from the tables and
validated by jsonschema; one that does not validate makes the exit status 1.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np

from jaxformers import JSONSchema, Regex, TextGenerator

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string"},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "married"],
}
TEXTS, LONGEST = 20, 60


def build(name, make, text, ends):
    """Prints the time to build the tables of a constraint, and their size."""
    begin = time.perf_counter()
    tables = make().tables(text.model.vocab_size, ends)
    seconds = time.perf_counter() - begin
    states, columns = tables.next.shape
    size = (tables.next.nbytes + tables.class_of.nbytes) / 1e6
    print(f"{name}: {states} states, {columns} columns, {size:.2f} MB, {seconds:.2f} s")


def cost(text, rounds):
    """Prints the ratio of the times per token, with a constraint over without."""
    free = Regex(r"(.|\n)*", text.tokenizer)
    ratios = []
    for i in range(rounds + 1):
        times = []
        for options in ({}, {"constraint": free}):
            begin = time.perf_counter()
            out = text("Once upon a time", 64, return_scores=True, **options)
            times.append((time.perf_counter() - begin) / len(out.tokens))
        if i:  # the first round compiles
            ratios.append(times[1] / times[0])
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(
        f"time per token with a constraint over without: {statistics.median(ratios):.3f} ({spread})"
    )


def random_texts(tables, tokenizer, rng):
    """Returns texts of random legal tokens; long ones go the shortest way to an end."""
    steps = np.where(tables.next[:, 1] >= 0, 0, np.inf)  # to an end; column 1 is that of end tokens
    for _ in range(len(steps)):
        after = np.where(tables.next >= 0, steps[tables.next], np.inf).min(1) + 1
        if (after >= steps).all():
            break
        steps = np.minimum(steps, after)
    for _ in range(TEXTS):
        state, tokens = 0, []
        while True:
            legal = np.flatnonzero(tables.next[state] >= 0)
            if len(tokens) > LONGEST:
                legal = (
                    [1]
                    if steps[state] == 0
                    else [min(legal, key=lambda c: steps[tables.next[state, c]])]
                )
            column = rng.choice(legal)
            if column == 1:
                break
            tokens.append(int(rng.choice(np.flatnonzero(tables.class_of == column))))
            state = tables.next[state, column]
        yield tokenizer.decode(tokens)


def suite(directory, tokenizer, vocab_size, ends):
    """Prints the share of schemas that are accepted, and returns how many texts were wrong."""
    rng, accepted, refused, texts, wrong = np.random.default_rng(0), 0, 0, 0, 0
    for path in sorted(directory.glob("*.json")):
        for case in json.loads(path.read_text()):
            try:
                tables = JSONSchema(case["schema"], tokenizer).tables(vocab_size, ends)
            except ValueError:
                refused += 1
                continue
            accepted += 1
            validator = jsonschema.Draft202012Validator(case["schema"])
            for text in random_texts(tables, tokenizer, rng):
                texts += 1
                if not validator.is_valid(json.loads(text)):
                    wrong += 1
                    print(f"wrong: {path.name} {json.dumps(case['schema'])[:120]} {text[:120]!r}")
    total = accepted + refused
    print(f"schemas of the suite accepted: {accepted} of {total} ({accepted / total:.0%})")
    print(f"{texts} random texts of these, {wrong} wrong")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    text = TextGenerator.from_pretrained(args.checkpoint)
    tokenizer, ends = text.tokenizer, frozenset([text.tokenizer.end_token])
    tokenizer.decode([0])
    build("first use of the tokenizer", lambda: Regex("a", tokenizer), text, ends)
    build("date", lambda: Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}", tokenizer), text, ends)
    build("object of four fields", lambda: JSONSchema(PERSON, tokenizer), text, ends)
    cost(text, args.rounds)
    sys.exit(bool(args.suite and suite(args.suite, tokenizer, text.model.vocab_size, ends)))


if __name__ == "__main__":
    main()
