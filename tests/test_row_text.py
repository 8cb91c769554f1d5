"""Tokens become text as whole characters, and a text ends before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.text.row_text import UNKNOWN, RowText, StopStrings, WholeCharacters


def decode(ids):
    return bytes(ids).decode(errors="replace")


def byte_fallback(ids):
    """As sentencepiece: a run of bytes that is no text becomes a sign for each of its bytes."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return UNKNOWN * len(ids)


def row_of(stop=(), ends=(), least=0, before=(), decode=decode):
    return RowText(WholeCharacters(decode, list(before)), stop, ends, least)


def feed(row, tokens):
    pieces = [row.add(token) for token in tokens]
    return [*pieces, row.finish()]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=5))
@pytest.mark.parametrize("decode", [decode, byte_fallback])
def test_pieces_are_whole_characters_and_together_the_text(decode, text, before):
    row = row_of(before=before.encode(), decode=decode)
    pieces = feed(row, text.encode())
    assert "".join(pieces) == row.text == text
    assert all(piece in text for piece in pieces)
    assert row.finish_reason == "length" and row.tokens == list(text.encode())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them(tokens):
    row = row_of()
    pieces = feed(row, tokens)
    assert "".join(pieces) == row.text == decode(tokens)
    # They are not kept back for ever.
    assert all(len("".join(pieces[:n])) >= len(decode(tokens[:n])) - 9 for n in (15, 30, 45))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_runs_of_bytes_that_are_no_text_lose_no_character(tokens):
    row = row_of(decode=byte_fallback)
    pieces = feed(row, tokens)
    assert "".join(pieces) == row.text
    assert (UNKNOWN in row.text) == (UNKNOWN in byte_fallback(tokens))


def test_a_word_follows_the_text_before_it():
    words = {0: "Once", 1: "upon"}

    def decode(ids):  # as sentencepiece: the space before the first word is left out
        return " ".join(words[i] for i in ids)

    assert feed(RowText(WholeCharacters(decode, [0])), [1]) == [" upon", ""]
    assert feed(RowText(WholeCharacters(decode)), [1]) == ["upon", ""]


TEXTS = st.text(alphabet="abc", max_size=20)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


@settings(max_examples=100, deadline=None)
@given(TEXTS, STOPS)
def test_a_text_ends_before_the_first_stop_string(text, stop):
    places = [text.find(x) for x in stop]
    first = min((place for place in places if place >= 0), default=None)
    row = row_of(stop)
    pieces = feed(row, text.encode())
    # Strings that end at the same token: the text ends before the one that begins first.
    wanted, seen = text, ""
    for n in range(len(text) + 1):
        found = [text[:n].find(x) for x in stop if x in text[:n]]
        if found:
            wanted = text[: min(found)]
            break
    assert "".join(pieces) == row.text == wanted
    assert row.finish_reason == ("length" if first is None else "stop")
    for piece in pieces:  # what is shown is never taken back
        seen += piece
        assert wanted.startswith(seen)


def test_stop_strings_within_a_token_and_across_tokens():
    pieces = {0: "one\n", 1: "\ntwo", 2: " END three", 3: "E", 4: "ND"}

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    def text(stop, *tokens):
        row = row_of(stop, decode=decode)
        feed(row, tokens)
        return row.text, row.finish_reason, len(row.tokens)

    assert text(["\n\n"], 0, 1, 2) == ("one", "stop", 2)
    assert text([" END"], 0, 2, 3) == ("one\n", "stop", 2)
    assert text(["END"], 0, 3, 4, 0) == ("one\n", "stop", 3)
    assert text(["END"], 0, 3, 3, 0) == ("one\nEEone\n", "length", 4)
    assert text(["END"], 0, 3) == ("one\nE", "length", 2)


def test_ends_before_the_least_number_of_tokens_do_not_count():
    tokens = list(b"a.b.c;")
    row = row_of(["."], least=3)
    feed(row, tokens)
    assert (row.text, row.finish_reason, row.tokens) == ("a.b", "stop", tokens[:4])
    row = row_of([], [[ord(".")]], least=3)
    feed(row, tokens)
    assert (row.text, row.tokens) == ("a.b", tokens[:4])


def test_end_tokens_are_not_shown_and_sequences_are():
    row = row_of([], [[0], [ord("b"), ord("c")]])
    feed(row, b"ab\0xyz")
    assert (row.text, row.finish_reason, len(row.tokens)) == ("ab", "stop", 3)
    row = row_of([], [[0], [ord("b"), ord("c")]])
    assert "".join(feed(row, b"abcd")) == row.text == "abc" and row.finish_reason == "stop"


def test_a_stop_string_that_begins_again_within_itself():
    stop = StopStrings(["aab"])
    assert "".join(map(stop.add, "caaab")) + stop.finish() == "ca" and stop.found


def test_tokens_without_text_say_nothing_of_how_the_next_word_joins():
    def decode(ids):  # 0 is a special token, which is left out
        return " ".join(f"word{i}" for i in ids if i)

    for tokens in ([1, 0, 2], [1, *[0] * 200, 2, 0, 0, 3], [0, 0, 1, 0, 2]):
        assert "".join(feed(row_of(decode=decode), tokens)) == decode(tokens)
    assert feed(row_of(before=[1, 0], decode=decode), [0, 2])[:2] == ["", " word2"]


def test_the_length_counts_what_is_kept_back():
    row = row_of(stop=["END"])
    for token in b"the EN":
        row.add(token)
    assert (row.text, row.length) == ("the ", 6)
    row.finish()
    assert (row.text, row.length) == ("the EN", 6)
