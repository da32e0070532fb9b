"""Shell scripts: Slurm, TPU VMs through gcloud, mpirun, and this machine.

What a user passes in stands quoted by `shlex` in an assignment or as a whole command, nowhere else.
"""

import contextlib
import shlex

from meshes import PodSlice

from .job import Job


def slurm(job: Job) -> str:
    """A batch script for sbatch."""
    return f"""\
#!/usr/bin/env bash
# shardpage on {job.slices_text}, under Slurm.
#
#   sbatch slurm.sbatch      then: tail -f {job.name}-JOBID.log
#
# One process per host. srun tells each of them who it is, and JAX reads that by itself. If one
# fails, srun ends the others. SHARDPAGE_COORDINATOR and the like, if set, would win over Slurm.
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.num_hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
set -uo pipefail
{_mesh(job)}
# How often Slurm has started this job again: generate then keeps the answers that it has.
export SHARDPAGE_ATTEMPT=${{SLURM_RESTART_COUNT:-0}}

# --kill-on-bad-exit ends all when one fails; --wait does so when one has ended and others linger.
srun --kill-on-bad-exit=1 --wait=60 --label \\
  {job.command_line}
code=$?

# 2 is a mistake in the command: again would be the same. After a failure the whole job goes back to
# the queue, up to {job.max_restarts} times; there is no elastic resize.
if ((code != 0 && code != 2 && SHARDPAGE_ATTEMPT < {job.max_restarts})); then
  echo "exit code $code: back to the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def gcloud(job: Job) -> str:
    """A script around TPU VMs: create, install, run, delete.

    Raises:
      ValueError: for several slices, and generations that only GKE has.
    """
    if job.num_slices > 1:
        raise ValueError("several slices of TPU VMs need queued resources; use render jobset")
    if "runtime" not in job.machine:
        raise ValueError(f"{job.pod.chip.name} has no TPU VMs; use render jobset")
    remote = f"{_mesh(job)}\n{job.command_line}" if job.mesh else job.command_line
    return f"""\
#!/usr/bin/env bash
# shardpage on {job.slices_text}, on TPU VMs.
#
#   bash tpu_vm.sh create     costs money from here on
#   bash tpu_vm.sh install    this folder's project to every host; again after a change
#   bash tpu_vm.sh doctor     is every host ready?
#   bash tpu_vm.sh run        the job, on all hosts at once
#   bash tpu_vm.sh delete     costs end
#
# The project of gcloud is that of `gcloud config get project`.
set -euo pipefail
name={shlex.quote(job.name)}
zone={shlex.quote(job.zone)}

# On all hosts at the same time: started on one alone, JAX waits for the others.
everywhere() {{
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}}

case ${{1:-}} in
  create)
    gcloud compute tpus tpu-vm create "$name" --zone="$zone" \\
      {_accelerator(job)} --version={job.machine["runtime"]}
    ;;
  install)
    gcloud compute tpus tpu-vm scp --recurse --zone="$zone" --worker=all . "$name:shardpage"
    everywhere "pip install --quiet --user './shardpage[tpu,demo]'"
    ;;
  doctor) everywhere "PATH=\\$HOME/.local/bin:\\$PATH shardpage doctor" ;;
  run)
    # JAX asks each VM's metadata who it is; nothing needs to be set.
    job={shlex.quote(remote)}
    everywhere "export PATH=\\$HOME/.local/bin:\\$PATH
$job"
    ;;
  delete) gcloud compute tpus tpu-vm delete "$name" --zone="$zone" ;;
  *)
    sed -n '2,10s/^# \\{{0,1\\}}//p' "$0"
    exit 2
    ;;
esac
"""


def mpirun(job: Job) -> str:
    """A script for Open MPI."""
    hosts = job.hosts or tuple(f"host{i}" for i in range(job.num_hosts))
    places = shlex.quote(",".join(f"{host}:1" for host in hosts))
    return f"""\
#!/usr/bin/env bash
# shardpage on {job.slices_text}, under Open MPI.
#
# One process per host. JAX reads from Open MPI 4 who it is; with Open MPI 5 install mpi4py as well.
# When one process fails, mpirun ends the others and exits with its code.
set -euo pipefail
hosts={places}
{_mesh(job)}
exec mpirun --host "$hosts" -np {job.num_hosts} --map-by ppr:1:node --bind-to none --tag-output \\
  {"-x SHARDPAGE_MESH " if job.mesh else ""}-x PATH \\
  {job.command_line}
"""


def local(job: Job) -> str:
    """A script that plays the same on this machine."""
    mesh = f" --mesh {shlex.quote(job.mesh)}" if job.mesh else ""
    return f"""\
#!/usr/bin/env bash
# What would run on {job.slices_text}, played on this machine:
# as many processes, each with that many simulated devices, joined by jax.distributed.
#
#   bash launch/local.sh                               compare page attention with the oracle
#   bash launch/local.sh generate --prompt "Hello"     any job, or a command: python my.py
set -euo pipefail
(($#)) || set -- {shlex.join(job.words)}
exec "${{PYTHON:-python3}}" -m launch simulate \\
  --processes {job.num_hosts} --devices-per-process {job.devices_per_process}{mesh} -- "$@"
"""


def _accelerator(job: Job) -> str:
    """gcloud's name of the slice: the product where its usual shape is meant."""
    chip, kind = job.pod.chip, job.machine["type"]
    per_chip = chip.cores if chip.counts == "cores" else 1
    product = f"{kind}-{job.pod.num_chips * per_chip}"
    with contextlib.suppress(ValueError):  # not a size that has a product's name
        if PodSlice.parse(product) == job.pod:
            return f"--accelerator-type={product}"
    return f"--type={kind} --topology={'x'.join(map(str, job.pod.shape))}"


def _mesh(job: Job) -> str:
    if job.mesh is None:
        return "# SHARDPAGE_MESH is not set: all devices go to context."
    return f"export SHARDPAGE_MESH={shlex.quote(job.mesh)}"
