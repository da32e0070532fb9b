"""`shardpage render`: a script or manifest that starts a job on a pod slice."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from . import options


def render(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="slurm, jobset, gcloud, mpirun or local.")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- JOB ...]",
            help="What each process runs: a job of shardpage, or any command. Default: verify.",
            show_default=False,
        ),
    ] = None,
    pod_slice: Annotated[
        str, Option("--slice", help="The slice: v5p:2x2x2, v5p-16, v6e:8x8.")
    ] = "v5p:2x2x2",
    slices: Annotated[int, Option(min=1, help="How many such slices.")] = 1,
    mesh: options.Mesh = None,
    name: Annotated[str, Option(help="Name of the job.")] = "shardpage",
    max_restarts: Annotated[int, Option(min=0, help="Restarts after a failure.")] = 3,
    image: Annotated[
        str | None, Option(help="Container image, for jobset.", show_default=False)
    ] = None,
    zone: Annotated[str | None, Option(help="Zone, for gcloud.", show_default=False)] = None,
    hosts: Annotated[
        str | None, Option(metavar="A,B", help="Host names, for mpirun.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Write here; default standard output.")
    ] = None,
) -> None:
    """Write a script or manifest, with comments, that starts a job on a slice."""
    import meshes

    from .. import render as renderers

    if kind not in renderers.RENDERERS:
        names = ", ".join(renderers.RENDERERS)
        raise typer.BadParameter(f"{kind!r} is none of {names}", param_hint="KIND")
    given = {"image": image, "zone": zone}
    try:
        job = renderers.Job(
            meshes.PodSlice.parse(pod_slice),
            words=tuple(command or ("verify",)),
            num_slices=slices,
            mesh=mesh,
            name=name,
            max_restarts=max_restarts,
            hosts=tuple(hosts.split(",")) if hosts else (),
            **{key: value for key, value in given.items() if value is not None},
        )
        if mesh is not None:
            num_devices = job.num_hosts * job.devices_per_process
            spec = meshes.MeshSpec.parse(mesh).over_slices(slices)
            spec.resolve(num_devices, slices)
        text = renderers.RENDERERS[kind](job)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except ImportError:
        print("error: jobset needs PyYAML: pip install 'shardpage[launch]'", file=sys.stderr)
        raise typer.Exit(1) from None
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
