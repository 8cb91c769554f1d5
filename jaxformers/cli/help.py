"""The form of the help of a command."""

import argparse


class Help(argparse.HelpFormatter):
    """Help in which examples keep their lines, and all other text fits the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)
