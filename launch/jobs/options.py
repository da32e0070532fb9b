"""Options that several jobs have: the same spelling, meaning and help in each of them."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..processes.signals import Stopped, stop_on_signals

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        envvar="SHARDPAGE_MESH",
        help="Devices along data (sequences), kv (KV heads) and context (the pages of a "
        "sequence), e.g. data=2,context=4; one size may be -1 for what is left.",
    ),
]
Simulate = Annotated[
    int | None,
    typer.Option("--simulate", metavar="N", min=1, help="Simulate N devices on the CPU."),
]
# For a `str | None`, or a `list[str] | None` where the option may be repeated.
TOPOLOGY = typer.Option(
    "--topology",
    metavar="SLICE",
    help="Compile for this TPU slice, without having one: v5p:8x8x8, v5e:4x4, v5p-128.",
)
KVDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all results here, for programs."),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures here (PNG).")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


def progress(quiet: bool) -> Callable[[str], None]:
    """Says on standard error what is being done, or does not."""
    return lambda text: None if quiet else print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the body, and the job with the exit code that they stand for."""
    try:
        with stop_on_signals():
            yield
    except Stopped as stopped:
        print(f"stopped by {stopped.signal_name}", file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None
