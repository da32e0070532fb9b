"""The environment of a rank: the supervisor's, without what belongs to other runs or clusters."""

import dataclasses
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from ..bootstrap import PREFIX, Settings

# Left over from another job, or from the cluster on which this is only a simulation, these would
# send JAX or libtpu looking for machines that are not part of this run.
_STALE = (
    "MEGASCALE_",
    "JAX_COORDINATOR_",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_NUM_CPU_DEVICES",
    "TPU_WORKER_",
    "TPU_PROCESS_",
    "CLOUD_TPU_TASK_ID",
    "SLURM_",
    "OMPI_",
    "PMI_",
    "PMIX_",
)
_OURS = tuple(PREFIX + field.name.upper() for field in dataclasses.fields(Settings))
_NEVER = ("NPROC",)  # XLA's threads, for as many devices as the supervisor's own process may have
_FORCED_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\S*\s*")


def stale_names(environ: Mapping[str, str]) -> list[str]:
    """The variables of `environ` that a rank must not inherit."""
    return [name for name in environ if name.startswith(_STALE) or name in _OURS + _NEVER]


def rank_environment(environ: Mapping[str, str], settings: Mapping[str, object]) -> dict[str, str]:
    """What a simulated rank gets.

    Args:
      environ: the supervisor's environment.
      settings: values by the name of a field of `launch.bootstrap.Settings`; None leaves one out.
    """
    stale = set(stale_names(environ))
    clean = {name: value for name, value in environ.items() if name not in stale}
    if "XLA_FLAGS" in clean:
        clean["XLA_FLAGS"] = _FORCED_DEVICES.sub("", clean["XLA_FLAGS"])
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).parents[3])  # so that a script anywhere can import this package
    if "site-packages" not in root:
        inherited = clean.get("PYTHONPATH")
        clean["PYTHONPATH"] = root if not inherited else f"{root}{os.pathsep}{inherited}"
    given = {name: value for name, value in settings.items() if value is not None}
    return clean | {PREFIX + name.upper(): str(value) for name, value in given.items()}


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
