"""`shardpage schedule`: where the cycles of a TPU kernel go. Asked of the compiler, without a TPU."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ..json_file import JsonOption
from ..schedule import worker
from ..schedule.cases import ALL, CASES, KERNELS
from ..schedule.execute import Executed
from . import options

DEFAULT_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def schedule(
    topology: Annotated[list[str] | None, options.TOPOLOGY] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(repr(c.name) for c in CASES)}, or a shape of `bench`; the "
            "default is all of the former."
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(KERNELS)}; the default is decode.")
    ] = None,
    cores: Annotated[
        str, typer.Option(help="TensorCores of a v4 or v5p chip: off (one), auto, batch, kv_head.")
    ] = "off",
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="Execute the Pallas kernels of the program that FUNCTION() returns instead: a "
            "function and its arguments, integers as arrays.",
        ),
    ] = None,
    phases: Annotated[bool, typer.Option("--phases", help="Show where the cycles go.")] = False,
    json_file: options.Json = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
) -> None:
    """Compile TPU kernels without a TPU, and execute what the compiler made of them.

    A modelled core runs the compiled program of a whole call, bundle by bundle: real branches, trip
    counts and copies, waits for results counted. What memory does is a model, of several latencies.
    --topology, --case and --kernel may be repeated. See launch/schedule/README.md.
    """
    from ..schedule import report

    for what, chosen, known in (("case", case, [*ALL]), ("kernel", kernel, [*KERNELS])):
        if unknown := [name for name in chosen or () if name not in known]:
            print(f"error: --{what} {unknown[0]!r} is none of {known}", file=sys.stderr)
            raise typer.Exit(2)
    say = options.progress(quiet)
    rows: list[Executed] = []
    file = JsonOption(json_file)
    try:
        for name in topology or DEFAULT_TOPOLOGIES:
            say(f"executing for {name} ...")
            if subject is not None:
                rows += worker.call(worker.execute_file, name, subject)
                continue
            cases = case or [shape.name for shape in CASES]
            rows += _executed(name, cases, kernel or ["decode"], cores)
            file.write(_content(rows))
        if plot is not None and rows:
            report.draw(rows, plot)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(report.table(rows))
    if phases:
        print(*map(report.phases, rows), sep="\n")
    file.write(_content(rows), last=True)
    file.close()


def _executed(
    topology: str, cases: list[str], kernels: list[str], cores: str
) -> Iterator[Executed]:
    """All cases with all kernels; a peer's kernel that refuses a case is left out, and said so."""
    for case in cases:
        for kernel in kernels:
            try:
                yield from worker.call(worker.execute_case, topology, kernel, case, cores)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                if not kernel.startswith("jax "):
                    raise
                reason = str(error).partition("\n")[0]
                print(f"{topology} {case}: {kernel} does not do it: {reason}", file=sys.stderr)


def _content(rows: list[Executed]) -> dict[str, list[dict[str, object]]]:
    return {"calls": [dataclasses.asdict(row) | {"ratio": round(row.ratio, 4)} for row in rows]}
