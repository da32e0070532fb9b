"""`shardpage verify`: is attention exact on this machine and mesh? A matrix of answers."""

import sys
import time
from typing import Annotated

import typer

from . import options

SHORT = {"float32": "f32", "bfloat16": "bf16", "float8_e4m3fn": "e4m3fn", "float8_e5m2": "e5m2"}


def verify(
    mesh: options.Mesh = None,
    simulate: options.Simulate = None,
    backend: Annotated[
        str | None, typer.Option(help="Check this one only: xla or pallas_tpu.")
    ] = None,
    kv_dtype: Annotated[
        options.KVDtype | None,
        typer.Option(help="Check caches of this dtype only: int8 and fp8 are quantised."),
    ] = None,
) -> None:
    """Compare page attention with an exact oracle: backends x layouts x options.

    Without --mesh all devices go to context. A machine that has only a CPU simulates as many
    devices as --mesh asks for.
    """
    with options.stoppable():
        num_missed = _run(mesh, simulate, backend, kv_dtype)
    if num_missed:
        print(f"error: {num_missed} result(s) miss the oracle", file=sys.stderr)
        raise typer.Exit(1)


def _run(
    mesh_option: str | None, simulate: int | None, backend: str | None, kv_dtype: str | None
) -> int:
    """Checks and prints the matrix; returns how many results miss."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from ..devices import describe_mesh, is_simulated, open_mesh
    from ..processes import bootstrap, guard
    from ..verify import checks

    rows = [row for row in checks.ROWS if backend in (None, row.backend)]
    if not rows:
        names = ", ".join(dict.fromkeys(row.backend for row in checks.ROWS))
        raise typer.BadParameter(f"{backend!r} is none of {names}", param_hint="--backend")
    rows = [row for row in rows if kv_dtype in (None, row.dtype)]
    if not rows:
        raise typer.BadParameter(
            f"{kv_dtype} is in no row of backend {backend}; leave --backend out",
            param_hint="--kv-dtype",
        )
    began = time.perf_counter()
    mesh = open_mesh(mesh_option, simulate, spare_cpu_devices=True)
    table = Table("backend", "cache", *checks.COLUMNS)
    for column in table.columns:
        column.no_wrap = True
    console = Console(quiet=not bootstrap.initialize().is_main)
    done: list[checks.Check] = []
    console.print(Text(f"mesh {describe_mesh(mesh, is_simulated(mesh))}"))
    with Live(table, console=console, auto_refresh=console.is_terminal) as live:
        for row in rows:
            guard.step()
            found = list(checks.check_row(row, mesh))
            cells = {check.column: _cell(check) for check in found}
            shown = [cells.get(column, Text("-")) for column in checks.COLUMNS]
            cache = f"{row.kv_layout} {SHORT.get(row.dtype, row.dtype)}"
            cache += ", scales of heads" * (row.scale == "head")
            table.add_row(row.backend, cache, *shown)
            if console.is_terminal:
                live.refresh()
            done += found
    guard.disarm()
    missed = [check for check in done if not check.ok]
    refused = [f"{check.row.backend}: {check.refusal}" for check in done if check.refusal]
    console.print()
    for refusal in dict.fromkeys(refused):
        console.print(Text(f"refused by {refusal}", style="yellow"))
    for check in missed:
        row = check.row
        where = " ".join([row.backend, row.kv_layout, row.dtype, row.scale, check.column])
        where = " ".join(where.split())
        console.print(
            Text(f"MISS {where}: error {check.error:.1e}, rounding allows {check.limit:.1e}")
        )
    console.print(
        Text(
            f"{len(done) - len(refused) - len(missed)} exact up to rounding, {len(refused)} "
            f"refused, {len(missed)} missed, in {time.perf_counter() - began:.0f} s; cells are the "
            f"largest error of outputs and lse"
        )
    )
    return len(missed)


def _cell(check):
    """An error in green or red, or that it was refused."""
    from rich.text import Text

    if check.refusal:
        return Text("refused", style="yellow")
    if check.ok:
        return Text(f"{check.error:.0e}" if check.error else "exact", style="green")
    return Text(f"MISS {check.error:.0e}", style="bold red")
