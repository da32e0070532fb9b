"""JSON files: written whole or not at all, and read whatever they hold."""

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import typer

from .processes import guard

# What may be better at the next try: no room, or a device that failed.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def write_json(path: Path, content: Any, *, last: bool = True) -> None:
    """Replaces a file at once: a reader, or a crash, finds the old content or all of the new.

    A link stays, and the file that it names is replaced. What is no file (a device, a pipe) stays,
    too, and gets the text, but only once: when it is the `last` of this run. Two runs at a time
    must not have the same file.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if is_stream(path):
        if last:
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
        return
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.part")  # by this name the next run finds it
    part.unlink(missing_ok=True)
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_stream(path: Path) -> bool:
    """Whether something is there that must not be replaced. A folder refuses that by itself."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_json(path: Path) -> Any:
    """The content of a file.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonOption:
    """The --json file of a run, which outlives a full disk: it goes on without the file."""

    def __init__(self, path: Path | None):
        self.path = path
        self._was_written = self._is_lost = False

    def write(self, content: Any, *, last: bool = False) -> None:
        """Replaces the file, if one is wanted, by what is known now.

        Raises:
          typer.BadParameter: if it cannot be written at all, whatever the disk.
        """
        if self.path is None:
            return
        try:
            write_json(self.path, content, last=last)
            self._was_written, self._is_lost = True, False
        except OSError as error:
            why = f"{self.path}: {error.strerror}"
            if not (self._was_written or self._is_lost or error.errno in _PASSING):
                raise typer.BadParameter(why, param_hint="--json") from None
            if not self._is_lost:
                print(f"error: --json {why}; going on without it", file=sys.stderr, flush=True)
            self._is_lost = True

    def close(self) -> None:
        """Ends a run whose file does not have all of it, so that it is started again."""
        if self._is_lost:
            raise typer.Exit(guard.HUNG)
