"""One place that starts `jax.distributed`: call `initialize()` first thing, on one host or many.

    from launch import bootstrap

    processes = bootstrap.initialize()
    mesh = meshes.make("data=2,context=4", processes.devices())

Who the processes are comes from the environment: from `SHARDPAGE_*`, which `shardpage simulate`
sets and anyone may, or else from what JAX knows to detect: Slurm, Open MPI, GKE, TPU VMs. Alone,
nothing is started.
"""

import dataclasses
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import guard
from .notes import Notes

PREFIX = "SHARDPAGE_"

# A server suffers from waiting for what will not come; a slow host is up in a few minutes.
SHUTDOWN_TIMEOUT = 15.0

_MOST = 10**8  # of anything counted, and three years in seconds: what all clocks and servers take


@dataclasses.dataclass(frozen=True)
class Settings:
    """Each comes from the environment variable SHARDPAGE_NAME; times are in seconds."""

    coordinator: str | None = None  # HOST:PORT of rank 0
    num_processes: int | None = None
    process_id: int | None = None  # which of them this is, from 0
    bind: str | None = None  # HOST:PORT where rank 0 listens; default all of its addresses
    devices_per_process: int | None = None  # simulate this many CPU devices in each process
    start_timeout: float = 300.0  # until all processes must have come
    heartbeat_timeout: float = 30.0  # after which a silent process counts as dead
    step_timeout: float = 600.0  # that a step may take; 0 for any time
    grace: float = 5.0  # from SIGTERM to the end of a process that is stuck
    preemption_service: bool = False  # leave SIGTERM to JAX's preemption service
    notes: str | None = None  # a folder where a supervisor reads how the processes are doing
    attempt: int = 0  # how often the job has been started again
    mesh: str | None = None  # what `shardpage simulate --mesh` asks for

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Settings":
        """Reads them from environment variables.

        Raises:
          ValueError: naming the variable that is no number, out of range, or missing beside others.
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = environ.get(PREFIX + field.name.upper())
            if text:  # an empty one, as a manifest may set it, is none
                found[field.name] = _parse(field.name, field.type, text)
        settings = cls(**found)
        identity = ("coordinator", "num_processes", "process_id")
        missing = [name for name in identity if getattr(settings, name) is None]
        if missing and len(missing) < len(identity):
            names = " and ".join(PREFIX + name.upper() for name in missing)
            raise ValueError(
                f"{names} must be set too: SHARDPAGE_COORDINATOR, _NUM_PROCESSES and _PROCESS_ID "
                f"go together; unset all three to let JAX detect the cluster"
            )
        if not missing:
            settings._check_identity()
        return settings

    def _check_identity(self) -> None:
        assert self.num_processes is not None
        assert self.process_id is not None
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"SHARDPAGE_PROCESS_ID={self.process_id} must be from 0 to "
                f"{self.num_processes - 1}: SHARDPAGE_NUM_PROCESSES is {self.num_processes}"
            )


def _parse(name: str, kind: Any, text: str) -> Any:
    refuse = lambda rule: ValueError(f"{PREFIX}{name.upper()}={text!r} must be {rule}")
    if name in ("coordinator", "bind"):
        address = re.fullmatch(r"\S+:([0-9]{1,5})", text)
        if address is None or int(address[1]) >= 2**16:
            raise refuse("HOST:PORT, the port up to 65535")
        return text
    if kind is bool:
        return text != "0"
    number = next((number for number in (int, float) if kind in (number, number | None)), None)
    if number is None:
        return text
    least = int(name in ("num_processes", "devices_per_process"))
    what = "a whole number" if number is int else "a number of seconds"
    try:
        value = number(text)
    except ValueError:
        raise refuse(what) from None
    if not least <= value <= _MOST:  # not NaN either
        raise refuse(f"{what} from {least} to {_MOST}")
    return value


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who this process is.

    Attributes:
      rank: its number, from 0.
      count: how many there are.
      devices_per_process: how many devices each of them simulates; None for real ones.
      attempt: how often this job has been started again.
    """

    rank: int = 0
    count: int = 1
    devices_per_process: int | None = None
    attempt: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0

    def devices(self) -> list[Any]:
        """The devices of all processes, those of a process side by side. Starts JAX's backend."""
        import jax

        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        if self.devices_per_process is None:
            return devices
        of = [[d for d in devices if d.process_index == rank] for rank in range(self.count)]
        return [device for mine in of for device in mine[: self.devices_per_process]]


_processes: Processes | None = None


def initialize(*, spare_cpu_devices: bool = False) -> Processes:
    """Starts `jax.distributed` if there are several processes, and guards this one.

    Before the first array or `jax.devices()`. The same in every process; a second call returns what
    the first did. Rank 0 says on standard error who they are.

    Args:
      spare_cpu_devices: in simulation, have twice the devices and leave half of them idle; see
        `launch.devices.open_mesh`.

    Returns:
      Who this process is.

    Raises:
      ValueError: if the settings contradict each other.
      RuntimeError: if JAX has already started a backend.
    """
    global _processes
    if _processes is None:
        _processes = _start(Settings.read(os.environ), spare_cpu_devices)
    return _processes


def _start(settings: Settings, spare_cpu_devices: bool) -> Processes:
    explicit = settings.coordinator is not None
    cluster = "SHARDPAGE_*" if explicit else detect(os.environ)
    if cluster is None or settings.num_processes == 1:
        _simulate(settings, spare_cpu_devices)
        return Processes(0, 1, settings.devices_per_process, settings.attempt)

    import jax

    config: Any = jax.config  # its options are attributes that type checkers do not see
    # The service swallows SIGTERM, and tells only those who ask.
    config.update("jax_enable_preemption_service", settings.preemption_service)
    _simulate(settings, spare_cpu_devices)
    rank = settings.process_id if explicit else -1
    assert rank is not None
    notes = Notes(settings.notes, rank)
    step_timeout = settings.step_timeout or None
    guard.install(rank, notes, step_timeout=step_timeout, grace_seconds=settings.grace)
    notes.state("joining")
    with guard.within(settings.start_timeout, _late(settings)):
        _connect(settings, explicit)
    notes.state("joined")

    from . import coordination

    rank, count = coordination.rank_and_count()
    guard.set_rank(rank)
    if rank == 0:
        where = settings.coordinator or f"{socket.gethostname()}, found through {cluster}"
        print(f"rank 0 of {count} processes; coordinator {where}", file=sys.stderr, flush=True)
    if PREFIX + "STEP_TIMEOUT" in os.environ:
        guard.start_clock()
    return Processes(rank, count, settings.devices_per_process, settings.attempt)


def _connect(settings: Settings, explicit: bool) -> None:
    import jax

    identity: dict[str, Any] = {}
    if explicit:
        identity = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "coordinator_bind_address": settings.bind,
            "cluster_detection_method": "deactivate",  # else it looks for what is not given here
        }
    jax.distributed.initialize(
        **identity,
        # longer than the guard's, which ends with words instead of an abort
        initialization_timeout=int(settings.start_timeout) + 60,
        heartbeat_timeout_seconds=max(int(settings.heartbeat_timeout), 1),
        shutdown_timeout_seconds=int(SHUTDOWN_TIMEOUT),
    )


def _simulate(settings: Settings, spare_cpu_devices: bool) -> None:
    if settings.devices_per_process is not None:
        import meshes

        meshes.simulate(settings.devices_per_process * (1 + spare_cpu_devices))


def _late(settings: Settings) -> str:
    """What to say if not all processes come."""
    late = f"not all processes came within {settings.start_timeout:g} s"
    if settings.process_id == 0 or settings.coordinator is None:
        return (
            f"{late}: was the job started on every host? Each one's log shows how far it came; the "
            f"port of rank 0 must be open between hosts (shardpage doctor)"
        )
    return (
        f"{late}: {settings.coordinator} must be rank 0's address, reachable from here, and every "
        f"other rank started"
    )


def detect(environ: Mapping[str, str]) -> str | None:
    """The cluster that JAX's own detection would find, if it has more than one process.

    Slurm's variables count only if they are complete: an ssh into an allocation leaves some of
    them, and no step to belong to.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm):
        return "Slurm" if environ["SLURM_NTASKS"] != "1" else None
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "Open MPI" if environ["OMPI_COMM_WORLD_SIZE"] != "1" else None
    if has_tpu(environ):
        hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        if hosts is None:
            return "the metadata of this TPU VM"
        return "GKE" if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ else None
    return None


def has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX would use TPU chips of this machine, judged without waking them."""
    platforms = environ.get("JAX_PLATFORMS", "")
    allowed = not platforms or "tpu" in platforms.split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return allowed and bool(chips) and importlib.util.find_spec("libtpu") is not None
