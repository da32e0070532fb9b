"""`shardpage doctor`: is this host ready for a run? Each finding says what to do about it."""

import sys
from typing import Annotated

import typer

from . import options


def doctor(
    mesh: options.Mesh = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that this host should have.")
    ] = None,
    across: Annotated[
        bool,
        typer.Option(
            "--across", help="Join the other processes and compare versions; run it on all hosts."
        ),
    ] = False,
) -> None:
    """Check this host before a run: versions, devices, ports, leftovers of other runs.

    With --mesh also whether the devices make that mesh.
    """
    from ..processes.doctor import examine

    findings = list(examine(mesh=mesh, num_devices=devices, across=across))
    for finding in findings:
        print(finding)
    problems = sum(finding.is_problem for finding in findings)
    print(f"{problems} problem(s)" if problems else "ready", file=sys.stderr)
    if problems:
        raise typer.Exit(1)
