"""Meshes side by side as a picture: bytes of each device, and what a step waits for."""

import pathlib
from collections.abc import Sequence

from ..schedule.report import new_figure
from .bound import Bounds, Times

GIB = 2**30


def draw(meshes: Sequence[Bounds], path: pathlib.Path) -> None:
    """Writes a PNG: memory to the left, bounds on time to the right, a bar each for 16 meshes.

    Raises:
      RuntimeError: without matplotlib.
    """
    meshes = meshes[:16]
    figure = new_figure(11, 2.1 + 0.36 * len(meshes))
    work, device = meshes[0].workload, meshes[0].device.kind
    title = f"{work.model.name}, {work.batch} x {work.context} tokens on"
    figure.suptitle(f"{title} {meshes[0].split.mesh.size} {device}", fontsize=10)
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [mesh.split.spec for mesh in meshes]
    _stack(
        memory,
        names,
        {
            "KV pages": [mesh.memory.cache / GIB for mesh in meshes],
            "scratch": [mesh.memory.temp / GIB for mesh in meshes],
            "arguments": [mesh.memory.other / GIB for mesh in meshes],
        },
    )
    limit = meshes[0].memory.limit
    room = "" if limit is None else f" (of {limit / GIB:.3g})"
    if limit is not None and max(mesh.memory.total for mesh in meshes) > 0.3 * limit:
        memory.axvline(limit / GIB, color="black", linestyle="--")
    _label(memory, f"GiB on each device{room}")
    times = [mesh.times for mesh in meshes if mesh.times]
    if len(times) == len(meshes):
        parts = {"HBM": "hbm", "issue beyond HBM": "issue", "ICI": "ici", "DCN": "dcn"}
        _stack(
            time,
            names,
            {label: [1e3 * _waited(t, part) for t in times] for label, part in parts.items()},
        )
        _label(time, "ms a step at least (attention only)")
    else:
        time.set_axis_off()
    memory.invert_yaxis()
    figure.savefig(path, dpi=120)


def _waited(times: Times, part: str) -> float:
    return times.attend - times.hbm if part == "issue" else getattr(times, part)


def _label(axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _stack(axes, names: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for label, widths in parts.items():
        axes.barh(names, widths, left=left, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
