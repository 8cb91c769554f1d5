"""Progress bars of work whose size is known, by tqdm where it is installed."""

import sys
from typing import Any

from jaxformers.warn import warn_once


def progress_bar(total: int, unit: str = "B", show: bool | None = None) -> Any:
    """Returns a progress bar on standard error, a context with `update(count)`.

    Arguments:
        total: the amount of work.
        unit: the unit of `total` and of updates, bytes by default.
        show: whether the bar is shown. None shows it on a terminal only, and not without tqdm. A
            process without standard error shows none.

    Warns:
        UserWarning: once, if the bar shall be shown and tqdm is missing.
    """
    if show is False or sys.stderr is None:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        if show:
            warn_once("There is no progress bar without tqdm: pip install 'jaxformers[train]'")
        return _NoBar()
    hide = None if show is None else False
    return tqdm(total=total, unit=unit, unit_scale=True, disable=hide, dynamic_ncols=True)


class _NoBar:
    """A bar that shows nothing."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, count: int) -> None:
        pass
