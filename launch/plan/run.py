"""What `shardpage plan` does with its options: plan one mesh or search all, print, write files."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh

import meshes

from . import growth, report
from .compiled import DoesNotFitError
from .estimate import Device, Plan, confirm_largest_batch, make_plan, shrink_to_fit
from .search import Candidate, search, why
from .workload import Workload


class NotEnoughMemoryError(Exception):
    """The workload does not fit; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      work: the model and its sequences.
      topology: a TPU slice to compile for; else
      simulate: so many CPU devices; else the devices that are there.
      slices: how many of those slices, or parts of the simulated devices.
      mesh: the axes to plan; None to search.
      reserved_bytes: of each device, left alone.
      confirm: compile the largest batch as well.
      issue: read the kernel's schedule as well.
      most: compile at most so many meshes of a search.
      json_file, png: where to write, if anywhere.
    """

    work: Workload
    topology: str | None = None
    simulate: int | None = None
    slices: int = 1
    mesh: str | None = None
    reserved_bytes: int = 0
    confirm: bool = True
    issue: bool = True
    most: int | None = None
    json_file: pathlib.Path | None = None
    png: pathlib.Path | None = None

    def make_mesh(self, spec: str) -> Mesh:
        """A mesh over all the devices asked for."""
        if self.topology is not None:
            jax.config.update("jax_platforms", "cpu")  # compiling needs no TPU: leave it alone
            return meshes.topology(self.topology, spec, num_slices=self.slices)
        if self.simulate is not None:
            return meshes.simulate(self.simulate, spec, num_slices=self.slices)
        return meshes.make(spec)


def run(request: Request) -> None:
    """Plans, prints, writes.

    Raises:
      ValueError: if the request makes no sense; RuntimeError without libtpu.
      NotEnoughMemoryError: after everything was printed.
    """
    request.work.checked()
    if request.topology is not None and request.simulate is not None:
        raise ValueError("give --topology or --simulate, not both")
    if request.mesh is None:
        _search(request)
    else:
        _one(request, request.mesh)


def run_growth(json_file: pathlib.Path | None, backend: str | None) -> None:
    """Prints the table of how cost grows."""
    jax.config.update("jax_platforms", "cpu")
    rows = growth.measure(backend=backend, progress=_progress)
    print(growth.as_markdown(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def _one(request: Request, spec: str) -> None:
    """Reports one mesh, and a better one if there is."""
    work, mesh = request.work, request.make_mesh(spec)
    _progress(f"compiling {spec}")
    try:
        plan = make_plan(work, mesh, reserved_bytes=request.reserved_bytes, issue=request.issue)
    except DoesNotFitError as error:
        raise NotEnoughMemoryError(
            f"too little HBM even for one layer on mesh {spec} ({error}); {_room(request, mesh)}"
        ) from None
    largest = None
    if request.confirm and plan.memory.fits is not None:
        _progress("compiling the largest batch")
        largest = confirm_largest_batch(plan)
    candidates = _candidates(dataclasses.replace(request, most=1))
    better = _better(plan, candidates) or f"No mesh was found that bounds a step lower than {spec}."
    print(f"{report.describe(plan, largest)}\n\n{better}", flush=True)
    found = report.as_json(plan) | {"confirmed_largest_batch": largest, "better": better}
    others = [c.plan for c in candidates if c.plan and c.plan.split.spec != plan.split.spec]
    _save(request, found, [plan, *others])
    if plan.memory.fits is False:
        raise NotEnoughMemoryError(
            f"{work.batch} sequences of {work.context} tokens do not fit mesh {spec}: "
            f"{report.size(plan.memory.total)} of {report.size(plan.memory.limit)}; "
            f"{report.room(plan, largest)}"
        )


def _search(request: Request) -> None:
    """Ranks meshes, and reports the best."""
    candidates = _candidates(request)
    if not candidates:
        raise ValueError(
            "a search needs the rates of the devices, which are known for TPUs only: give "
            "--topology, or --mesh to plan one mesh"
        )
    print(report.ranking(candidates))
    best = candidates[0]
    if best.plan is None:
        why_not = best.refused or "not compiled"
        room = _room(request, request.make_mesh(best.spec))
        raise NotEnoughMemoryError(f"no mesh works; {best.spec}: {why_not}; {room}")
    reason = why(best, candidates)
    print(f"\n{reason}.\n\n{report.describe(best.plan, None)}", flush=True)
    ranking = [
        {
            "mesh": candidate.spec,
            "least_seconds": candidate.bound_s,
            "compiled": candidate.plan is not None,
            "fits": candidate.plan.memory.fits if candidate.plan else None,
            "refused": candidate.refused,
        }
        for candidate in candidates
    ]
    found = {"best": report.as_json(best.plan), "why": reason, "ranking": ranking}
    _save(request, found, [c.plan for c in candidates if c.plan])
    if not best.plan.memory.fits:
        raise NotEnoughMemoryError(f"no mesh has enough HBM; {best.spec}: {report.room(best.plan)}")


def _candidates(request: Request) -> list[Candidate]:
    """A search; nothing where the rates of the devices are not known."""
    devices = request.make_mesh("data=-1")
    device = Device.of(devices)
    if device.hbm_rate is None:
        return []
    return search(
        request.work,
        request.make_mesh,
        devices.size,
        request.slices,
        device,
        reserved_bytes=request.reserved_bytes,
        issue=request.issue,
        most=request.most,
        compare=request.png is not None and request.mesh is None,
        progress=_progress,
    )


def _better(plan: Plan, candidates: list[Candidate]) -> str | None:
    """A sentence about a mesh that is better than the planned one, if a compiled one is."""
    best = candidates[0].plan if candidates else None
    if best is None or best.times is None or plan.times is None or not best.memory.fits:
        return None
    if plan.memory.fits and best.times.total >= 0.999 * plan.times.total:
        return None
    return (
        f"A better mesh: {best.split.spec}, at least {report.duration(best.times.total)} a step "
        f"instead of {report.duration(plan.times.total)}, with "
        f"{report.size(best.memory.total)} on each device; --search compares all."
    )


def _room(request: Request, mesh: Mesh) -> str:
    """What fits of a workload of which not even one layer compiles."""
    smaller = shrink_to_fit(request.work, mesh, reserved_bytes=request.reserved_bytes)
    return (
        f"it holds at most {smaller.largest_batch} sequences of {smaller.workload.context} tokens"
    )


def _save(request: Request, found: dict[str, Any], plans: list[Plan]) -> None:
    if request.json_file is not None:
        request.json_file.write_text(json.dumps(found, indent=2) + "\n")
    if request.png is not None:
        from . import picture

        work, mesh = plans[0].workload, plans[0].split.mesh
        title = f"{work.model.name}, {work.batch} x {work.context} tokens"
        picture.draw(plans[:16], request.png, f"{title} on {mesh.size} {plans[0].device.kind}")


def _progress(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)
