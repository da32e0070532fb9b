"""`shardpage bench`: how fast, compared with what, and how near to what memory allows?"""

import enum
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..json_file import JsonOption, read_json
from . import options

if TYPE_CHECKING:
    from ..bench.report import Row


class Kind(enum.StrEnum):
    """What to measure."""

    decode = "decode"
    quantised = "quantised"
    write = "write"
    steps = "steps"
    sharded = "sharded"
    all = "all"


class Size(enum.StrEnum):
    """How many shapes."""

    quick = "quick"
    full = "full"


def bench(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="Decode steps, those of quantised caches beside bfloat16's, writes of new tokens, "
            "whole steps with prompts, splits over all devices, or all of it."
        ),
    ] = Kind.all,
    suite: Annotated[Size, typer.Option(help="A few shapes, or all.")] = Size.quick,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this shape of the suite (may be repeated)."),
    ] = None,
    simulate: options.Simulate = None,
    topology: Annotated[list[str] | None, options.TOPOLOGY] = None,
    json_file: options.Json = None,
    plot: options.Plot = None,
    compare: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="Say what changed since this earlier --json."),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure page attention beside what a user would pick instead, in one run.

    Every answer is compared with an exact oracle before it is timed. Implementations take turns;
    figures are medians, with the spread between the quartiles. GB/s are keys and values that had
    to be read (written, for writes); "of copy" is their share of what a plain copy reads and
    writes on the same device. --json is rewritten after each row; --plot draws a picture per kind.
    With --topology (may be repeated) the TPU compiler is asked, as `shardpage schedule` does.
    """
    if topology:
        from .schedule import schedule

        schedule(topology=topology, case=shape, json_file=json_file, plot=plot, quiet=quiet)
        return
    old = _read(compare) if compare is not None else None
    file = JsonOption(json_file)
    with options.stoppable():
        try:
            only = tuple(shape or ())
            _run(kind, suite, only, simulate, file, plot, old, options.progress(quiet))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    file.close()


def _run(
    kind: Kind,
    suite: Size,
    only: tuple[str, ...],
    simulate: int | None,
    file: JsonOption,
    plot: pathlib.Path | None,
    old: "list[Row] | None",
    say: Callable[[str], None],
) -> None:
    import jax

    import meshes

    from ..bench import compare, draw, report, timing

    if simulate is not None:
        meshes.simulate(simulate)
    platform = jax.devices()[0].platform
    measured = _measurements(kind, suite, platform, only)
    roof_gbps, roof = timing.copy_roof(platform)
    command = f"shardpage bench {kind.value} --suite {suite.value}"
    command += "".join(f' --shape "{name}"' for name in only)
    command += "" if simulate is None else f" --simulate {simulate}"
    about = report.environment(command, roof_gbps, roof)
    print(
        f"{about['num_devices']} x {about['device']}, a copy makes {roof_gbps:.0f} GB/s", flush=True
    )
    rows: list[report.Row] = []
    content = lambda: about | {"rows": [row.to_json() for row in rows]}
    try:
        for name, rows_of in measured:
            say(f"measuring {name} ...")
            for row in rows_of(roof_gbps):
                rows.append(row)
                file.write(content())
    finally:
        _print(report.table(rows))
        if rows:
            file.write(content(), last=True)
    if plot is not None:
        title = f"{about['num_devices']} x {about['device']}, jax {about['versions']['jax']}"
        for path in draw.draw(rows, title, plot):
            print(f"drawn: {path}")
    if old is not None:
        _print(compare.table(compare.changes(old, rows)))


def _measurements(
    kind: Kind, suite: Size, platform: str, only: tuple[str, ...]
) -> "list[tuple[str, Callable[[float], Iterator[Row]]]]":
    """What is to be measured: a name, and the rows of it, given the GB/s of a copy."""
    import jax

    from ..bench import decode, quantised, shapes, sharded, steps, write

    found: list[tuple[str, Callable[[float], Iterator[Row]]]] = []
    if kind in (Kind.decode, Kind.all):
        for shape in shapes.decode_shapes(platform, suite.value):
            found.append((shape.name, functools.partial(decode.rows, [shape], platform)))
    if kind in (Kind.quantised, Kind.all):
        for shape in shapes.quantised_shapes(platform, suite.value):
            found.append((shape.name, functools.partial(quantised.rows, [shape], platform)))
    if kind in (Kind.write, Kind.all):
        for tokens in shapes.write_shapes(suite.value):
            found.append((tokens.name, functools.partial(write.rows, [tokens])))
    if kind in (Kind.steps, Kind.all):
        for step in shapes.step_shapes(platform, suite.value):
            found.append((step.name, functools.partial(steps.rows, [step], platform)))
    if kind in (Kind.sharded, Kind.all):
        work = shapes.sharded_shapes(platform, suite.value, jax.device_count())
        rows = functools.partial(sharded.rows, work, suite.value, platform)
        found.append((f"splits over {jax.device_count()} devices", rows))
    names = [name for name, _ in found]
    if unknown := [name for name in only if name not in names]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is none of {', '.join(map(repr, names))}", param_hint="--shape"
        )
    return [(name, rows) for name, rows in found if name in only or not only]


def _read(path: pathlib.Path) -> "list[Row]":
    from ..bench.report import Row

    try:
        return [Row.from_json(row) for row in read_json(path)["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path}: {error!r}", param_hint="--compare") from error


def _print(cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*cells[0], box=None, pad_edge=False)
    for column in table.columns[2:-1]:
        column.justify = "right"
    for row in cells[1:]:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # in a pipe a table may be as wide as it is
        console = Console(width=200)
    console.print(table)
