"""Threads for work that would hold up the event loop, of which only so much may wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxformers.serving.errors import Refused


class Workers:
    """A few threads, and a bounded number of calls that wait for them.

    Arguments:
        name: of the threads.
        threads: how many.
        waiting: the most calls that run or wait.
    """

    def __init__(self, name: str, threads: int, waiting: int):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most, self._count = waiting, 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what a function returns in one of the threads.

        Raises:
            Refused: if too many calls wait.
        """
        if self._count >= self._most:
            raise busy("too many requests are being read")
        self._count += 1
        loop = asyncio.get_running_loop()
        future: Future[Any] = self._threads.submit(function, *arguments)

        def count_down(_: Any) -> None:
            self._count -= 1

        def ended(_: Any) -> None:  # in the thread, also where nobody waits for the result
            try:
                loop.call_soon_threadsafe(count_down, None)
            except RuntimeError:  # the loop has ended
                pass

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def busy(why: str) -> Refused:
    """Returns the error that a client should come again."""
    return Refused(
        f"{why}. Try again in a moment.",
        429,
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )
