"""Threads for work that would hold up the event loop, of which only so much may wait."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxformers.serving.errors import busy


class Workers:
    """A few threads, and a bounded number of calls that wait for them.

    Arguments:
        name: of what they make.
        threads: how many.
        waiting: the most calls that run or wait.
    """

    def __init__(self, name: str, threads: int, waiting: int):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._name, self._most, self._count = name, waiting, 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what a function returns in one of the threads.

        Raises:
            Refused: if too many calls wait.
        """
        if self._count >= self._most:
            raise busy(f"too many requests wait for {self._name}")
        self._count += 1
        loop = asyncio.get_running_loop()
        future: Future[Any] = self._threads.submit(function, *arguments)

        def count_down() -> None:
            self._count -= 1

        def ended(_: Any) -> None:  # in the thread, also where nobody waits for the result
            with contextlib.suppress(RuntimeError):  # where the loop has ended
                loop.call_soon_threadsafe(count_down)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
