"""What ranks print: all of it to a log file per rank, and to the foreground what helps."""

import os
import re
from pathlib import Path
from typing import BinaryIO

from ..notes import open_own
from .foreground import Foreground

# What JAX's transport and logging say in every process, which helps nobody.
NOISE = (
    b"[Gloo] Rank ",
    b"WARNING: All log messages before absl::InitializeLog()",
)
# Gloo prints its line piece by piece, and two threads that do so at once mix their pieces.
_GLOO = (
    b"[Gloo] Rank ",
    b" is connected to ",
    b" peer ranks. ",
    b"Expected number of connected peer ranks is : ",
)
_GLOO_PIECES = rb"(?:%s|\d)+" % b"|".join(map(re.escape, _GLOO))
_GLOO_START = re.compile(_GLOO_PIECES)
_GLOO_LINE = re.compile(rb"(?=.*[a-z])%s\s*" % _GLOO_PIECES)  # not a number alone
# Lines of the runtime's log that only repeat that a peer is gone, or that all is well.
_LOG_NOISE = re.compile(
    rb"^[IW]\d{4} \d\d:\d\d:\d\d\.\d+ .*(coordination|distributed|gloo|cpu_|service_lib|cuda)"
)
_LOG_START = re.compile(rb"^[IW](\d{0,4}$|\d{4} )")
TAIL_LINES = 15


class LineFilter:
    """Passes text on as it comes, except for lines that are noise.

    Only the beginning of a line that may become noise is held back, so that text which is written
    token by token appears token by token.
    """

    def __init__(self) -> None:
        self._held = b""
        self._inside = False  # of a line whose beginning has been passed on

    def feed(self, data: bytes) -> bytes:
        """Takes more text, gives what is to be shown now."""
        shown = []
        for line in (self._held + data).splitlines(keepends=True):
            self._held = b""
            whole = line.endswith((b"\n", b"\r"))
            if not self._inside and not whole and _may_be_noise(line):
                self._held = line
            elif self._inside or not is_noise(line):
                shown.append(line)
                self._inside = not whole
        return b"".join(shown)

    def flush(self) -> bytes:
        """What is still held back, at the end."""
        held, self._held = self._held, b""
        return b"" if is_noise(held) else held


def is_noise(line: bytes) -> bool:
    """Whether a line is left out of the foreground. It is in the log file all the same."""
    matched = _LOG_NOISE.match(line) or _GLOO_LINE.fullmatch(line)
    return matched is not None or line.startswith(NOISE)


def _may_be_noise(start: bytes) -> bool:
    if any(noise.startswith(start) or start.startswith(noise) for noise in NOISE):
        return True
    rest = start[match.end() :] if (match := _GLOO_START.match(start)) else start
    return any(piece.startswith(rest) for piece in _GLOO) or _LOG_START.match(start) is not None


class Stream:
    """One of a rank's two output streams: to its log file, and to the foreground if shown.

    Without a prefix text is passed on as it comes; with one, line by line.
    """

    def __init__(self, source: BinaryIO, log: BinaryIO, target: Foreground | None, prefix: str):
        self.source, self._log, self._target = source, log, target
        self._prefix = prefix.encode()
        self._filter, self._line = LineFilter(), b""

    def pump(self) -> bool:
        """Passes on what there is; False at the end of the stream."""
        data = os.read(self.source.fileno(), 65536)
        if data:
            self._log.write(data)
            self._show(self._filter.feed(data))
        else:
            self._show(self._filter.flush())
            if self._line:
                self._show(b"\n")
        return bool(data)

    def _show(self, data: bytes) -> None:
        if not data or self._target is None:
            return
        if self._prefix:
            *lines, self._line = (self._line + data).split(b"\n")
            data = b"".join(self._prefix + line + b"\n" for line in lines)
        self._target.write(data)


def open_log(path: Path) -> BinaryIO:
    """Makes a log file that only its owner can read."""
    return open(open_own(path), "wb", buffering=0)


def tail(path: Path, num_lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log file that are no noise."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
        lines = [line for line in file.read().splitlines() if not is_noise(line)]
    return [line.decode(errors="replace") for line in lines[-num_lines:]]
