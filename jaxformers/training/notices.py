"""What a run says of itself while it goes on."""

import logging
import warnings

LOGGER = logging.getLogger("jaxformers.training")


def warn_and_go_on(text: str, level: int) -> None:
    """Warn; where warnings are errors, log it: a run must not end by saying that it goes on."""
    try:
        warnings.warn(text, stacklevel=level)
    except UserWarning:
        LOGGER.warning(text)
