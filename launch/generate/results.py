"""What a run has to show at its end: rates, and tables of prompts and devices."""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..devices import describe_mesh, is_simulated
from .engine import Engine
from .requests import Request

if TYPE_CHECKING:
    from jax.sharding import Mesh

MOST_DEVICES_SHOWN = 16


def rates(engine: Engine) -> dict[str, float | int | None]:
    """Speeds over the whole run, compilation apart; see `Stats` for steps that do both."""
    stats = engine.stats
    per_second = lambda tokens, seconds: round(tokens / seconds, 2) if seconds else None
    return {
        "prefill_tokens_per_second": per_second(stats.prefill_tokens, stats.prefill_seconds),
        "decode_tokens_per_second": per_second(stats.decode_tokens, stats.decode_seconds),
        "decode_steps": stats.decode_steps,
        "steps": stats.steps,
        "step_seconds": round(stats.seconds, 2),
        "compile_seconds": round(stats.compile_seconds, 2),
    }


def prompt_table(requests: list[Request]) -> Table:
    """Per prompt: tokens, how it ended, speed."""
    table = Table(title="prompts", title_justify="left")
    for name in ("#", "prompt tokens", "new tokens", "first after", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("ended")
    for number, request in enumerate(requests, 1):
        started, first, speed = request.started, request.first_token, request.tokens_per_second
        table.add_row(
            str(number),
            str(len(request.prompt_ids)),
            str(len(request.ids)),
            "-" if started is None or first is None else f"{first - started:.2f} s",
            f"{speed:.1f}" if speed is not None else "-",
            request.ending or "-",
        )
    return table


def devices(engine: Engine, mesh: "Mesh") -> list[dict[str, Any]]:
    """Per device: its place in the mesh, its pages, and the bytes of cache and weights."""
    pages = engine.pool.num_pages // engine.rows.peak_pages.size
    rows = []
    for index, device in np.ndenumerate(mesh.devices):
        place = dict(zip(mesh.axis_names, index, strict=True))
        peak = engine.rows.peak_pages[place.get("data", 0), place.get("context", 0)]
        rows.append(
            {
                "device": str(device),
                "position": place,
                "pages": pages,
                "peak_pages": int(peak),
                "kv_bytes": engine.cache_bytes_per_device,
                "weight_bytes": engine.weight_bytes_per_device,
            }
        )
    return rows


def device_table(engine: Engine, mesh: "Mesh") -> Table:
    """Per device: pages and bytes."""
    table = Table(title="devices", title_justify="left")
    table.add_column("device")
    for name in ("at", "pages used", "of", "KV cache", "weights"):
        table.add_column(name, justify="right")
    rows = devices(engine, mesh)
    for row in rows[:MOST_DEVICES_SHOWN]:
        table.add_row(
            row["device"],
            " ".join(f"{name}:{index}" for name, index in row["position"].items()),
            str(row["peak_pages"]),
            str(row["pages"]),
            _megabytes(row["kv_bytes"]),
            _megabytes(row["weight_bytes"]),
        )
    if len(rows) > MOST_DEVICES_SHOWN:
        table.add_row(f"... {len(rows) - MOST_DEVICES_SHOWN} more")
    return table


def print_summary(engine: Engine, mesh: "Mesh", requests: list[Request], console: Console) -> None:
    """The tables at the end of a run, and its rates."""
    found = rates(engine)
    prefill, decode = (
        f" at {rate} tokens/s" if rate else ""
        for rate in (found["prefill_tokens_per_second"], found["decode_tokens_per_second"])
    )
    num_made = sum(len(request.ids) for request in requests)
    console.print()
    console.print(prompt_table(requests))
    console.print(device_table(engine, mesh))
    console.print(Text(f"mesh {describe_mesh(mesh, is_simulated(mesh))}"))
    read = f"read {engine.stats.prefill_tokens} prompt tokens{prefill}"
    made = f"made {num_made} new ones{decode}"
    console.print(Text(f"{read}, {made}; compiled for {found['compile_seconds']} s"))
    console.print(
        Text(
            f"KV cache of {engine.cache.format.dtype}: {engine.cache_bytes_per_token} "
            "bytes a token, all layers and devices"
        )
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
