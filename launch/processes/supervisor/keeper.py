"""Ends the ranks if their supervisor is killed: a process that waits for the end of a pipe.

Started by `Keeper` as a script of its own, in a session of its own. Its standard input has a line
`+PID` for each process group that starts, and `-PID` for each that has ended; when it closes, the
supervisor is gone and what is left is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys


class Keeper:
    """The supervisor's end of the pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def started(self, group: int) -> None:
        """A process group has started."""
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        """A process group has been ended; its number may be taken by others from now on."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Ends the keeper, and any group that is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # someone killed it; the ranks do without
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def kill_group(group: int) -> None:
    """Kills a process group, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    """Waits, then kills what is left."""
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        kill_group(group)


if __name__ == "__main__":
    main()
