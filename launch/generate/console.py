"""Shows answers as they come: panels on a terminal, plain lines everywhere else.

Answers go to standard output; progress and what the program is doing go to standard error.
"""

import io
import sys
import textwrap
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

LINE_WIDTH = 88
PROGRESS_EVERY_S = 5.0
LINES_OF_A_PANEL = 6

# A terminal obeys the first two ranges and turns the others around; new lines and tabs are text.
_CONTROLS = (range(0x20), range(0x7F, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A))
_VISIBLE = {code: ascii(chr(code))[1:-1] for codes in _CONTROLS for code in codes}
del _VISIBLE[ord("\n")], _VISIBLE[ord("\t")]


def visible(text: str) -> str:
    """The text with its control characters as escapes, as Python writes them."""
    return text.translate(_VISIBLE)


class PlainOutput:
    """Text as it comes, for pipes, files, and a single prompt.

    A single answer is written as it is. Several are written line by line, each line beginning
    with the number of its prompt, so that `grep '^\\[2\\]'` has one answer.
    """

    def __init__(
        self,
        titles: list[str],
        progress: Callable[[], str],
        out: TextIO | None = None,  # for answers
        err: TextIO | None = None,  # for what went wrong
        said: TextIO | None = None,  # for what is being done; err unless given
    ):
        self._titles, self._progress = titles, progress
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._said = said or self._err
        self._lines = [""] * len(titles)
        self._shown = time.monotonic()

    def __enter__(self) -> "PlainOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        for index in range(len(self._titles)):
            self._flush(index)

    def status(self, text: str) -> None:
        """Says what is being done."""
        print(text, file=self._said, flush=True)

    def started(self, index: int) -> None:
        """A prompt has joined."""
        if len(self._titles) > 1:
            self._print(index, f"> {_one_line(self._titles[index])}")

    def write(self, index: int, text: str) -> None:
        """More of an answer."""
        text = visible(text)
        if len(self._titles) == 1:
            self._out.write(text)
            self._out.flush()
            self._lines[index] = (self._lines[index] + text)[-1:]
            return
        self._lines[index] += text
        *full, self._lines[index] = self._lines[index].split("\n")
        for line in full:
            self._print(index, line)
        while len(self._lines[index]) > LINE_WIDTH:
            first = textwrap.wrap(self._lines[index], LINE_WIDTH, drop_whitespace=False)[0]
            self._print(index, first.rstrip())
            self._lines[index] = self._lines[index][len(first) :].lstrip(" ")

    def ended(self, index: int, note: str) -> None:
        """A prompt has left; `note` says what went wrong, if something did."""
        self._flush(index)
        if note:
            print(f"[{index + 1}] {note}", file=self._err, flush=True)

    def tick(self) -> None:
        """Shows progress, if it is time."""
        if time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            if len(self._titles) > 1 or not self._lines[0]:  # nothing in the midst of a text
                self.status(self._progress())

    def _flush(self, index: int) -> None:
        if self._lines[index] and len(self._titles) == 1:
            self._out.write("" if self._lines[index] == "\n" else "\n")
            self._out.flush()
        elif self._lines[index]:
            self._print(index, self._lines[index])
        self._lines[index] = ""

    def _print(self, index: int, line: str) -> None:
        print(f"[{index + 1}] {line}", file=self._out, flush=True)


class LiveOutput:
    """A panel for each prompt that is running; those that have ended stay above."""

    def __init__(self, titles: list[str], progress: Callable[[], str]):
        self._titles, self._progress = titles, progress
        self._texts: dict[int, str] = {}
        self._status = ""
        self._console = Console()
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=10,
            vertical_overflow="ellipsis",
            transient=True,
        )

    def __enter__(self) -> "LiveOutput":
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        for index in list(self._texts):
            self.ended(index, "")
        self._live.__exit__(None, None, None)

    def status(self, text: str) -> None:
        """Says what is being done."""
        self._status = text
        self._live.refresh()

    def started(self, index: int) -> None:
        """A prompt has joined."""
        self._texts[index] = ""

    def write(self, index: int, text: str) -> None:
        """More of an answer."""
        self._status = ""
        self._texts[index] += visible(text)

    def ended(self, index: int, note: str) -> None:
        """A prompt has left; `note` says what went wrong, if something did."""
        text = self._texts.pop(index, "")
        panel = self._panel(index, text + note, style="red" if note else "green")
        self._console.print(panel)

    def tick(self) -> None:
        """Nothing to do: a thread refreshes the panels."""

    def _render(self) -> Group:
        panels = [
            self._panel(index, "\n".join(self._tail(text)), style="cyan")
            for index, text in self._texts.copy().items()
        ]
        return Group(*panels, Text(self._status or self._progress(), style="dim"))

    def _tail(self, text: str) -> list[str]:
        width = max(self._console.width - 4, 20)
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
        return lines[-LINES_OF_A_PANEL:]

    def _panel(self, index: int, text: str, style: str) -> Panel:
        title = Text(f"{index + 1}  {_one_line(self._titles[index])}")
        return Panel(Text(text), title=title, title_align="left", border_style=style)


class _Nowhere(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)


def open_output(
    titles: list[str], progress: Callable[[], str], *, speaks: bool = True, quiet: bool = False
) -> PlainOutput | LiveOutput:
    """The output that suits standard output and the number of prompts.

    Args:
      titles: the prompts.
      progress: says how far the run is.
      speaks: False where another process speaks for this one.
      quiet: answers and errors only.
    """
    if not speaks:
        return PlainOutput(titles, progress, out=_Nowhere(), err=_Nowhere())
    if len(titles) > 1 and sys.stdout.isatty() and not quiet:
        return LiveOutput(titles, progress)
    return PlainOutput(titles, progress, said=_Nowhere() if quiet else None)


def _one_line(text: str, width: int = 70) -> str:
    return textwrap.shorten(visible(text), width, placeholder=" ...") or "(empty)"
