"""Shows answers as they come: panels on a terminal, plain lines everywhere else.

Answers go to standard output; progress and what the program is doing go to standard error.
"""

import sys
import textwrap
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

LINE_WIDTH = 88
PROGRESS_EVERY_S = 5.0
LINES_OF_A_PANEL = 6


class PlainOutput:
    """Text as it comes, for pipes, files, and a single prompt.

    A single answer is written as it is. Several are written line by line, each line beginning
    with the number of its prompt, so that `grep '^\\[2\\]'` has one answer.
    """

    def __init__(self, titles: list[str], progress: Callable[[], str]):
        self._titles, self._progress = titles, progress
        self._lines = [""] * len(titles)
        self._shown = time.monotonic()

    def __enter__(self) -> "PlainOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        for index in range(len(self._titles)):
            self._flush(index)

    def status(self, text: str) -> None:
        """Says what is being done."""
        print(text, file=sys.stderr, flush=True)

    def started(self, index: int) -> None:
        """A prompt has joined."""
        if len(self._titles) > 1:
            print(f"[{index + 1}] > {_one_line(self._titles[index])}", flush=True)

    def write(self, index: int, text: str) -> None:
        """More of an answer."""
        if len(self._titles) == 1:
            sys.stdout.write(text)
            sys.stdout.flush()
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
            print(f"[{index + 1}] {note}", file=sys.stderr, flush=True)

    def tick(self) -> None:
        """Shows progress, if it is time."""
        if time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            if len(self._titles) > 1 or not self._lines[0]:  # nothing in the midst of a text
                print(self._progress(), file=sys.stderr, flush=True)

    def _flush(self, index: int) -> None:
        if self._lines[index] and len(self._titles) == 1:
            print("" if self._lines[index] == "\n" else "\n", end="", flush=True)
        elif self._lines[index]:
            self._print(index, self._lines[index])
        self._lines[index] = ""

    def _print(self, index: int, line: str) -> None:
        print(f"[{index + 1}] {line}", flush=True)


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
        self._texts[index] += text

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


class NoOutput:
    """Nothing: another process speaks for this one."""

    def __enter__(self) -> "NoOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def status(self, text: str) -> None:
        """Nothing."""

    def started(self, index: int) -> None:
        """Nothing."""

    def write(self, index: int, text: str) -> None:
        """Nothing."""

    def ended(self, index: int, note: str) -> None:
        """Nothing."""

    def tick(self) -> None:
        """Nothing."""


def open_output(
    titles: list[str], progress: Callable[[], str], *, quiet: bool = False
) -> PlainOutput | LiveOutput | NoOutput:
    """The output that suits standard output and the number of prompts."""
    if quiet:
        return NoOutput()
    several = len(titles) > 1
    kind = LiveOutput if several and sys.stdout.isatty() else PlainOutput
    return kind(titles, progress)


def _one_line(text: str, width: int = 70) -> str:
    return textwrap.shorten(text, width, placeholder=" ...") or "(empty)"
