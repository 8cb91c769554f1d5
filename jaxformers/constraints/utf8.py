"""Automata over characters as automata over the bytes of UTF-8."""

from typing import NamedTuple

import numpy as np

from jaxformers.constraints.automaton import CharAutomaton, too_large

# Entries of the largest table of bytes, of four bytes each.
ENTRIES = 32_000_000


class ByteAutomaton(NamedTuple):
    """States 0 to n - 1, the first of which is where a text begins.

    Arguments:
        table: `(n + 1, b)`, the state after a byte of each class, n where there is none; the last
            row is that of n, which no byte leaves.
        accepting: `(n + 1,)`, whether a text may end there.
        class_of: `(256,)`, the class of each byte.
    """

    table: np.ndarray
    accepting: np.ndarray
    class_of: np.ndarray


def decoder(class_of: np.ndarray) -> np.ndarray:
    """Returns the automaton that reads the bytes of one character.

    Arguments:
        class_of: `(0x110000,)`, the class of each character, -1 of those that do not come.

    Returns:
        `(d, 256)`: what a byte leads to from each node, of which the first is before a character.
        -1 is nothing, from 0 on are classes of characters, and from -2 downwards are nodes: -2 is
        node 1.
    """
    class_of = class_of.copy()
    class_of[0xD800:0xE000] = -1  # UTF-8 has no surrogates
    nodes = [np.full(256, -1, np.int32)]
    known: dict[bytes, int] = {}

    def node_of(entries: np.ndarray) -> int:
        """Returns what leads to the node with these entries for the bytes 0x80 to 0xBF."""
        key = entries.tobytes()
        if key not in known:
            known[key] = -1 if (entries == -1).all() else -1 - len(nodes)
            if known[key] != -1:
                nodes.append(np.full(256, -1, np.int32))
                nodes[-1][0x80:0xC0] = entries
        return known[key]

    def group(entries: np.ndarray) -> np.ndarray:
        return np.array([node_of(row) for row in entries.reshape(-1, 64)], np.int32)

    ends = group(class_of)  # by all but the last six bits
    short, long = ends[:1024].copy(), ends[1024:]
    nodes[0][:128] = class_of[:128]
    nodes[0][0xC2:0xE0] = short[2:32]
    short[:32] = -1  # what two bytes write is not written with three
    nodes[0][0xE0:0xF0] = group(short)
    # In the same way the characters of three bytes are not written with four.
    three = np.concatenate([np.full(16, -1), group(long), np.full(48, -1)]).astype(np.int32)
    nodes[0][0xF0:0xF5] = group(three)
    return np.stack(nodes)


def unique_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different columns of a table, and which of them each column is."""
    columns = np.ascontiguousarray(table.T)
    known: dict[bytes, int] = {}
    which = np.array([known.setdefault(x.tobytes(), len(known)) for x in columns], np.int32)
    first = np.unique(which, return_index=True)[1]
    return np.ascontiguousarray(columns[first].T), which


def to_bytes(automaton: CharAutomaton) -> ByteAutomaton:
    """Returns the automaton that reads the same texts byte by byte.

    Raises:
        ValueError: if its table would be too large.
    """
    tree = decoder(automaton.class_of)
    leads, class_of = unique_columns(tree)
    states, nodes, kinds = len(automaton.table), len(tree), automaton.table.shape[1]
    if states * nodes > ENTRIES:
        raise too_large(f"it has {states:,} states")
    # A pair of a state and a node within a character is kept where the character may go on.
    allowed = (automaton.table >= 0).astype(np.float32)
    kept = np.zeros((states, nodes), np.bool_)
    kept[:, 0] = True
    for i in range(1, nodes):  # later nodes lead to earlier ones
        entries = tree[i][tree[i] != -1]
        reached = np.zeros(kinds, np.float32)
        reached[entries[entries >= 0]] = 1
        kept[:, i] = (allowed @ reached > 0) | kept[:, -1 - entries[entries < -1]].any(1)
    count = int(kept.sum())
    if count * leads.shape[1] > ENTRIES:
        raise too_large(f"it has {count:,} states")
    state, node = kept.nonzero()
    number = np.full((states + 1, nodes), count, np.int32)  # the last row is that of -1
    number[state, node] = np.arange(count)
    table = np.full((count + 1, leads.shape[1]), count, np.int32)
    accepting = np.zeros(count + 1, np.bool_)
    accepting[:count] = automaton.accepting[state] & (node == 0)
    after = np.concatenate([automaton.table, np.full((states, 1), -1, np.int32)], axis=1)
    for byte in range(leads.shape[1]):
        lead = leads[node, byte]
        within = number[state, np.where(lead < -1, -1 - lead, 0)]
        beyond = number[after[state, np.maximum(lead, -1)], 0]
        table[:count, byte] = np.where(lead < -1, within, beyond)
    return ByteAutomaton(table, accepting, class_of)
