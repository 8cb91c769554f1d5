"""The times that `--verbose` shows."""

import os
import time


class Speed:
    """The times of an answer: when its first text came, and how fast tokens followed.

    Arguments:
        begin: when the time to the first text begins, by `time.perf_counter`. None is the start of
            the process.
    """

    def __init__(self, begin: float | None = None):
        self.since = "the start of the process" if begin is None else "the message"
        self.begin = time.perf_counter() - process_age() if begin is None else begin
        self.times: list[tuple[float, int]] = []

    def piece(self, tokens: int) -> None:
        """Remembers when a piece of text came, after so many tokens in all."""
        self.times.append((time.perf_counter(), tokens))

    def said(self, tokens: int) -> str:
        """Returns the times in words.

        The second token waits for the program that makes all later ones, so the rate is that of
        the tokens after the second piece.
        """
        count = f"{tokens} token" + "s" * (tokens != 1)
        said = f"{count} {time.perf_counter() - self.begin:.2f} s after {self.since}"
        if self.times:
            said = f"first text {self.times[0][0] - self.begin:.2f} s after {self.since}, {count}"
        if len(self.times) > 2:
            (begin, before), (last, after) = self.times[1], self.times[-1]
            said += f", {(after - before) / max(last - begin, 1e-9):.1f} tokens per second"
        return said


def process_age() -> float:
    """Returns the seconds since the start of the process."""
    try:
        with open("/proc/self/stat") as file:  # on Linux
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        # A process that has waited for nothing has computed all the time.
        return IMPORTED_AGE + time.perf_counter() - IMPORTED


IMPORTED, IMPORTED_AGE = time.perf_counter(), time.process_time()
