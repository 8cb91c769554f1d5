"""Expressions as deterministic automata over characters.

Thompson 1968 makes a nondeterministic automaton of an expression, and the subset construction
(Rabin and Scott 1959) a deterministic one. Its size may be exponential in that of the expression,
so both have bounds. outlines-core 0.2.14 has none: it takes seconds for `a[a-z]{20}` over single
bytes, twice as long for each letter more, and allows no "abc" for `a|abc`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxformers.constraints.expressions import (
    LAST,
    Alternatives,
    Chars,
    Expression,
    Ranges,
    Sequence,
)

# An expression may have so many nodes once its repetitions are written out, its automaton so many
# states, and finding these so many steps: a few seconds.
NODES, STATES, STEPS = 200_000, 50_000, 10_000_000


class CharAutomaton(NamedTuple):
    """States 0 to n - 1, the first of which is where a text begins.

    Arguments:
        table: `(n, c)`, the state after a character of each class, -1 where there is none.
        accepting: `(n,)`, whether a text may end there.
        class_of: `(0x110000,)`, the class of each character, -1 where no state allows it.
    """

    table: np.ndarray
    accepting: np.ndarray
    class_of: np.ndarray


def too_large(what: str) -> ValueError:
    """Returns the error for a constraint whose automaton would be too large."""
    return ValueError(
        f"the constraint is too large: {what}. Make bounds such as {{0,1000}} or maxLength "
        "smaller or leave them out, and write [0-9] or [a-z] where \\d or \\w need not be all "
        "of Unicode."
    )


class Nodes:
    """A nondeterministic automaton: a node reads a character, or goes on to others."""

    def __init__(self) -> None:
        self.ranges: list[Ranges | None] = [None]  # None reads nothing
        self.next: list[tuple[int, ...]] = [()]  # node 0 is the end of the text
        self.known: dict[tuple[int, int], int] = {}

    def add(self, ranges: Ranges | None, following: tuple[int, ...]) -> int:
        if len(self.next) >= NODES:
            raise too_large(f"it has more than {NODES:,} characters with its repetitions")
        self.ranges.append(ranges)
        self.next.append(following)
        return len(self.next) - 1

    def build(self, expression: Expression, following: int) -> int:
        """Adds the nodes of an expression, and returns the first of them.

        Where the same expression has the same continuation, its nodes are made once.
        """
        key = id(expression), following
        if key not in self.known:
            self.known[key] = self._build(expression, following)
        return self.known[key]

    def _build(self, expression: Expression, following: int) -> int:
        if isinstance(expression, Chars):
            return self.add(expression.ranges, (following,))
        if isinstance(expression, Sequence):
            for part in reversed(expression.parts):
                following = self.build(part, following)
            return following
        if isinstance(expression, Alternatives):
            return self.add(None, tuple(self.build(x, following) for x in expression.options))
        body, least, most = expression
        if most is None:
            loop = self.add(None, ())
            self.next[loop] = self.build(body, loop), following
            following = loop
        else:
            end = following
            for _ in range(most - least):
                following = self.add(None, (self.build(body, following), end))
        for _ in range(least):
            before, following = following, self.build(body, following)
            if following == before:  # many times nothing is nothing
                break
        return following

    def closure(self, starts: Iterable[int]) -> tuple[int, ...]:
        """Returns the nodes that read a character next, or 0, after any of some nodes."""
        found, waiting = set(), list(starts)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                if self.ranges[node] is None:
                    waiting.extend(self.next[node])
        return tuple(sorted(x for x in found if x == 0 or self.ranges[x] is not None))


def partition(sets: list[Ranges]) -> tuple[np.ndarray, list[list[int]]]:
    """Returns the classes of characters that some sets tell apart, and the classes of each set.

    Characters that are in no set have the class -1.
    """
    borders = sorted(
        {border for ranges in sets for low, high in ranges for border in (low, high + 1)}
    )
    index = {border: i for i, border in enumerate(borders)}
    members: list[list[int]] = [[] for _ in range(len(borders) + 1)]
    for number, ranges in enumerate(sets):
        for low, high in ranges:
            for interval in range(index[low], index[high + 1]):
                members[interval].append(number)
    class_of = np.full(LAST + 1, -1, np.int32)
    known: dict[tuple[int, ...], int] = {}
    classes: list[list[int]] = [[] for _ in sets]
    for interval, among in enumerate(members[:-1]):
        if not among:
            continue
        key = tuple(among)
        if key not in known:
            known[key] = len(known)
            for number in among:
                classes[number].append(known[key])
        class_of[borders[interval] : borders[interval + 1]] = known[key]
    return class_of, classes


def determine(expression: Expression) -> CharAutomaton:
    """Returns the deterministic automaton of an expression.

    Raises:
        ValueError: if it would be too large.
    """
    nodes = Nodes()
    first = nodes.build(expression, 0)
    sets = list(dict.fromkeys(x for x in nodes.ranges if x is not None))
    class_of, classes_of_set = partition(sets)
    number_of = {ranges: i for i, ranges in enumerate(sets)}
    classes = [() if x is None else classes_of_set[number_of[x]] for x in nodes.ranges]

    start = nodes.closure([first])
    states, rows, steps = {start: 0}, [], 0
    waiting = [start]
    known: dict[frozenset[int], tuple[int, ...]] = {}
    for state in waiting:  # which grows
        targets: dict[int, set[int]] = {}
        for node in state:
            for class_ in classes[node]:
                targets.setdefault(class_, set()).update(nodes.next[node])
            steps += 1 + len(classes[node])
        row = {}
        for class_, after in targets.items():
            key = frozenset(after)
            if key not in known:
                known[key] = nodes.closure(key)
                steps += len(known[key])
            target = known[key]
            if target not in states:
                states[target] = len(states)
                waiting.append(target)
            row[class_] = states[target]
        rows.append(row)
        if len(states) > STATES or steps > STEPS:
            raise too_large(f"its automaton has more than {len(states):,} states")
    table = np.full((len(rows), int(class_of.max(initial=-1)) + 1), -1, np.int32)
    for i, row in enumerate(rows):
        table[i, list(row.keys())] = list(row.values())
    return CharAutomaton(table, np.array([0 in x for x in states]), class_of)
