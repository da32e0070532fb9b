"""What a bench found: its rows, as JSON and as a table."""

import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from .timing import Timing

VERSIONS = ("jax", "jaxlib", "numpy", "ejkernel", "jax-cuda13-plugin", "libtpu")
VERSIONS += ("flashinfer-python", "torch")
OURS, COPY = "shardpage", "copy"
PLANNED = "shardpage, plan made before"
UNQUANTISED = "bfloat16"  # what other caches are compared with


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none.

    Attributes:
      bench: "decode", "quantised", "write", "steps" or "sharded".
      shape: the name of the work.
      name: the name of the implementation, of the cache's dtype or of the split.
      timing: the time of one call.
      useful_bytes: bytes of keys and values that a call must read; for writes, of the new ones.
      temp_bytes: scratch of the compiled program, per device.
      roof_gbps: GB/s that a copy reads and writes on the same device.
      efficiency: only of splits: time on one device over (number of devices) x (time on all); for
        work that grew with the devices, time on one device over time on all.
      flops: only of steps: of both products, of what the queries see.
      why: why there is no timing.
    """

    bench: str
    shape: str
    name: str
    timing: Timing | None = None
    useful_bytes: int = 0
    temp_bytes: int = 0
    roof_gbps: float = 0.0
    efficiency: float | None = None
    flops: int | None = None
    why: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies this measurement in every report."""
        return self.bench, self.shape, self.name

    @property
    def gbps(self) -> float | None:
        """Useful bytes per nanosecond."""
        return None if self.timing is None else self.useful_bytes / self.timing.median_us / 1e3

    @property
    def gflops(self) -> float | None:
        """Useful FLOPs per nanosecond."""
        if self.timing is None or self.flops is None:
            return None
        return self.flops / self.timing.median_us / 1e3

    def to_json(self) -> dict[str, Any]:
        """The fields, and what other programs would compute from them."""
        row = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "")}
        if self.gbps is not None:
            row |= {"gbps": round(self.gbps, 2)}
            row |= {"share_of_roof": round(self.gbps / self.roof_gbps, 4)} if self.roof_gbps else {}
        if self.gflops is not None:
            row |= {"gflops": round(self.gflops, 2)}
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Row":
        """The inverse of `to_json`."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in row.items() if name in names}
        timed = known.get("timing")
        return cls(**known | {"timing": Timing(**timed) if timed else None})


def environment(command: str, roof_gbps: float = 0.0, roof: str = "") -> dict[str, Any]:
    """The origin of a report: command, hardware, versions, commit; and the roof."""
    devices = jax.devices()
    return {
        "command": command,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "machine": platform.machine(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
        "commit": _commit(),
    } | ({"roof": roof, "roof_gbps": round(roof_gbps, 1)} if roof else {})


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A row of cells per measurement, after a header."""
    cells = [["", "", "us", "spread", "GB/s", "of copy", "temp MB", "against ours", "note"]]
    ours = {(row.bench, row.shape): row.timing for row in rows if row.name in (OURS, UNQUANTISED)}
    before = None
    for row in rows:
        shown = row.shape if (row.bench, row.shape) != before else ""
        before = row.bench, row.shape
        if row.timing is None or row.gbps is None:
            cells.append([shown, row.name, *[""] * 6, row.why])
            continue
        timing, reference = row.timing, ours.get((row.bench, row.shape))
        ratio = "" if reference is None else f"{timing.median_us / reference.median_us:.2f} x"
        note = "" if row.efficiency is None else f"efficiency {row.efficiency:.2f}"
        note = note if row.gflops is None else f"{speed(row.gflops)} GFLOP/s"
        cells.append(
            [
                shown,
                row.name,
                f"{timing.median_us:.0f}",
                f"{timing.spread:.0%}",
                speed(row.gbps),
                f"{row.gbps / row.roof_gbps:.0%}" if row.roof_gbps else "",
                f"{row.temp_bytes / 1e6:.0f}",
                ratio,
                note,
            ]
        )
    return cells


def first_line(failure: Exception) -> str:
    """What went wrong, briefly."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:120]


def speed(gbps: float) -> str:
    """GB/s, to three digits."""
    return f"{gbps:.0f}" if gbps >= 100 else f"{gbps:.3g}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
