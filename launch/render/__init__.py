"""Scripts and manifests for a job on a named slice. The files in `launch/` are made by these."""

from collections.abc import Callable

from meshes import PodSlice

from .job import Job as Job
from .kubernetes import inner_job as inner_job
from .kubernetes import jobset as jobset
from .kubernetes import manifest as manifest
from .shell import gcloud, local, mpirun, slurm

RENDERERS: dict[str, Callable[[Job], str]] = {
    "slurm": slurm,
    "jobset": jobset,
    "gcloud": gcloud,
    "mpirun": mpirun,
    "local": local,
}
DEFAULT_SLICE, DEFAULT_MESH = "v5p:2x2x2", "data=2,context=4"
# The files in launch/ that are what a renderer makes of the default job.
FILES = {
    "local.sh": "local",
    "slurm.sbatch": "slurm",
    "jobset.yaml": "jobset",
    "tpu_vm.sh": "gcloud",
}


def default_job() -> Job:
    """The job of the files in launch/."""
    return Job(PodSlice.parse(DEFAULT_SLICE), mesh=DEFAULT_MESH)
