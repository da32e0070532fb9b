"""All legal meshes for a workload, best first."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from jax.sharding import Mesh

import meshes

from .estimate import Device, Plan, make_plan, quick_bound
from .workload import Workload

TIE = 1.02  # bounds this near to each other are as good as equal


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the bound from its shapes, and its plan if it was worth compiling.

    Attributes:
      spec: the axes as text.
      sizes: the same, with all three axes.
      quick_s: the bound from shapes alone, seconds.
      plan: what came of compiling.
      refused: why compiling it failed: memory, or a limit of the backend.
    """

    spec: str
    sizes: dict[str, int]
    quick_s: float
    plan: Plan | None = None
    refused: str | None = None

    @property
    def bound_s(self) -> float:
        """The best bound there is, seconds."""
        times = self.plan.times if self.plan else None
        return times.total if times else self.quick_s

    @property
    def fits(self) -> bool:
        """Whether it may fit: False if it was compiled and does not, or could not be."""
        return self.refused is None and (self.plan is None or self.plan.memory.fits is not False)


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """What fits first, then what was compiled, then by the bound on time.

    Of those within 2 % of the best, what splits context least comes first (a merge costs latency,
    which no bound counts), then what splits heads most (that splits the weights as well).
    """
    ordered = sorted(candidates, key=lambda c: (not c.fits, c.plan is None, c.bound_s))
    if not ordered:
        return []
    best = ordered[0]
    ties = [
        c
        for c in ordered
        if (c.fits, c.plan is None) == (best.fits, best.plan is None)
        and c.bound_s <= TIE * best.bound_s
    ]
    ties.sort(key=lambda c: (c.sizes["context"], -c.sizes["kv"]))
    return ties + [c for c in ordered if c not in ties]


def search(
    workload: Workload,
    make_mesh: Callable[[str], Mesh],
    num_devices: int,
    num_slices: int,
    device: Device,
    *,
    reserved_bytes: int = 0,
    issue: bool = True,
    most: int | None = None,
    compare: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Candidate]:
    """Ranks the meshes of axes data, context and kv that hold a workload.

    Candidates are compiled in the order of the bound from their shapes. Once that bound exceeds
    the best compiled time by more than a tie, no later one can win, and the rest keep it as their
    only figure.

    Args:
      workload: the model and its sequences.
      make_mesh: from a spec to a mesh over all devices.
      num_devices: how many there are, over all slices.
      num_slices: slices, which go to `data`.
      device: its rates, which must be known.
      reserved_bytes, issue: see `make_plan`.
      most: compile no more than this many.
      compare: also compile the likeliest mesh of every size of `context`, to be looked at.
      progress: told about each compilation.

    Returns:
      All candidates, best first.

    Raises:
      ValueError: if no mesh is legal.
    """
    candidates = ranked(
        Candidate(spec, sizes, quick_bound(workload, sizes, device))
        for spec, sizes in legal(workload, num_devices, num_slices)
    )
    if not candidates:
        raise ValueError(
            f"no mesh of data, context and kv splits {workload.batch} sequences and "
            f"{workload.model.num_kv_heads} KV heads over {num_devices} devices in {num_slices} "
            f"slices: make the batch a multiple of {num_slices}"
        )
    examples = {c.sizes["context"]: c.spec for c in reversed(candidates)} if compare else {}
    best = float("inf")
    num_compiled = 0
    done: list[Candidate] = []
    for candidate in candidates:
        can_win = candidate.quick_s <= TIE * best or candidate.spec in examples.values()
        if can_win and num_compiled != most:
            num_compiled += 1
            progress(f"compiling {candidate.spec}")
            try:
                mesh = make_mesh(candidate.spec)
                plan = make_plan(workload, mesh, reserved_bytes=reserved_bytes, issue=issue)
                candidate = dataclasses.replace(candidate, plan=plan)
            except (ValueError, NotImplementedError) as error:
                candidate = dataclasses.replace(candidate, refused=str(error))
            if candidate.plan and candidate.plan.memory.fits:
                best = min(best, candidate.bound_s)
        done.append(candidate)
    return ranked(done)


def legal(
    workload: Workload, num_devices: int, num_slices: int = 1
) -> Iterator[tuple[str, dict[str, int]]]:
    """All specs whose axes divide the batch and the KV heads, none with an axis for nothing."""
    for data, context, kv in meshes.factorings(num_devices, 3):
        fits = workload.batch % data == 0 and workload.model.num_kv_heads % kv == 0
        if not fits or data % num_slices or context > workload.max_blocks:
            continue
        sizes = {"data": data, "context": context, "kv": kv}
        named = [f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "data"]
        yield ",".join(named), sizes


def why(best: Candidate, candidates: list[Candidate]) -> str:
    """One sentence on what makes the best mesh the best."""
    plan = best.plan
    if plan is None or plan.times is None or not plan.memory.fits:
        return "no mesh fits this workload"
    merges = plan.times.ici + plan.times.dcn
    reads = f"{plan.read_bytes / 1e9:.3g} GB of HBM to read per device and step"
    fewest = min(c.plan.read_bytes for c in candidates if c.plan)
    if (plan.times.issue or 0) > plan.times.hbm:
        reads += ", which the kernel's issue cycles outlast"
    least = "the least of all compiled" if plan.read_bytes <= fewest * 1.001 else "near the least"
    if merges == 0:
        return f"{best.spec} wins: {reads}, {least}, and no collective at all"
    together = max(c.sizes["data"] * c.sizes["kv"] for c in candidates)
    return (
        f"{best.spec} wins: {reads}, {least}. Sequences and KV heads divide over {together} of the "
        f"{plan.split.mesh.size} devices, so contexts have to be split as well, and the fewer ways "
        f"the better: this merge takes {merges * 1e6:.3g} us"
    )
