"""All legal meshes for a workload, best first."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import meshes

from .bound import Bounds, Device, quick_bound
from .estimate import Pod, estimate
from .workload import Workload

TIE = 1.02  # bounds this near to each other are as good as equal


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the bound from its shapes, and all bounds if it was worth compiling.

    Attributes:
      spec: the axes as text.
      sizes: the same, with all three axes.
      quick_s: the bound from shapes alone, seconds.
      bounds: what follows from compiling it.
      refused: why compiling it failed: memory, or a limit of the backend.
    """

    spec: str
    sizes: dict[str, int]
    quick_s: float
    bounds: Bounds | None = None
    refused: str | None = None

    @property
    def least_s(self) -> float:
        """The best bound on time that there is, seconds."""
        times = self.bounds.times if self.bounds else None
        return times.total if times else self.quick_s

    @property
    def fits(self) -> bool:
        """Whether it may fit: False if it was compiled and does not, or could not be."""
        return self.refused is None and (
            self.bounds is None or self.bounds.memory.fits is not False
        )


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """What fits first, then what was compiled, then by the bound on time.

    Of those within 2 % of the best, what splits context least comes first (a merge costs latency,
    which no bound counts), then what splits heads most (that splits the weights as well).
    """
    ordered = sorted(candidates, key=lambda c: (not c.fits, c.bounds is None, c.least_s))
    if not ordered:
        return []
    best = ordered[0]
    ties = [
        c
        for c in ordered
        if (c.fits, c.bounds is None) == (best.fits, best.bounds is None)
        and c.least_s <= TIE * best.least_s
    ]
    ties.sort(key=lambda c: (c.sizes["context"], -c.sizes["kv"]))
    return ties + [c for c in ordered if c not in ties]


def search(
    workload: Workload,
    pod: Pod,
    *,
    issue: bool = True,
    most: int | None = None,
    compare: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Candidate]:
    """Ranks the meshes of axes data, context and kv that hold a workload, best first.

    Candidates are compiled in the order of the bound from their shapes. Once that bound exceeds
    the best compiled time by more than a tie, no later one can win, and the rest keep it as their
    only figure.

    Args:
      workload, pod: what is asked; slices of the pod go to `data`.
      issue: see `estimate`.
      most: compile no more than this many.
      compare: also compile the likeliest mesh of every size of `context`, to be drawn.
      progress: told about each compilation.

    Raises:
      ValueError: if no mesh is legal, or the rates of the devices are not known.
    """
    devices = pod.mesh("data=-1")
    device = Device.of(devices)
    if device.chip is None:
        raise ValueError(
            "a search needs the rates of the devices, which are known for TPUs only: give "
            "--topology, or --mesh to plan one mesh"
        )
    candidates = ranked(
        Candidate(spec, sizes, quick_bound(workload, sizes, device))
        for spec, sizes in legal(workload, devices.size, pod.num_slices)
    )
    if not candidates:
        raise ValueError(
            f"no mesh of data, context and kv splits {workload.batch} sequences and "
            f"{workload.model.num_kv_heads} KV heads over {devices.size} devices in "
            f"{pod.num_slices} slices: make the batch a multiple of {pod.num_slices}"
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
            candidate = _compiled(candidate, workload, pod, issue)
            if candidate.bounds and candidate.bounds.memory.fits:
                best = min(best, candidate.least_s)
        done.append(candidate)
    return ranked(done)


def _compiled(candidate: Candidate, workload: Workload, pod: Pod, issue: bool) -> Candidate:
    try:
        mesh = pod.mesh(candidate.spec)
        bounds = estimate(workload, mesh, reserved_bytes=pod.reserved_bytes, issue=issue)
        return dataclasses.replace(candidate, bounds=bounds)
    except (ValueError, NotImplementedError) as error:
        return dataclasses.replace(candidate, refused=str(error))


def legal(
    workload: Workload, num_devices: int, num_slices: int = 1
) -> Iterator[tuple[str, dict[str, int]]]:
    """All specs whose axes divide the batch and the KV heads, none with an axis for nothing."""
    for data, context, kv in meshes.factorings(num_devices, 3):
        fits = workload.batch % data == 0 and workload.model.num_kv_heads % kv == 0
        if not fits or data % num_slices or context > workload.pages_per_seq:
            continue
        sizes = {"data": data, "context": context, "kv": kv}
        named = [f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "data"]
        yield ",".join(named), sizes
