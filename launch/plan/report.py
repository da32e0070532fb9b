"""Last stage: bounds as text for people and as figures for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .bound import Bounds, sent_bytes
from .issue import Issue, Schedule
from .search import Candidate

GIB = 2**30
NOT_COUNTED = (
    "Attention only: weights, other layers and latencies are not counted. Times are bounds from "
    "bytes, instructions and peak rates; nothing was measured."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What to show.

    Attributes:
      text: for people.
      figures: the same for programs; None where there are none.
      meshes: what to draw.
      misfit: what to say, with what would fit, if there is too little memory.
    """

    text: str
    figures: Any = None
    meshes: Sequence[Bounds] = ()
    misfit: str | None = None


def table(rows: list[list[str]], header: list[str]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that reads best."""
    if num_bytes is None:
        return "?"
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return "0" if seconds == 0 else f"{seconds * 1e9:.3g} ns"


def on_one(spec: str, bounds: Bounds, largest_batch: int | None, others: list[Candidate]) -> Report:
    """Reports on the mesh that was asked for, beside others; `largest_batch` as confirmed."""
    better = better_than(spec, bounds, others)
    work, memory, misfit = bounds.workload, bounds.memory, None
    if memory.fits is False:
        misfit = (
            f"{work.batch} sequences of {work.context} tokens do not fit mesh {spec}: "
            f"{size(memory.total)} of {size(memory.limit)}; {room(bounds, largest_batch)}"
        )
    return Report(
        f"{describe(bounds, largest_batch)}\n\n{better}",
        as_json(bounds) | {"confirmed_largest_batch": largest_batch, "better": better},
        [bounds, *(c.bounds for c in others if c.bounds and c.spec != bounds.split.spec)],
        misfit,
    )


def on_all(candidates: list[Candidate], best: Bounds) -> Report:
    """Reports on all meshes, best first, and in full on the best."""
    reason = why(candidates)
    misfit = f"no mesh has enough HBM; {candidates[0].spec}: {room(best)}"
    return Report(
        f"{ranking(candidates)}\n\n{reason}.\n\n{describe(best, None)}",
        {"best": as_json(best), "why": reason, "ranking": ranking_as_json(candidates)},
        [c.bounds for c in candidates if c.bounds],
        None if best.memory.fits else misfit,
    )


def describe(bounds: Bounds, largest_batch: int | None) -> str:
    """The report of one bounds.

    Args:
      bounds: what to report.
      largest_batch: as confirmed by the compiler; None to leave it out.
    """
    memory = _memory(bounds, largest_batch)
    parts = (_headline(bounds), memory, _traffic(bounds), _times(bounds), NOT_COUNTED)
    return "\n\n".join(parts)


def _headline(bounds: Bounds) -> str:
    work, split, model = bounds.workload, bounds.split, bounds.workload.model
    windows = ", ".join(
        f"{kind.count} layers " + (f"with a window of {kind.window}" if kind.window else "in full")
        for kind in model.layers
    )
    tokens = f"{work.context} tokens"
    if work.new_tokens > 1:
        tokens += f", {work.new_tokens} of them new"
    return (
        f"{model.name}: {model.num_heads}/{model.num_kv_heads} heads of {model.head_dim}, {windows}"
        f"{', sinks' if model.sinks else ''}; {work.batch} sequences of {tokens}, "
        f"pages of {work.page_size}, {work.dtype}\n"
        f"{split.mesh.size} x {bounds.device.kind} as {split.spec}: {split.seq_shards} shards of "
        f"sequences, {split.head_shards} of KV heads, {split.context_shards} of each context; "
        f"backend {work.backend or 'default'}, compiled in {duration(bounds.compile_s)}"
    )


def _memory(bounds: Bounds, largest_batch: int | None) -> str:
    memory = bounds.memory
    rows = [
        ["KV pages, all layers", size(memory.cache)],
        ["scratch, of one layer", size(memory.temp)],
        ["queries, tables, results", size(memory.other)],
        ["together", size(memory.total)],
    ]
    if memory.limit is not None:
        less = ", less reserved" if bounds.reserved_bytes else ""
        rows.append([f"HBM for programs{less}", size(memory.limit)])
    copied = sum(layer.copied_bytes for layer in bounds.layers)
    lines = [table(rows, ["memory of each device", ""])]
    if copied:
        lines.append(f"WARNING: {size(copied)} of the cache are copied, not written in place")
    if memory.fits is not None:
        lines.append(f"{'fits' if memory.fits else 'DOES NOT FIT'}; {room(bounds, largest_batch)}")
    return "\n".join(lines)


def room(bounds: Bounds, largest_batch: int | None = None) -> str:
    """The most that would fit."""
    batch = bounds.largest_batch if largest_batch is None else largest_batch
    confirmed = " (compiled)" if largest_batch is not None else ""
    chunk = f", or chunks of {bounds.largest_chunk}" if bounds.workload.new_tokens > 1 else ""
    return (
        f"at most {batch} sequences of {bounds.workload.context} tokens{confirmed}, or "
        f"{bounds.workload.batch} of {bounds.longest_context}{chunk}"
    )


def traffic(bounds: Bounds) -> list[dict[str, Any]]:
    """What a step sends, summed over layers, by kind and axes."""
    alike = ("kind", "axes", "group_size", "crosses_hosts", "crosses_slices")
    sums = {"count": 0, "bytes": 0, "sent_bytes_per_device": 0}
    rows: dict[tuple, dict[str, Any]] = {}
    for layer in bounds.layers:
        for sent in layer.collectives:
            key = tuple(getattr(sent, name) for name in alike)
            row = rows.setdefault(key, dict(zip(alike, key, strict=True)) | sums)
            row["count"] += layer.kind.count
            row["bytes"] += layer.kind.count * sent.num_bytes
            row["sent_bytes_per_device"] += layer.kind.count * sent_bytes(sent)
    return list(rows.values())


def _traffic(bounds: Bounds) -> str:
    rows = [
        [
            f"{row['kind']} over {', '.join(row['axes'])}",
            str(row["group_size"]),
            str(row["count"]),
            size(row["bytes"]),
            size(row["sent_bytes_per_device"]),
            "DCN" if row["crosses_slices"] else "ICI",
            "yes" if row["crosses_hosts"] else "no",
        ]
        for row in traffic(bounds)
    ]
    if not rows:
        return "A step sends nothing between devices."
    header = ["a step sends", "group", "times", "bytes", "a device sends", "by", "between hosts"]
    return table(rows, header)


def _times(bounds: Bounds) -> str:
    times = bounds.times
    if times is None or bounds.tokens_per_s is None:
        return f"No bounds on time: the rates of a {bounds.device.kind} device are not known here."
    rows = [
        [f"HBM, {size(bounds.read_bytes)}", duration(times.hbm)],
        ["ICI", duration(times.ici)],
        ["DCN", duration(times.dcn)],
        ["together", duration(times.total)],
    ]
    if bounds.workload.new_tokens > 1:
        rows.insert(1, ["matrix units", duration(times.mxu)])
    if times.issue is not None:
        rows.insert(1, ["issue of the kernel", duration(times.issue)])
    least = table(rows, ["a step takes at least", ""])
    return f"{least}\nat most {bounds.tokens_per_s:,.0f} tokens/s\n{_issue(bounds.issue)}"


def _issue(issue: Issue) -> str:
    """Where the bound by issue cycles comes from, or why there is none."""
    kernel = issue.schedule
    if kernel is None:
        return f"No bound by the kernel's issue cycles: {issue.reason}."
    pages = max(kernel.cycles)
    some = f" ({kernel.executed_seqs} of them executed)" if _is_part(kernel) else ""
    return (
        "The kernels of a layer, executed as compiled, issue for "
        f"{kernel.cycles[pages]:.0f} cycles with {kernel.num_seqs} sequences of {pages} pages "
        f"on a device{some}, at {kernel.clock_hz / 1e9:.3g} GHz"
        + (f" on each of {kernel.cores} cores" if kernel.cores > 1 else "")
        + ". It overlaps with HBM and the matrix units: the longest counts."
    )


def _is_part(kernel: Schedule) -> bool:
    return kernel.executed_seqs < kernel.num_seqs


def ranking(candidates: list[Candidate], most: int = 12) -> str:
    """The best meshes as a table."""
    rows = []
    for candidate in candidates[:most]:
        bounds = candidate.bounds
        times = bounds.times if bounds else None
        fits = "?" if candidate.fits and bounds is None else "yes" if candidate.fits else "no"
        rows.append(
            [
                candidate.spec,
                fits,
                size(bounds.memory.total) if bounds else "",
                duration(times.hbm) if times else "",
                duration(times.issue) if times and times.issue is not None else "",
                duration(times.ici + times.dcn) if times else "",
                ("" if bounds else ">= ") + duration(candidate.least_s),
            ]
        )
    text = table(rows, ["mesh", "fits", "memory", "HBM", "issue", "ICI + DCN", "step"])
    left = len(candidates) - len(rows)
    return text + (f"\n({left} more meshes are slower)" if left > 0 else "")


def ranking_as_json(candidates: list[Candidate]) -> list[dict[str, Any]]:
    """All meshes, best first, for programs."""
    return [
        {
            "mesh": candidate.spec,
            "least_seconds": candidate.least_s,
            "compiled": candidate.bounds is not None,
            "fits": candidate.bounds.memory.fits if candidate.bounds else None,
            "refused": candidate.refused,
        }
        for candidate in candidates
    ]


def why(candidates: list[Candidate]) -> str:
    """One sentence on what makes the best mesh the best."""
    best, bounds = candidates[0], candidates[0].bounds
    if bounds is None or bounds.times is None or not bounds.memory.fits:
        return "no mesh fits this workload"
    merges = bounds.times.ici + bounds.times.dcn
    reads = f"{bounds.read_bytes / 1e9:.3g} GB of HBM to read per device and step"
    fewest = min(c.bounds.read_bytes for c in candidates if c.bounds)
    if (bounds.times.issue or 0) > bounds.times.hbm:
        reads += ", which the kernel's issue cycles outlast"
    least = "the least of all compiled" if bounds.read_bytes <= fewest * 1.001 else "near the least"
    if merges == 0:
        return f"{best.spec} wins: {reads}, {least}, and no collective at all"
    together = max(c.sizes["data"] * c.sizes["kv"] for c in candidates)
    return (
        f"{best.spec} wins: {reads}, {least}. Sequences and KV heads divide over {together} of "
        f"the {bounds.split.mesh.size} devices, so contexts have to be split as well, and the "
        f"fewer ways the better: this merge takes {merges * 1e6:.3g} us"
    )


def better_than(spec: str, bounds: Bounds, candidates: list[Candidate]) -> str:
    """A sentence about a mesh that is better than `spec`, if a compiled one is."""
    best = candidates[0].bounds if candidates else None
    none = f"No mesh was found that bounds a step lower than {spec}."
    if best is None or best.times is None or bounds.times is None or not best.memory.fits:
        return none
    if bounds.memory.fits and best.times.total >= 0.999 * bounds.times.total:
        return none
    return (
        f"A better mesh: {best.split.spec}, at least {duration(best.times.total)} a step instead "
        f"of {duration(bounds.times.total)}, with {size(best.memory.total)} on each device; "
        f"--search compares all."
    )


def as_json(bounds: Bounds) -> dict[str, Any]:
    """Everything about a mesh that a program may want. Bytes and seconds."""
    work, memory, times = bounds.workload, bounds.memory, bounds.times
    return {
        "workload": dataclasses.asdict(work),
        "mesh": {name: int(n) for name, n in bounds.split.mesh.shape.items()},
        "num_devices": bounds.split.mesh.size,
        "device_kind": bounds.device.kind,
        "shards": {
            "seqs": bounds.split.seq_shards,
            "heads": bounds.split.head_shards,
            "context": bounds.split.context_shards,
        },
        "memory_bytes_per_device": {
            **dataclasses.asdict(memory),
            "total": memory.total,
            "reserved": bounds.reserved_bytes,
            "copied": sum(layer.copied_bytes for layer in bounds.layers),
        },
        "fits": memory.fits,
        "largest_batch": bounds.largest_batch,
        "largest_chunk": bounds.largest_chunk,
        "longest_context": bounds.longest_context,
        "collectives": traffic(bounds),
        "hbm_bytes_per_step": bounds.read_bytes,
        "least_seconds": None
        if times is None
        else {**dataclasses.asdict(times), "step": times.total},
        "issue": bounds.issue.as_json(),
        "most_tokens_per_s": bounds.tokens_per_s,
        "compile_s": bounds.compile_s,
        "not_counted": NOT_COUNTED,
    }
