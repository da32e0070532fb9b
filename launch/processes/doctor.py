"""What can be wrong with a host before a run, found without disturbing what runs on it.

Values of environment variables are shown only where they are settings of launchers, without what
looks like a secret.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from . import bootstrap
from .supervisor.environment import stale_names

COORDINATOR_PORT = 8482
LOCK_FILE = "libtpu_lockfile"
PACKAGES = ("shardpage", "jax", "jaxlib", "libtpu", "numpy")
_SECRET = re.compile(r"key|token|secret|pass|pwd|credential|auth|signature", re.IGNORECASE)
_MARK = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
      kind: "ok", a "note" that may matter, or a "problem" that will.
      text: what is so.
      cure: what to do about it.
    """

    kind: Literal["ok", "note", "problem"]
    text: str
    cure: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether a run would fail."""
        return self.kind == "problem"

    def __str__(self) -> str:
        return f"{_MARK[self.kind]}  {self.text}" + (f"\n      -> {self.cure}" if self.cure else "")


def examine(
    *,
    mesh: str | None = None,
    num_devices: int | None = None,
    across: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """Examines everything.

    Args:
      mesh: a mesh that should fit all devices.
      num_devices: devices that this host should have.
      across: join the other processes first, and compare with them.
      environ: the environment.
    """
    yield from versions()
    yield from settings(environ)
    yield from slurm(environ)
    yield from stale(environ)
    yield from coordinator_port(environ)
    yield from lock_file(Path(environ.get("TPU_LOAD_LIBRARY_LOCK", tempfile.gettempdir())))
    holders = list(chip_holders())
    yield from holders
    if any(holder.is_problem for holder in holders):
        yield Finding("note", "devices not counted: that would fail while others hold them")
        return
    yield from backend(mesh, num_devices, across)


def versions() -> Iterator[Finding]:
    """The packages that matter, and that jax and jaxlib are a pair."""
    found = installed()
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    yield Finding("ok", f"{text}, Python {platform.python_version()}")
    if found["jax"] != found["jaxlib"]:
        yield Finding(
            "problem",
            f"jax {found['jax']} with jaxlib {found['jaxlib']}",
            f"install the pair: pip install jax=={found['jax']} jaxlib=={found['jax']}",
        )


def installed() -> dict[str, str | None]:
    """Versions by package; None if it is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The project's own variables."""
    try:
        found = bootstrap.Settings.read(environ)
    except ValueError as error:
        yield Finding("problem", str(error), "correct or unset them")
        return
    if found.coordinator is not None:
        who = f"rank {found.process_id} of {found.num_processes}, coordinator {found.coordinator}"
        yield Finding("ok", f"SHARDPAGE_* makes this {who}")
    else:
        cluster = bootstrap.detect(environ)
        yield Finding("ok", f"processes found through {cluster}" if cluster else "one process")


def slurm(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Half of Slurm's variables, as a shell inside an allocation has them."""
    step = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    missing = [name for name in step if name not in environ]
    if "SLURM_JOB_ID" in environ and missing:
        yield Finding(
            "note",
            f"in Slurm job {environ['SLURM_JOB_ID']}, but in no step of it: no {missing[0]}",
            "a run from here is one process alone; start it with srun",
        )


def stale(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables of multi-slice runs and coordinators that outlived their run."""
    in_cluster = "KUBERNETES_SERVICE_HOST" in environ
    prefixes = ("MEGASCALE_", "JAX_COORDINATOR_", "JAX_PARTITION_")
    names = [name for name in stale_names(environ) if name.startswith(prefixes)]
    if names and not in_cluster:
        shown = ", ".join(f"{name}={_shown(name, environ[name])}" for name in sorted(names))
        yield Finding(
            "note",
            f"set by hand or left by an earlier run: {shown}",
            f"unless they are meant: unset {' '.join(sorted(names))}. After a preemption they name "
            f"machines that are gone, and JAX waits for those",
        )
    proxies = sorted(name for name in environ if name.lower() in ("http_proxy", "https_proxy"))
    if proxies:
        yield Finding(
            "note",
            f"{' and '.join(proxies)} set",
            "gRPC may send the coordinator's traffic there: add the hosts to no_proxy",
        )


def _shown(name: str, value: str) -> str:
    _, credentials, host = value.rpartition("@")  # as in https://user:password@host
    *named, _ = host.split("=")  # as in https://host/?token=...
    if any(map(_SECRET.search, [name, *named])):
        return "(not shown)"
    return f"(not shown)@{host!r}" if credentials else repr(value)


def coordinator_port(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether rank 0 could listen, or another rank reach it."""
    try:
        found = bootstrap.Settings.read(environ)
    except ValueError:
        return
    address, rank = found.coordinator, found.process_id
    port = int(address.rsplit(":", 1)[1]) if address else COORDINATOR_PORT
    if address is not None and rank:
        host = address.rsplit(":", 1)[0].strip("[]")
        try:
            socket.create_connection((host, port), timeout=3).close()
            yield Finding("ok", f"rank 0 answers at {address}")
        except OSError as error:
            yield Finding(
                "note",
                f"nothing answers at {address} ({error})",
                f"fine if rank 0 has not started; else open TCP port {port} between the hosts",
            )
        return
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield Finding(
                "problem",
                f"port {port} of the coordinator is taken ({error.strerror})",
                f"end the run that has it (ss -ltnp 'sport = :{port}'), or set "
                f"JAX_COORDINATOR_PORT or SHARDPAGE_COORDINATOR to another one on all hosts",
            )
        else:
            yield Finding("ok", f"port {port} of the coordinator is free")


def lock_file(folder: Path) -> Iterator[Finding]:
    """The file by which libtpu keeps a second process away, left by one that was killed."""
    path = folder / LOCK_FILE
    if not path.exists():
        return
    owner = path.stat().st_uid
    if owner != os.getuid() and not os.access(path, os.W_OK):
        yield Finding(
            "problem",
            f"{path} belongs to user {owner}: libtpu will refuse to start",
            f"if no process uses the TPU: sudo rm {path}",
        )
    else:
        yield Finding(
            "note", f"{path} exists", "harmless while nobody holds the chips; else end that process"
        )


def chip_holders(
    proc: Path = Path("/proc"), patterns: tuple[str, ...] = ("/dev/accel", "/dev/vfio/")
) -> Iterator[Finding]:
    """Processes that hold the chips: one at a time may."""
    for process in sorted(proc.glob("[0-9]*")):
        if int(process.name) == os.getpid():
            continue
        held = set()
        try:
            for descriptor in (process / "fd").iterdir():
                target = os.readlink(descriptor)
                if target.startswith(patterns):
                    held.add(target)
            name = (process / "comm").read_text().strip()
        except OSError:  # it has ended, or is another user's
            continue
        if held:
            yield Finding(
                "problem",
                f"process {process.name} ({name}) holds {', '.join(sorted(held))}",
                f"wait for it, or end it: kill {process.name}",
            )


def backend(mesh: str | None, num_devices: int | None, across: bool) -> Iterator[Finding]:
    """Starts JAX: the devices, whether a mesh fits them, and what the other hosts have."""
    import jax

    import meshes

    processes = bootstrap.initialize() if across else bootstrap.Processes()
    if across and processes.count == 1:
        yield Finding("note", "--across, but there is one process", "start it on all hosts at once")
    try:
        local = jax.local_devices()
    except RuntimeError as error:
        yield Finding("problem", f"JAX finds no devices: {error}", "see JAX_PLATFORMS and libtpu")
        return
    kind = local[0].device_kind
    yield Finding("ok", f"{len(local)} {kind} device(s) here, {jax.device_count()} in all")
    if num_devices is not None and len(local) != num_devices:
        yield Finding(
            "problem",
            f"{len(local)} {kind} device(s), not {num_devices}",
            "a chip is missing: restart the VM, or ask for another"
            if local[0].platform == "tpu"
            else "JAX does not use the TPU: is libtpu installed, JAX_PLATFORMS unset?",
        )
    if mesh is not None and (across or processes.count == 1):
        try:
            found = meshes.make(mesh, processes.devices())
            yield Finding("ok", f"mesh {mesh} fits {found.size} devices")
        except ValueError as error:
            yield Finding("problem", str(error), "choose one of those")
    if processes.count > 1:
        yield from compare(processes)


def compare(processes: bootstrap.Processes) -> Iterator[Finding]:
    """Whether all hosts run the same versions."""
    import numpy as np
    from jax.experimental import multihost_utils

    text = " ".join(f"{name}={version}" for name, version in installed().items())
    own = np.frombuffer(text.encode().ljust(512)[:512], np.uint8)
    everyone: Any = multihost_utils.process_allgather(own)
    texts = [bytes(row).decode().strip() for row in everyone]
    if len(set(texts)) == 1:
        yield Finding("ok", f"the same versions on all {processes.count} hosts")
        return
    for rank, other in enumerate(texts):
        if other != text:
            yield Finding(
                "problem",
                f"rank {rank} has {other}; here is {text}",
                "install the same versions on all hosts",
            )
