"""Reads the docstrings of the package for the pages of the API."""

import re

import griffe


class Examples(griffe.Extension):
    """Has a section "Example:" shown as code, as griffe does with "Examples:"."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
