"""`shardpage plan`: does a decode step's attention fit a pod, what moves, how long at least."""

import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import jax
import typer
from jax.sharding import Mesh

import meshes

from ..plan import growth, report
from ..plan.compiled import DoesNotFitError
from ..plan.estimate import Device, Plan, confirm_largest_batch, make_plan, shrink_to_fit
from ..plan.search import Candidate, search, why
from ..plan.workload import KVLayoutName, LayerKind, Model, Workload, preset_names

NOT_FIT, USAGE = 1, 2


def plan(
    topology: Annotated[
        str | None, typer.Option(help="TPU slice to compile for: v5p:8x8x8, v5e:4x4, v5p-128.")
    ] = None,
    simulate: Annotated[
        int | None, typer.Option(help="Plan on so many simulated CPU devices instead.")
    ] = None,
    slices: Annotated[int, typer.Option(help="How many such slices, joined by DCN.")] = 1,
    mesh: Annotated[
        str | None, typer.Option(help='Axes: "data=8,context=8,kv=8". Without it, --search.')
    ] = None,
    find: Annotated[bool, typer.Option("--search", help="Rank all meshes that are legal.")] = False,
    model: Annotated[str | None, typer.Option(help=f"One of {', '.join(preset_names())}.")] = None,
    layers: Annotated[int, typer.Option(help="Layers, without --model.")] = 32,
    heads: Annotated[int, typer.Option(help="Query heads, without --model.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads, without --model.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Size of a head, without --model.")] = 128,
    window: Annotated[
        int | None, typer.Option(help="Sliding window of all layers, without --model.")
    ] = None,
    soft_cap: Annotated[float | None, typer.Option(help="Soft cap, without --model.")] = None,
    sinks: Annotated[bool, typer.Option(help="A sink per head, without --model.")] = False,
    batch: Annotated[int, typer.Option(help="Sequences over all devices.")] = 256,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 8192,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the cache.")] = "bfloat16",
    query_dtype: Annotated[str, typer.Option(help="Of queries and outputs.")] = "bfloat16",
    kv_layout: Annotated[
        KVLayoutName, typer.Option(help="blocks_first, heads_first or fused.")
    ] = "blocks_first",
    backend: Annotated[
        str | None, typer.Option(help="xla or pallas_tpu; by default what the devices get.")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(help="GiB of each device to leave alone, for weights for example.")
    ] = 0.0,
    confirm: Annotated[
        bool, typer.Option(help="Compile the largest batch that should fit, too.")
    ] = True,
    most: Annotated[
        int | None, typer.Option(help="Compile no more than so many meshes of a search.")
    ] = None,
    grow: Annotated[
        bool, typer.Option("--growth", help="How cost grows from 1 to 6144 chips of v5p, and end.")
    ] = False,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
    png: Annotated[
        pathlib.Path | None, typer.Option(help="Draw memory and time bounds by mesh here.")
    ] = None,
) -> None:
    """Plan a pod without one: compile paged attention for it and read memory, traffic, bounds.

    Compiles `write_kv` and `page_attention` of one layer for the whole mesh with libtpu, which
    needs no TPU, and reports what the compiler says.
    """
    try:
        if topology is not None and simulate is not None:
            raise ValueError("give --topology or --simulate, not both")
        if model is not None:
            shape = Model.preset(model)
        else:
            kinds = (LayerKind(layers, window),)
            shape = Model(
                "explicit sizes", heads, kv_heads, head_dim, kinds, soft_cap=soft_cap, sinks=sinks
            )
        work = Workload(
            shape, batch, context, page_size, dtype, query_dtype, kv_layout, backend
        ).checked()
        if topology is not None or grow:
            jax.config.update("jax_platforms", "cpu")  # compiling needs no TPU: leave it alone
        if grow:
            _emit(growth.measure(progress=_progress), json_file)
            return
        make_mesh, num_devices = _devices(topology, simulate, slices)
        reserved = int(reserve_gib * 2**30)
        if mesh is None or find:
            _search(work, make_mesh, num_devices, slices, reserved, most, json_file, png)
        else:
            _one(work, make_mesh, mesh, num_devices, slices, reserved, confirm, json_file, png)
    except typer.Exit:  # a RuntimeError itself
        raise
    except (ValueError, RuntimeError) as error:
        _fail(str(error), USAGE)


def _devices(
    topology: str | None, simulate: int | None, slices: int
) -> tuple[Callable[[str], Mesh], int]:
    """How to make a mesh, and how many devices it has."""
    if topology is not None:
        pod = meshes.PodSlice.parse(topology)
        return (
            lambda spec: meshes.topology(pod, spec, num_slices=slices),
            meshes.topology(pod, num_slices=slices).size,
        )
    if simulate is not None:
        num_devices = simulate * slices
        return lambda spec: meshes.simulate(num_devices, spec, num_slices=slices), num_devices
    return meshes.make, jax.device_count()


def _one(
    work: Workload,
    make_mesh: Callable[[str], Mesh],
    spec: str,
    num_devices: int,
    slices: int,
    reserved: int,
    confirm: bool,
    json_file: pathlib.Path | None,
    png: pathlib.Path | None,
) -> None:
    """Reports one mesh, and a better one if there is."""
    mesh = make_mesh(spec)
    _progress(f"compiling {spec}")
    try:
        plan = make_plan(work, mesh, reserved_bytes=reserved)
    except DoesNotFitError as error:
        smaller = shrink_to_fit(work, mesh, reserved_bytes=reserved)
        _fail(
            f"too little HBM even for one layer on mesh {spec} ({error}); it holds "
            f"at most {smaller.largest_batch} sequences of {smaller.workload.context} tokens",
            NOT_FIT,
        )
    largest = None
    if confirm and plan.memory.fits is not None:
        _progress("compiling the largest batch")
        largest = confirm_largest_batch(plan)
    typer.echo(report.describe(plan, largest))
    ranked = _ranked(work, make_mesh, num_devices, slices, reserved, 1)
    better = _better(plan, ranked)
    typer.echo("")
    typer.echo(better or f"No mesh was found that bounds a step lower than {spec}.")
    others = [c.plan for c in ranked if c.plan and c.plan.split.spec != plan.split.spec]
    _save(
        report.as_json(plan) | {"confirmed_largest_batch": largest, "better": better},
        json_file,
        [plan, *others],
        png,
    )
    if plan.memory.fits is False:
        _fail(
            f"{work.batch} sequences of {work.context} tokens do not fit mesh {spec}: "
            f"{report.size(plan.memory.total)} of {report.size(plan.memory.limit)}; "
            f"{report.room(plan, largest)}",
            NOT_FIT,
        )


def _search(
    work: Workload,
    make_mesh: Callable[[str], Mesh],
    num_devices: int,
    slices: int,
    reserved: int,
    most: int | None,
    json_file: pathlib.Path | None,
    png: pathlib.Path | None,
) -> None:
    """Ranks meshes, and reports the best."""
    ranked = _ranked(work, make_mesh, num_devices, slices, reserved, most)
    if not ranked:
        raise ValueError(
            "a search needs the rates of the devices, which are known for TPUs only: give "
            "--topology, or --mesh to plan one mesh"
        )
    typer.echo(report.ranking(ranked))
    best = ranked[0]
    if best.plan is None:
        smaller = shrink_to_fit(work, make_mesh(best.spec), reserved_bytes=reserved)
        room = f"{smaller.largest_batch} sequences of {smaller.workload.context} tokens"
        _fail(f"no mesh has the HBM for one layer; {best.spec} holds at most {room}", NOT_FIT)
    typer.echo(f"\n{why(best, ranked)}.\n")
    typer.echo(report.describe(best.plan, None))
    found = {
        "best": report.as_json(best.plan),
        "why": why(best, ranked),
        "ranking": [
            {
                "mesh": candidate.spec,
                "least_seconds": candidate.bound_s,
                "compiled": candidate.plan is not None,
                "fits": candidate.plan.memory.fits if candidate.plan else None,
            }
            for candidate in ranked
        ],
    }
    _save(found, json_file, [c.plan for c in ranked if c.plan], png)
    if not best.plan.memory.fits:
        _fail(f"no mesh has enough HBM; {best.spec}: {report.room(best.plan)}", NOT_FIT)


def _ranked(
    work: Workload,
    make_mesh: Callable[[str], Mesh],
    num_devices: int,
    slices: int,
    reserved: int,
    most: int | None,
) -> list[Candidate]:
    """A search; nothing where the rates of the devices are not known."""
    device = Device.of(make_mesh("data=-1"))
    if device.hbm_rate is None:
        return []
    return search(
        work,
        make_mesh,
        num_devices,
        slices,
        device,
        reserved_bytes=reserved,
        most=most,
        progress=_progress,
    )


def _better(plan: Plan, ranked: list[Candidate]) -> str | None:
    """A sentence about a mesh that is better than the planned one, if a compiled one is."""
    best = ranked[0].plan if ranked else None
    if best is None or best.times is None or plan.times is None or not best.memory.fits:
        return None
    if plan.memory.fits and best.times.total >= 0.999 * plan.times.total:
        return None
    return (
        f"A better mesh: {best.split.spec}, at least {report.duration(best.times.total)} a step "
        f"instead of {report.duration(plan.times.total)}, with "
        f"{report.size(best.memory.total)} on each device; --search compares all."
    )


def _save(
    found: dict[str, Any],
    json_file: pathlib.Path | None,
    plans: list[Plan],
    png: pathlib.Path | None,
) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if png is not None:
        from ..plan import picture

        work = plans[0].workload
        title = f"{work.model.name}, {work.batch} x {work.context} tokens"
        picture.draw(
            plans[:16], png, f"{title} on {plans[0].split.mesh.size} {plans[0].device.kind}"
        )


def _emit(rows: list[growth.Row], json_file: pathlib.Path | None) -> None:
    typer.echo(growth.as_markdown(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


def _progress(line: str) -> None:
    typer.echo(f"... {line}", err=True)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
