"""What `shardpage plan` answers: a report on one mesh, or on all that are legal."""

from collections.abc import Callable

from jax.sharding import Mesh

from . import report
from .compile import DoesNotFitError
from .estimate import Pod, confirm_largest_batch, estimate, shrink_to_fit
from .report import Report
from .search import search
from .workload import Workload

Progress = Callable[[str], None]


def one_mesh(
    work: Workload, pod: Pod, spec: str, *, confirm: bool, issue: bool, progress: Progress
) -> Report:
    """Reports on one mesh, with its largest batch (to `confirm`, compiled), and a better mesh.

    Raises:
      ValueError: if they do not go together; RuntimeError without libtpu.
    """
    mesh = pod.mesh(spec)
    progress(f"compiling {spec}")
    try:
        bounds = estimate(work, mesh, reserved_bytes=pod.reserved_bytes, issue=issue)
    except DoesNotFitError as error:
        too_little = f"too little HBM even for one layer on mesh {spec} ({error})"
        return Report("", misfit=f"{too_little}; {_room(work, pod, mesh)}")
    largest = None
    if confirm and bounds.memory.fits is not None:
        progress("compiling the largest batch")
        largest = confirm_largest_batch(bounds)
    others = search(work, pod, issue=issue, most=1, progress=progress) if bounds.times else []
    return report.on_one(spec, bounds, largest, others)


def all_meshes(
    work: Workload, pod: Pod, *, issue: bool, most: int | None, compare: bool, progress: Progress
) -> Report:
    """Ranks meshes, and reports on the best; see `search` for the arguments.

    Raises:
      ValueError: if none is legal, or times are not known; RuntimeError without libtpu.
    """
    candidates = search(work, pod, issue=issue, most=most, compare=compare, progress=progress)
    best = candidates[0]
    if best.bounds is not None:
        return report.on_all(candidates, best.bounds)
    room = _room(work, pod, pod.mesh(best.spec))
    misfit = f"no mesh works; {best.spec}: {best.refused or 'not compiled'}; {room}"
    return Report(report.ranking(candidates), misfit=misfit)


def _room(work: Workload, pod: Pod, mesh: Mesh) -> str:
    """What fits of a workload of which not even one layer compiles."""
    smaller = shrink_to_fit(work, mesh, reserved_bytes=pod.reserved_bytes)
    return (
        f"it holds at most {smaller.largest_batch} sequences of {smaller.workload.context} tokens"
    )
