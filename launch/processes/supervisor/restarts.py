"""When to start a job again: at once at first, then later and later, and not for ever."""

import time
from collections.abc import Sequence

RAPID_SECONDS = 30.0  # an attempt that fails within this time may be one of many
MOST_RAPID = 8  # of these in a row, and there is something to mend first
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


class Restarts:
    """How long to wait before each restart."""

    def __init__(self) -> None:
        self._num_rapid = 0

    def pause(self, lasted: float) -> float | None:
        """Seconds to wait after an attempt that lasted so long; None to give up."""
        self._num_rapid = self._num_rapid + 1 if lasted < RAPID_SECONDS else 0
        if self._num_rapid == MOST_RAPID:
            return None
        doubled = _FIRST_PAUSE_SECONDS * 2 ** max(self._num_rapid - 1, 0)
        return min(doubled, _LONGEST_PAUSE_SECONDS)


def wait(seconds: float, received: Sequence[int]) -> None:
    """Waits, but not longer than until a signal."""
    end = time.monotonic() + seconds
    while not received and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
