"""Constraints on generated text, as automata that run inside the compiled program.

An expression (`expressions`) of a pattern or a schema becomes an automaton over characters
(`automaton`), over bytes (`utf8`) and over the tokens of a vocabulary (`tables`).
"""

from jaxformers.constraints.constraint import Choices, Constraint, Regex
from jaxformers.constraints.json_schema import JSONSchema
from jaxformers.constraints.lark import LarkGrammar

__all__ = ["Choices", "Constraint", "JSONSchema", "LarkGrammar", "Regex"]
