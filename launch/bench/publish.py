"""`python -m launch.bench.readme`: draws the kept results, and puts their figures in the README.

Each table stands between its markers:

<!-- figures: gpu_decode -->   ...generated...   <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..schedule.measure import Measured
from ..schedule.report import draw as draw_schedules
from .draw import draw
from .peers import OURS
from .report import Row, speed

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
MEASURED = ("cpu_decode", "gpu_decode", "gpu_sharded")
COMPILED = "tpu_schedule"


def load(name: str) -> dict[str, Any]:
    """A kept report."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _decode(report: dict[str, Any]) -> str:
    """GB/s of each implementation, and how often ours is faster."""
    rows = {(row.shape, row.name): row for row in map(Row.from_json, report["rows"])}
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    timed = {name for (_, name), row in rows.items() if row.timing}
    peers = [name for _, name in rows if name in timed and name != OURS]
    peers = sorted(set(peers), key=peers.index)
    cells = [["shape", f"{OURS}, us", "GB/s", "of copy", "temp MB", *(f"x {p}" for p in peers)]]
    for shape in shapes:
        ours = rows[shape, OURS]
        assert ours.timing is not None
        assert ours.gbps is not None
        cells.append(
            [
                shape,
                f"{ours.timing.median_us:.0f}",
                speed(ours.gbps),
                f"{ours.gbps / ours.roof_gbps:.0%}",
                f"{ours.temp_bytes / 1e6:.0f}",
                *(_times_faster(ours, rows.get((shape, peer))) for peer in peers),
            ]
        )
    return _table(cells)


def _times_faster(ours: Row, peer: Row | None) -> str:
    if peer is None or peer.timing is None or ours.timing is None:
        return peer.why.partition(":")[0] if peer else ""
    return f"{peer.timing.median_us / ours.timing.median_us:.2f}"


def _sharded(report: dict[str, Any]) -> str:
    """Efficiency of each split."""
    cells = [["split: work", "devices", "us", "spread", "efficiency"]]
    for row in map(Row.from_json, report["rows"]):
        if row.timing is None:
            cells.append([row.shape, row.name, row.why, "", ""])
            continue
        spread = (row.timing.high_us - row.timing.low_us) / row.timing.median_us
        efficiency = "" if row.efficiency is None else f"{row.efficiency:.2f}"
        cells.append(
            [row.shape, row.name, f"{row.timing.median_us:.0f}", f"{spread:.0%}", efficiency]
        )
    return _table(cells)


def _schedule(report: dict[str, Any]) -> str:
    """Issue cycles over HBM cycles: both layouts of this library, and JAX's kernel."""
    ratios = {(r["case"], r["topology"], r["kernel"]): r["ratio"] for r in report["schedules"]}
    topologies = list(dict.fromkeys(topology for _, topology, _ in ratios))
    cells = [["case", *(t.partition(":")[0] for t in topologies)]]
    for case in dict.fromkeys(r["case"] for r in report["schedules"] if r["limit"] is not None):
        found = [
            [ratios.get((case, topology, kernel)) for kernel in ("fused", "separate", "stock")]
            for topology in topologies
        ]
        shown = (" / ".join("-" if r is None else f"{r:.2f}" for r in each) for each in found)
        cells.append([case, *shown])
    return _table(cells)


def _table(cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def _with_source(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """A table, and under it where it comes from."""

    def both(report: dict[str, Any]) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        copies = f"a copy reads and writes {report['roof_gbps']:.0f} GB/s ({report['roof']})"
        source = f"`{report['command']}` on {report['num_devices']} x {report['device']}"
        return f"{table(report)}\n\n({source}; {copies}; {versions})"

    return both


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu_decode": _with_source(_decode),
    "gpu_decode": _with_source(_decode),
    "gpu_sharded": _with_source(_sharded),
    COMPILED: _schedule,
}


def generated(text: str) -> str:
    """The README with every table made anew from its JSON file."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- figures: {name} -->\n{TABLES[name](load(name))}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def draw_all() -> None:
    """A picture beside each kept report."""
    for name in MEASURED:
        report = load(name)
        title = f"{report['num_devices']} x {report['device']}, jax {report['versions']['jax']}"
        draw([Row.from_json(row) for row in report["rows"]], title, RESULTS / f"{name}.png")
    rows = load(COMPILED)["schedules"]
    fields = Measured.__dataclass_fields__
    measured = [Measured(**{k: v for k, v in row.items() if k in fields}) for row in rows]
    draw_schedules(measured, RESULTS / f"{COMPILED}.png")


if __name__ == "__main__":
    draw_all()
    path = ROOT / "README.md"
    path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
