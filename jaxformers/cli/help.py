"""The form of the help and of the errors of a command."""

import argparse
from typing import Any, NoReturn

CONTINUED = " \\"


class Help(argparse.HelpFormatter):
    """Help in which each example begins a line, and all text fits the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if not text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        first, *lines = text.splitlines()
        return "\n".join([first, *(part for line in lines for part in fold(line, width))])


class Parser(argparse.ArgumentParser):
    """A parser with `Help`, whose errors are one line."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}. See {self.prog} --help.\n")


def fold(line: str, width: int) -> list[str]:
    r"""Returns a command in lines of at most `width` characters, which a shell reads as one.

    It is folded before options and after pipes, and at other spaces outside of quotes where that
    is not enough.

    Example:
        >>> fold("  copy one two --to three", 20)
        ['  copy one two \\', '      --to three']
    """
    if len(line) <= width:
        return [line]
    places = [
        i for i, x in enumerate(line) if x == " " and line[:i].strip() and not quoted(line[:i])
    ]
    fitting = [i for i in places if i + len(CONTINUED) <= width]
    if not fitting:
        return [line]
    good = [i for i in fitting if line[i + 1 :].startswith("--") or line[i - 1] == "|"]
    at = max(good or fitting)
    rest = "      " + line[at:].strip()
    if len(rest) >= len(line):
        return [line]
    return [line[:at] + CONTINUED, *fold(rest, width)]


def quoted(text: str) -> bool:
    """Returns whether a text ends within quotes of a shell."""
    return text.count('"') % 2 == 1
