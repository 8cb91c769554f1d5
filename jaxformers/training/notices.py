"""Warnings of a run that goes on."""

import logging
import warnings

LOGGER = logging.getLogger("jaxformers.training")


def warn_and_go_on(text: str, level: int) -> None:
    """Shows a warning, or logs the text if warnings are errors, since the run must not end here."""
    try:
        warnings.warn(text, stacklevel=level)
    except UserWarning:
        LOGGER.warning(text)
