"""What to run where: the input of every renderer."""

import dataclasses
import functools
import importlib.resources
import math
import re
import shlex
import tomllib

from meshes import PodSlice

from ..processes import JOBS

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Characters that a host, an image or a zone may have: quoting would not make others right.
_PLAIN = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.:/@\[\]]*")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job for a named slice.

    Attributes:
      pod: the slice.
      words: what each process runs: a job of shardpage and its options, or any command.
      num_slices: how many such slices.
      mesh: the mesh over all devices, which the job reads from SHARDPAGE_MESH.
      name: of the job; letters, digits and hyphens, as Kubernetes and Slurm both allow.
      max_restarts: how often to start again after a failure.
      image: of the container, for GKE.
      zone: for gcloud.
      hosts: for mpirun.
    """

    pod: PodSlice
    words: tuple[str, ...] = ("verify",)
    num_slices: int = 1
    mesh: str | None = None
    name: str = "shardpage"
    max_restarts: int = 3
    image: str = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/shardpage:latest"
    zone: str = "ZONE"
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be of lower-case letters, digits and hyphens, begin with "
                f"a letter, and have at most 40 of them"
            )
        for what, value in (
            ("image", self.image),
            ("zone", self.zone),
            *(("host", host) for host in self.hosts),
        ):
            if not _PLAIN.fullmatch(value):
                raise ValueError(f"{what} {value!r} has characters that no {what} has")
        if not self.words or not all(self.words):
            raise ValueError("there is nothing to run; give a job after --, such as -- verify")
        if self.hosts and len(self.hosts) != self.num_hosts:
            raise ValueError(
                f"{len(self.hosts)} hosts for {self.slices_text}, which has {self.num_hosts}; "
                f"name each of them once"
            )

    @property
    def chips_per_host(self) -> int:
        """Chips that one process drives."""
        return min(math.prod(self.pod.chip.host), self.pod.num_chips)

    @property
    def hosts_per_slice(self) -> int:
        """Host machines per slice; each runs one process."""
        return self.pod.num_chips // self.chips_per_host

    @property
    def num_hosts(self) -> int:
        """All processes."""
        return self.hosts_per_slice * self.num_slices

    @property
    def devices_per_process(self) -> int:
        """What jax.local_device_count() says."""
        return self.chips_per_host * self.pod.chip.devices

    @property
    def slices_text(self) -> str:
        """The slices in words."""
        several = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        plural = "s" if self.num_hosts > 1 else ""
        return (
            f"{several}{self.pod}: {self.num_hosts} host{plural} of {self.chips_per_host} chips, "
            f"{self.num_hosts * self.devices_per_process} devices"
        )

    @property
    def command(self) -> list[str]:
        """What each process runs, in full."""
        return ["shardpage", *self.words] if self.words[0] in JOBS else list(self.words)

    @property
    def command_line(self) -> str:
        """The same for a shell, quoted."""
        return shlex.join(self.command)

    @property
    def machine(self) -> dict[str, str]:
        """How Google Cloud calls it; see machines.toml."""
        return _machines()[self.pod.chip.name]


@functools.cache
def _machines() -> dict[str, dict[str, str]]:
    text = importlib.resources.files("launch.render").joinpath("machines.toml").read_text()
    return tomllib.loads(text)
