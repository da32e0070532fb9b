"""The supervisor's own standard streams, which must never keep it from deciding.

Each is written by a thread: a reader that is slow or stuck stops that thread alone. What it does
not take waits in a backlog of limited size; what is beyond that is counted and left out, as is what
comes after the reader has gone. The log files of the ranks have all of it.
"""

import os
import select
import threading
import time
from collections.abc import Sequence
from typing import TextIO

BACKLOG_BYTES = 1 << 20
_WRITE_BYTES = 1 << 16


class Foreground:
    """One standard stream.

    Args:
      stream: the stream; None, or one without a file descriptor, is a reader that has gone.
      backlog_bytes: how much may wait for the reader.
    """

    def __init__(self, stream: TextIO | None, backlog_bytes: int = BACKLOG_BYTES) -> None:
        self._most, self._backlog = backlog_bytes, bytearray()
        self._left_out = 0  # bytes, since something was last taken in
        self._all_left_out = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._descriptor: int | None = None
        try:
            if stream is not None:
                self._descriptor = stream.fileno()
        except (OSError, ValueError):
            pass

    @property
    def waits(self) -> bool:
        """Whether something has not been taken by the reader yet."""
        return bool(self._backlog)

    @property
    def num_unread(self) -> int:
        """Bytes that were left out, or are still waiting."""
        return self._all_left_out + len(self._backlog)

    def write(self, data: bytes) -> None:
        """Shows something, at once or never."""
        with self._changed:
            if self._descriptor is not None and len(self._backlog) + len(data) <= self._most:
                self._take_in(data)
            elif self._descriptor is not None:
                self._left_out += len(data)
                self._all_left_out += len(data)

    def say(self, text: str) -> None:
        """The supervisor speaks: few words, for which there is always room."""
        with self._changed:
            if self._descriptor is not None:
                self._take_in(f"{text}\n".encode())

    def _take_in(self, data: bytes) -> None:
        if self._left_out:
            gap = f"\n== {self._left_out} bytes were not read in time: see the log files\n"
            self._backlog += gap.encode()
            self._left_out = 0
        self._backlog += data
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="foreground", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        descriptor = self._descriptor
        assert descriptor is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog)
                data = bytes(self._backlog[:_WRITE_BYTES])
            try:
                # not `sys.stdout`, whose lock a thread that is stuck would still hold at exit
                written = os.write(descriptor, data)
            except BlockingIOError:  # another program made it non-blocking
                select.select([], [descriptor], [])
                continue
            except OSError:  # nobody reads any more
                with self._changed:
                    self._descriptor = None
                    self._backlog.clear()
                return
            with self._changed:
                del self._backlog[:written]


def settle(streams: Sequence[Foreground], seconds: float, received: Sequence[int]) -> None:
    """Waits until readers have taken everything; at most so long, or until a second signal."""
    end = time.monotonic() + seconds
    while any(stream.waits for stream in streams) and time.monotonic() < end and len(received) < 2:
        time.sleep(0.01)
