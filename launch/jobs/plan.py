"""`shardpage plan`: does a decode step's attention fit a pod, what moves, how long at least?"""

import pathlib
import sys
from typing import Annotated

import typer

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
    search: Annotated[bool, typer.Option("--search", help="Rank all legal meshes.")] = False,
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
        KVLayoutName | None, typer.Option(help="Of the cache; by default what suits the devices.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="xla or pallas_tpu; by default what the devices get.")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(help="GiB of each device to leave alone, for weights for example.")
    ] = 0.0,
    confirm: Annotated[
        bool, typer.Option(help="Compile the largest batch that should fit, too.")
    ] = True,
    issue: Annotated[
        bool, typer.Option(help="Read the kernel's schedule for a bound by its issue cycles, too.")
    ] = True,
    most: Annotated[
        int | None, typer.Option(help="Compile no more than so many meshes of a search.")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Only show how cost grows from 1 to 6144 chips of v5p.")
    ] = False,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
    png: Annotated[
        pathlib.Path | None, typer.Option(help="Draw memory and time bounds by mesh here.")
    ] = None,
) -> None:
    """Plan a pod without one: compile paged attention for it, read memory, traffic and bounds.

    Compiles write_kv and page_attention of one layer for the whole mesh with libtpu, which needs
    no TPU, and reports what the compiler says.
    """
    from ..plan.run import NotEnoughMemoryError, Request, run, run_growth

    try:
        if growth:
            return run_growth(json_file, backend)
        if model is not None:
            shape = Model.preset(model)
        else:
            kinds = (LayerKind(layers, window),)
            shape = Model("a model", heads, kv_heads, head_dim, kinds, None, soft_cap, sinks)
        work = Workload(shape, batch, context, page_size, dtype, query_dtype, kv_layout, backend)
        run(
            Request(
                work,
                topology,
                simulate,
                slices,
                mesh=None if search else mesh,
                reserved_bytes=int(reserve_gib * 2**30),
                confirm=confirm,
                issue=issue,
                most=most,
                json_file=json_file,
                png=png,
            )
        )
    except (ValueError, RuntimeError, NotEnoughMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = NOT_FIT if isinstance(error, NotEnoughMemoryError) else USAGE
        raise typer.Exit(code) from None
