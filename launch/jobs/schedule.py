"""`shardpage schedule`: does the TPU kernel keep up with memory? Asked of the compiler."""

import pathlib
import sys
from typing import Annotated

import typer

from ..schedule.cases import CASES, KERNELS

DEFAULT_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def schedule(
    topology: Annotated[
        list[str] | None, typer.Option(help="TPU slice to compile for; may be repeated.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(repr(c.name) for c in CASES)}; may be repeated."),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(KERNELS)}; may be repeated.")
    ] = None,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
    png: Annotated[pathlib.Path | None, typer.Option(help="Draw the ratios here.")] = None,
) -> None:
    """Compile the attention kernels for TPUs, without one, and count the cycles they issue.

    Each case is compiled with libtpu for this library's kernel, with keys and values in one array
    and in two, and for JAX's own. The compiler writes its schedule out; the bundles of the loop
    over blocks, over the cycles that HBM needs for a block's bytes, say which waits for which.
    """
    from ..json_file import write_json
    from ..schedule import report
    from ..schedule.measure import measure, to_json

    for what, chosen, known in (
        ("case", case, [c.name for c in CASES]),
        ("kernel", kernel, list(KERNELS)),
    ):
        if unknown := [name for name in chosen or () if name not in known]:
            print(f"error: --{what} {unknown[0]!r} is none of {known}", file=sys.stderr)
            raise typer.Exit(2)
    rows = []
    try:
        for name in topology or DEFAULT_TOPOLOGIES:
            print(f"compiling for {name} ...", file=sys.stderr, flush=True)
            rows += measure(name, case or (), kernel or ())
        if png is not None and rows:
            report.draw(rows, png)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(report.table(rows))
    if json_file is not None:
        write_json(json_file, {"schedules": to_json(rows)})
