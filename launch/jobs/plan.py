"""`shardpage plan`: does a step's attention fit a pod, what moves, how long at least?"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from ..json_file import JsonOption
from ..plan.workload import KVLayoutName, LayerKind, Model, Workload, preset_names
from . import options

if TYPE_CHECKING:
    from ..plan.report import Report

NOT_FIT, USAGE = 1, 2


def plan(
    topology: Annotated[str | None, options.TOPOLOGY] = None,
    simulate: options.Simulate = None,
    slices: Annotated[int, Option(help="How many such slices, joined by DCN.")] = 1,
    mesh: options.Mesh = None,
    search: Annotated[bool, Option("--search", help="Rank all legal meshes.")] = False,
    model: Annotated[str | None, Option(help=f"One of {', '.join(preset_names())}.")] = None,
    layers: Annotated[int, Option(help="Layers, without --model.")] = 32,
    heads: Annotated[int, Option(help="Query heads, without --model.")] = 32,
    kv_heads: Annotated[int, Option(help="KV heads, without --model.")] = 8,
    head_dim: Annotated[int, Option(help="Elements of a head, without --model.")] = 128,
    window: Annotated[int | None, Option(help="Sliding window, without --model.")] = None,
    soft_cap: Annotated[float | None, Option(help="Soft cap, without --model.")] = None,
    sinks: Annotated[bool, Option(help="A sink per head, without --model.")] = False,
    batch: Annotated[int, Option(help="Sequences over all devices.")] = 256,
    context: Annotated[int, Option(help="Tokens of each sequence.")] = 8192,
    new_tokens: Annotated[
        int,
        Option(help="Of them, new in a step: 1 decodes, more read a chunk of each one's prompt."),
    ] = 1,
    page_size: Annotated[int, Option(help="Tokens per page.")] = 64,
    dtype: Annotated[
        str,
        Option(
            help="Dtype of the cache; int8, float8_e4m3fn and float8_e5m2 have scales of tokens."
        ),
    ] = "bfloat16",
    query_dtype: Annotated[str, Option(help="Dtype of queries and outputs.")] = "bfloat16",
    kv_layout: Annotated[
        KVLayoutName | None, Option(help="Of the cache; by default the one that suits the devices.")
    ] = None,
    backend: Annotated[
        str | None, Option(help="xla or pallas_tpu; by default the library chooses.")
    ] = None,
    reserve_gib: Annotated[
        float, Option(help="GiB of each device to leave alone, for weights for example.")
    ] = 0.0,
    confirm: Annotated[bool, Option(help="Compile the largest batch that should fit, too.")] = True,
    issue: Annotated[
        bool, Option(help="Read the kernel's schedule for a bound by its issue cycles, too.")
    ] = True,
    most: Annotated[
        int | None, Option(help="Compile at most this many meshes of a search.")
    ] = None,
    growth: Annotated[
        bool, Option("--growth", help="Only show how cost grows from 1 to 6144 chips of v5p.")
    ] = False,
    json_file: options.Json = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
) -> None:
    """Plan a pod without one: compile paged attention for it, read memory, traffic and bounds.

    Compiles the attention of one layer, planned, written and read, for the whole mesh with libtpu,
    which needs no TPU, and reports what the compiler says. Without --mesh it ranks all legal
    meshes.
    """
    from ..plan import growth as growths
    from ..plan import run
    from ..plan.estimate import Pod

    say, file = options.progress(quiet), JsonOption(json_file)
    progress = lambda line: say(f"... {line}")
    try:
        if growth:
            report = growths.report(backend, progress)
        else:
            shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
            kinds = (LayerKind(layers, window),)
            given = Model("a model", **shape, layers=kinds, soft_cap=soft_cap, sinks=sinks)
            cache = {"page_size": page_size, "dtype": dtype, "kv_layout": kv_layout}
            work = Workload(
                given if model is None else Model.preset(model),
                batch=batch, context=context, new_tokens=new_tokens, **cache,
                query_dtype=query_dtype, backend=backend,
            )  # fmt: skip
            pod = Pod(topology, simulate, slices, reserved_bytes=int(reserve_gib * 2**30))
            how = {"issue": issue, "progress": progress}
            if mesh is None or search:
                report = run.all_meshes(work, pod, most=most, compare=plot is not None, **how)
            else:
                report = run.one_mesh(work, pod, mesh, confirm=confirm, **how)
        _deliver(report, file, plot)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(USAGE) from None
    if report.misfit is not None:
        print(f"error: {report.misfit}", file=sys.stderr)
        raise typer.Exit(NOT_FIT)
    file.close()


def _deliver(report: "Report", file: JsonOption, plot: Path | None) -> None:
    """Prints, writes and draws."""
    from ..plan import picture

    if report.text:
        print(report.text, flush=True)
    if report.figures is not None:
        file.write(report.figures, last=True)
    if plot is not None and report.meshes:
        picture.draw(report.meshes, plot)
