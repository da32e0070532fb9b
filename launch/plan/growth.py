"""How the cost of a step grows with the pod, from 1 chip to 6144: read from compiled programs."""

import dataclasses
from collections.abc import Callable, Iterable

import jax

import meshes

from .bound import sent_bytes
from .compile import compile_layer, split_for
from .read import read_layer
from .report import Report
from .workload import LayerKind, Model, Workload

SLICES = {1: "1x1x1", 8: "2x2x2", 64: "4x4x4", 512: "8x8x8", 6144: "16x16x24"}
SERIES = ("more sequences", "longer context", "same work")

# One layer in the shape of Llama-3-70B's.
_MODEL = Model("one layer", 64, 8, 128, (LayerKind(1),))


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled point: bytes per device and layer, seconds of compiling."""

    series: str
    chips: int
    mesh: str
    batch: int
    context: int
    cache_bytes: int
    temp_bytes: int
    sent_bytes: int
    num_collectives: int
    compile_s: float


def point(series: str, chips: int) -> tuple[str, int, int]:
    """The mesh, batch and context of a series at a size.

    From 8 chips on, "more sequences" and "longer context" give every chip the same: two of the
    eight KV heads of 4 sequences, 4096 tokens of each. "same work" is 768 sequences of 8192 tokens
    on any number of chips.
    """
    if series == "same work":
        kv = min(chips, 8)
        return f"data={chips // kv},context=1,kv={kv}", 768, 8192
    kv = min(chips, 4)
    rest = chips // kv
    if series == "more sequences":
        context = min(rest, 2)
        return f"data={rest // context},context={context},kv={kv}", 4 * rest // context, 8192
    return f"data=1,context={rest},kv={kv}", 4, 4096 * rest


def measure(
    sizes: Iterable[int] = tuple(SLICES),
    series: Iterable[str] = SERIES,
    *,
    backend: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compiles every point for v5p slices."""
    rows = []
    for name in series:
        for chips in sizes:
            spec, batch, context = point(name, chips)
            progress(f"compiling {name} on {chips} chips: {spec}")
            work = Workload(_MODEL, batch, context, backend=backend)
            split = split_for(work, meshes.topology(f"v5p:{SLICES[chips]}", spec))
            layer = read_layer(compile_layer(work, split, _MODEL.layers[0]))
            sent = round(sum(map(sent_bytes, layer.collectives)))
            same = {key: getattr(layer, key) for key in ("cache_bytes", "temp_bytes", "compile_s")}
            sending = {"sent_bytes": sent, "num_collectives": len(layer.collectives)}
            rows.append(Row(name, chips, spec, batch, context, **same, **sending))
    return rows


def as_markdown(rows: Iterable[Row]) -> str:
    """A table for a README."""
    lines = [
        "| series | chips | mesh | sequences x tokens | cache MiB | scratch MiB | KiB sent "
        "| collectives | compile s |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.series} | {row.chips} | `{row.mesh}` | {row.batch} x {row.context} "
            f"| {row.cache_bytes / 2**20:.1f} | {row.temp_bytes / 2**20:.2f} "
            f"| {row.sent_bytes / 1024:.1f} | {row.num_collectives} | {row.compile_s:.1f} |"
        )
    return "\n".join(lines)


def report(backend: str | None, progress: Callable[[str], None]) -> Report:
    """The table of all points."""
    jax.config.update("jax_platforms", "cpu")  # compiling needs no TPU: leave it alone
    rows = measure(backend=backend, progress=progress)
    return Report(as_markdown(rows), [dataclasses.asdict(row) for row in rows])
