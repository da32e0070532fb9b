"""A plan as text for people and as JSON for programs."""

import collections
import dataclasses
from typing import Any

from .estimate import Plan, sent_bytes
from .issue import Issue
from .search import Candidate

GIB = 2**30
NOT_COUNTED = (
    "Attention only: weights, other layers and latencies are not counted. Times are bounds from "
    "bytes, instructions and peak rates; nothing was measured."
)


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


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None:
        return "?"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return "0" if seconds == 0 else f"{seconds * 1e9:.3g} ns"


def describe(plan: Plan, largest_batch: int | None) -> str:
    """The report of one plan.

    Args:
      plan: what to report.
      largest_batch: as confirmed by the compiler; None to leave it out.
    """
    return "\n\n".join(
        part
        for part in (
            _headline(plan),
            _memory(plan, largest_batch),
            _traffic(plan),
            _bounds(plan),
            NOT_COUNTED,
        )
        if part
    )


def _headline(plan: Plan) -> str:
    work, split, model = plan.workload, plan.split, plan.workload.model
    windows = ", ".join(
        f"{kind.count} layers " + (f"with a window of {kind.window}" if kind.window else "in full")
        for kind in model.layers
    )
    return (
        f"{model.name}: {model.num_heads}/{model.num_kv_heads} heads of {model.head_dim}, {windows}"
        f"{', sinks' if model.sinks else ''}; {work.batch} sequences of {work.context} tokens, "
        f"pages of {work.page_size}, {work.dtype}\n"
        f"{split.mesh.size} x {plan.device.kind} as {split.spec}: {split.seq_shards} shards of "
        f"sequences, {split.head_shards} of KV heads, {split.context_shards} of each context; "
        f"backend {work.backend or 'default'}, compiled in {duration(plan.compile_s)}"
    )


def _memory(plan: Plan, largest_batch: int | None) -> str:
    memory = plan.memory
    rows = [
        ["KV pages, all layers", size(memory.cache)],
        ["scratch, of one layer", size(memory.temp)],
        ["queries, tables, results", size(memory.other)],
        ["together", size(memory.total)],
    ]
    if memory.limit is not None:
        rows.append(
            [
                "HBM for programs" + (", less reserved" if plan.reserved_bytes else ""),
                size(memory.limit),
            ]
        )
    copied = sum(layer.copied_bytes for layer in plan.layers)
    lines = [table(rows, ["memory of each device", ""])]
    if copied:
        lines.append(f"WARNING: {size(copied)} of the cache are copied, not written in place")
    if memory.fits is not None:
        lines.append(f"{'fits' if memory.fits else 'DOES NOT FIT'}; {room(plan, largest_batch)}")
    return "\n".join(lines)


def room(plan: Plan, largest_batch: int | None = None) -> str:
    """What would fit at most."""
    batch = plan.largest_batch if largest_batch is None else largest_batch
    confirmed = " (compiled)" if largest_batch is not None else ""
    return (
        f"at most {batch} sequences of {plan.workload.context} tokens{confirmed}, or "
        f"{plan.workload.batch} of {plan.longest_context}"
    )


def traffic(plan: Plan) -> list[dict[str, Any]]:
    """What a step sends, summed over layers, by kind and axes."""
    groups: dict[tuple, list[tuple[int, Any]]] = collections.defaultdict(list)
    for layer in plan.layers:
        for sent in layer.collectives:
            key = (sent.kind, sent.axes, sent.group_size, sent.crosses_hosts, sent.crosses_slices)
            groups[key].append((layer.kind.count, sent))
    return [
        {
            "kind": kind,
            "axes": list(axes),
            "group_size": group_size,
            "crosses_hosts": hosts,
            "crosses_slices": slices,
            "count": sum(count for count, _ in members),
            "bytes": sum(count * sent.num_bytes for count, sent in members),
            "sent_bytes_per_device": sum(count * sent_bytes(sent) for count, sent in members),
        }
        for (kind, axes, group_size, hosts, slices), members in groups.items()
    ]


def _traffic(plan: Plan) -> str:
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
        for row in traffic(plan)
    ]
    if not rows:
        return "A step sends nothing between devices."
    header = ["a step sends", "group", "times", "bytes", "a device sends", "by", "between hosts"]
    return table(rows, header)


def _bounds(plan: Plan) -> str:
    times = plan.times
    if times is None or plan.tokens_per_s is None:
        return f"No bounds on time: the rates of a {plan.device.kind} device are not known here."
    rows = [
        [f"HBM, {size(plan.read_bytes)}", duration(times.hbm)],
        ["ICI", duration(times.ici)],
        ["DCN", duration(times.dcn)],
        ["together", duration(times.total)],
    ]
    if times.issue is not None:
        rows.insert(1, ["issue of the kernel", duration(times.issue)])
    bounds = table(rows, ["a step takes at least", ""])
    return f"{bounds}\nat most {plan.tokens_per_s:,.0f} tokens/s\n{_issue(plan.issue)}"


def _issue(issue: Issue | str) -> str:
    """Where the bound by issue cycles comes from, or why there is none."""
    if isinstance(issue, str):
        return f"No bound by the kernel's issue cycles: {issue}."
    shared = "share the heads" if issue.walks < issue.cores else "share the blocks"
    return (
        f"The kernel issues {issue.block_cycles} cycles a block of {issue.block_pages} pages, "
        f"{issue.sequence_cycles} a sequence with its first block, {issue.call_cycles} a layer, at "
        f"{issue.clock_hz / 1e9:.3g} GHz"
        + (f"; {issue.cores} cores {shared}" if issue.cores > 1 else "")
        + ". It overlaps with HBM: the longer counts."
    )


def ranking(candidates: list[Candidate], most: int = 12) -> str:
    """The best meshes as a table."""
    rows = []
    for candidate in candidates[:most]:
        plan = candidate.plan
        times = plan.times if plan else None
        if candidate.refused:
            fits = "no"
        else:
            fits = "?" if plan is None else "yes" if plan.memory.fits else "no"
        rows.append(
            [
                candidate.spec,
                fits,
                size(plan.memory.total) if plan else "",
                duration(times.hbm) if times else "",
                duration(times.issue) if times and times.issue is not None else "",
                duration(times.ici + times.dcn) if times else "",
                ("" if plan else ">= ") + duration(candidate.bound_s),
            ]
        )
    text = table(rows, ["mesh", "fits", "memory", "HBM", "issue", "ICI + DCN", "step"])
    left = len(candidates) - len(rows)
    return text + (f"\n({left} more meshes are slower)" if left > 0 else "")


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything about a plan that a program may want. Bytes and seconds."""
    work, memory, times = plan.workload, plan.memory, plan.times
    return {
        "workload": dataclasses.asdict(work),
        "mesh": {name: int(n) for name, n in plan.split.mesh.shape.items()},
        "num_devices": plan.split.mesh.size,
        "device_kind": plan.device.kind,
        "shards": {
            "seqs": plan.split.seq_shards,
            "heads": plan.split.head_shards,
            "context": plan.split.context_shards,
        },
        "memory_bytes_per_device": {
            **dataclasses.asdict(memory),
            "total": memory.total,
            "reserved": plan.reserved_bytes,
            "copied": sum(layer.copied_bytes for layer in plan.layers),
        },
        "fits": memory.fits,
        "largest_batch": plan.largest_batch,
        "longest_context": plan.longest_context,
        "collectives": traffic(plan),
        "hbm_bytes_per_step": plan.read_bytes,
        "least_seconds": None
        if times is None
        else {**dataclasses.asdict(times), "step": times.total},
        "issue": {"none": plan.issue}
        if isinstance(plan.issue, str)
        else dataclasses.asdict(plan.issue),
        "most_tokens_per_s": plan.tokens_per_s,
        "compile_s": plan.compile_s,
        "not_counted": NOT_COUNTED,
    }
