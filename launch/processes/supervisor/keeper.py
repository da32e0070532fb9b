"""Ends the ranks if their supervisor is killed.

Two that do not depend on each other: the kernel kills each rank with its parent (`die_with`), and a
process that waits for the end of a pipe kills all that ranks have started.

That process is this file, started by `Keeper` as a script of its own, in a session of its own. Its
standard input has a line `+PID` for each process group that starts, and `-PID` for each that has
ended; when it closes, the supervisor is gone and what is left is killed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class Keeper:
    """The supervisor's end of the pipe.

    Args:
      mark: a variable and its value, NAME=VALUE, that only these ranks have in their environment.
    """

    def __init__(self, mark: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def started(self, group: int) -> None:
        """A process group has started."""
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        """A process group has been ended; its number may be taken by others from now on."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Ends the keeper, even one that is stopped. The ranks have been ended before."""
        self._process.kill()
        self._pipe.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # someone killed it; the kernel is left
            if self._pipe.write(line.encode()) is None:  # someone stopped it: what it knows is old
                self._process.kill()


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, where the kernel can (Linux).

    For a child to run before its program. The parent may have ended before the kernel was asked.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_group(group: int) -> None:
    """Kills a process group, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """Kills all processes with this in their environment: also daemons, which have left the group.

    Where there is no /proc it finds none.
    """
    end = time.monotonic() + 1.0
    while (found := _marked(os.fsencode(mark))) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # until they are gone; others may have started meanwhile


def _marked(mark: bytes) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if mark in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


def main(mark: str) -> None:
    """Waits, then kills what is left."""
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        kill_group(group)
    kill_marked(mark)


if __name__ == "__main__":
    main(sys.argv[1])
