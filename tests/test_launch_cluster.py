"""The same program under launchers of others: Open MPI and Slurm, found by JAX itself."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import render
from meshes import PodSlice

from .launcher import PROGRAM, ROOT

STEPS = [f"step {step} sum 2.0" for step in range(5)]
ENVIRONMENT = {"SHARDPAGE_DEVICES_PER_PROCESS": "1", "JAX_PLATFORMS": "cpu"}
SLURM = Path(__file__).with_name("slurm_loopback.sh")


def job(*words: str, **options) -> render.Job:
    return render.Job(PodSlice.parse("v5p:2x2x2"), words=words, **options)


def lines_of(text: str, prefix: str) -> list[str]:
    """A rank's lines, from among all."""
    lines = [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]
    return [line for line in lines if not line.startswith("[Gloo]")]


@pytest.fixture
def clean_environ():
    """The environment, without what would make the ranks something else."""
    names = [name for name in os.environ if not name.startswith(("SLURM_", "OMPI_", "SHARDPAGE_"))]
    inherited = {name: os.environ[name] for name in names}
    return inherited | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: Open MPI")
@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("fail", 1)])
def test_mpirun(tmp_path, clean_environ, fault, code):
    script = tmp_path / "mpirun.sh"
    script.write_text(render.RENDERERS["mpirun"](job(sys.executable, PROGRAM, "1", fault)))
    # two places on this machine, in place of two machines
    text = script.read_text().replace("hosts=host0:1,host1:1", "hosts=localhost:2")
    script.write_text(text.replace("--map-by ppr:1:node", "--oversubscribe"))
    environ = clean_environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    done = subprocess.run(
        ["bash", str(script)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert "found through Open MPI" in done.stderr
    if fault == "none":
        assert done.stdout.count("done") == 2
    else:
        assert "ValueError: no such page" in done.stderr


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which a Slurm of two nodes on this machine answers."""
    if os.environ.get("SHARDPAGE_TEST_SLURM") != "1":
        pytest.skip("sets up a Slurm on this machine, as root: SHARDPAGE_TEST_SLURM=1 asks for it")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run(["bash", str(SLURM), "up", str(folder)], check=True, timeout=60)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["bash", str(SLURM), "down", str(folder)], check=False, timeout=60)


@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("fail", 1), ("kill", 137)])
def test_slurm(tmp_path, clean_environ, slurm, fault, code):
    script = tmp_path / "job.sbatch"
    words = (sys.executable, PROGRAM, "1", fault)
    script.write_text(render.RENDERERS["slurm"](job(*words, max_restarts=0)))
    log = tmp_path / "job.log"
    words = ["sbatch", "--wait", f"--output={log}", f"--chdir={tmp_path}", str(script)]
    began = time.monotonic()
    environ = clean_environ | slurm
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120)
    text = log.read_text()
    print(
        f"--- {fault}: exit code {done.returncode} after {time.monotonic() - began:.0f} s\n{text}"
    )
    assert done.returncode == code
    assert "found through Slurm" in text
    if fault == "none":
        assert lines_of(text, "0: ")[-6:] == [*STEPS, "done"]
    elif fault == "fail":
        assert "1: ValueError: no such page" in text


def test_failed_slurm_job_goes_back_to_the_queue(tmp_path, clean_environ, slurm):
    """Slurm starts it again after its time; waiting for that would take two minutes."""
    script = tmp_path / "job.sbatch"
    check = 'echo "attempt $SHARDPAGE_ATTEMPT"; ((SHARDPAGE_ATTEMPT == 1))'
    script.write_text(render.RENDERERS["slurm"](job("bash", "-c", check, max_restarts=2)))
    log = tmp_path / "job.log"
    words = ["sbatch", f"--output={log}", f"--chdir={tmp_path}", "--parsable", str(script)]
    environ = clean_environ | slurm
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    number = done.stdout.strip()
    end = time.monotonic() + 30  # a job that goes back to the queue waits there for a while
    while "back to the queue" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.2)
    state = ["squeue", "--noheader", "--format=%T", f"--jobs={number}"]
    found = subprocess.run(state, env=environ, capture_output=True, text=True, timeout=60)
    print(f"--- requeue: {found.stdout.strip()}\n{log.read_text()}")
    assert found.stdout.strip() in ("PENDING", "COMPLETING", "REQUEUED", "RUNNING")
    subprocess.run(["scancel", number], env=environ, check=True, timeout=60)
