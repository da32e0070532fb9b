"""`shardpage simulate`: several real processes on this machine, as several hosts would be."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ..processes import JOBS
from . import options


def simulate(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- JOB ...]",
            help="A job of shardpage with its options, or any command, such as python my.py, whose "
            "script calls launch.bootstrap.initialize(). Default: verify.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[int, Option(min=1, help="How many processes.")] = 2,
    devices_per_process: Annotated[
        int, Option(min=1, help="CPU devices that each process simulates.")
    ] = 4,
    mesh: options.Mesh = None,
    ranks: Annotated[
        str, Option(help="Whose output to show: 0, or all with the rank before each line.")
    ] = "0",
    log_dir: Annotated[
        Path | None,
        Option(metavar="DIR", help="Keep each rank's log here. Default: kept if the job fails."),
    ] = None,
    max_restarts: Annotated[
        int, Option(min=0, help="Times to start all processes again after a failure.")
    ] = 0,
    step_timeout: Annotated[
        float | None, Option(help="Seconds a step may take, compilation included. Default: 600.")
    ] = None,
    start_timeout: Annotated[
        float, Option(help="Seconds until all processes must have joined.")
    ] = 60.0,
    heartbeat_timeout: Annotated[
        float, Option(help="Seconds after which a silent process counts as dead.")
    ] = 20.0,
    grace: Annotated[
        float, Option(help="Seconds from asking processes to end to killing them.")
    ] = 10.0,
) -> None:
    """Run a job as several processes on this machine, joined by jax.distributed.

    Exits with 0, or the code of the process that failed first: 75 if it hung, 137 if it was killed.
    """
    from ..processes.supervisor import CannotStart, Gang, run

    if ranks not in ("0", "all"):
        raise typer.BadParameter(f"{ranks!r} is neither 0 nor all", param_hint="--ranks")
    words = command or ["verify"]
    if words[0] in JOBS:
        words = [sys.executable, "-m", "launch", *words]
    gang = Gang(
        command=words,
        num_processes=processes,
        devices_per_process=devices_per_process,
        mesh=mesh,
        show_all=ranks == "all",
        log_dir=log_dir,
        start_timeout=start_timeout,
        step_timeout=step_timeout,
        heartbeat_timeout=heartbeat_timeout,
        grace=grace,
        max_restarts=max_restarts,
    )
    try:
        code = run(gang)
    except CannotStart as error:
        print(f"error: cannot start {error}", file=sys.stderr)
        raise typer.Exit(127) from None
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)
