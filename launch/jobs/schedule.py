"""`shardpage schedule`: does the TPU kernel keep up with memory? Asked of the compiler."""

import sys
from typing import Annotated

import typer

from ..json_file import JsonOption
from ..schedule.cases import CASES, KERNELS
from . import options

DEFAULT_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def schedule(
    topology: Annotated[list[str] | None, options.TOPOLOGY] = None,
    case: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(repr(c.name) for c in CASES)}.")
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(KERNELS)}.")] = None,
    json_file: options.Json = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
) -> None:
    """Compile the attention kernels for TPUs, without one, and count the cycles they issue.

    Each case is compiled with libtpu for this library's kernel, with keys and values in one array
    and in two, and for JAX's own. The compiler writes its schedule out; the bundles of the loop
    over blocks, over the cycles that HBM needs for a block's bytes, say which waits for which.
    --topology, --case and --kernel may be repeated; the default is all of them.
    """
    from ..schedule import report
    from ..schedule.measure import measure, to_json

    for what, chosen, known in (
        ("case", case, [c.name for c in CASES]),
        ("kernel", kernel, list(KERNELS)),
    ):
        if unknown := [name for name in chosen or () if name not in known]:
            print(f"error: --{what} {unknown[0]!r} is none of {known}", file=sys.stderr)
            raise typer.Exit(2)
    say = options.progress(quiet)
    rows = []
    try:
        for name in topology or DEFAULT_TOPOLOGIES:
            say(f"compiling for {name} ...")
            rows += measure(name, case or (), kernel or ())
        if plot is not None and rows:
            report.draw(rows, plot)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(report.table(rows))
    file = JsonOption(json_file)
    file.write({"schedules": to_json(rows)}, last=True)
    file.close()
