"""The parts of the launcher without processes: settings, output, verdicts, the doctor."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from launch import bootstrap, guard
from launch.__main__ import app
from launch.processes import doctor, notes
from launch.processes.signals import Stopped, stop_on_signals
from launch.processes.supervisor import environment, gang, output, verdict
from launch.processes.supervisor.verdict import Outcome

from .launcher import ROOT

IDENTITY = {
    "SHARDPAGE_COORDINATOR": "127.0.0.1:1234",
    "SHARDPAGE_NUM_PROCESSES": "2",
    "SHARDPAGE_PROCESS_ID": "1",
}


def test_settings_are_read():
    settings = bootstrap.Settings.read(IDENTITY | {"SHARDPAGE_STEP_TIMEOUT": "2.5"})
    assert (settings.coordinator, settings.num_processes, settings.process_id) == (
        "127.0.0.1:1234",
        2,
        1,
    )
    assert settings.step_timeout == 2.5
    assert bootstrap.Settings.read({"SHARDPAGE_ATTEMPT": ""}).attempt == 0  # as a manifest sets it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SHARDPAGE_PROCESS_ID": None}, "SHARDPAGE_PROCESS_ID must be set too"),
        ({"SHARDPAGE_PROCESS_ID": "2"}, "must be from 0 to 1"),
        ({"SHARDPAGE_COORDINATOR": "here"}, "must be HOST:PORT"),
        ({"SHARDPAGE_NUM_PROCESSES": "two"}, "must be a whole number"),
        ({"SHARDPAGE_GRACE": "soon"}, "must be a number of seconds"),
        ({"SHARDPAGE_GRACE": "nan"}, "SHARDPAGE_GRACE='nan' must be a number of seconds from 0 to"),
        ({"SHARDPAGE_STEP_TIMEOUT": "nan"}, "SHARDPAGE_STEP_TIMEOUT='nan' must be"),
        ({"SHARDPAGE_STEP_TIMEOUT": "-1"}, "SHARDPAGE_STEP_TIMEOUT='-1' must be"),
        ({"SHARDPAGE_START_TIMEOUT": "inf"}, "SHARDPAGE_START_TIMEOUT='inf' must be"),
        ({"SHARDPAGE_HEARTBEAT_TIMEOUT": "1e300"}, "SHARDPAGE_HEARTBEAT_TIMEOUT='1e300' must be"),
        ({"SHARDPAGE_DEVICES_PER_PROCESS": "0"}, "DEVICES_PER_PROCESS='0' must be .* from 1 to"),
        ({"SHARDPAGE_DEVICES_PER_PROCESS": "-3"}, "DEVICES_PER_PROCESS='-3' must be .* from 1 to"),
        ({"SHARDPAGE_ATTEMPT": "-1"}, "SHARDPAGE_ATTEMPT='-1' must be a whole number from 0 to"),
        ({"SHARDPAGE_COORDINATOR": "h:99999999"}, "COORDINATOR='h:99999999' must be HOST:PORT, "),
        ({"SHARDPAGE_COORDINATOR": "h:65536"}, "the port up to 65535"),
        ({"SHARDPAGE_BIND": "nonsense"}, "SHARDPAGE_BIND='nonsense' must be HOST:PORT"),
    ],
)
def test_settings_that_contradict(change, message):
    environ = {name: value for name, value in (IDENTITY | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        bootstrap.Settings.read(environ)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # an ssh into an allocation
    ],
)
def test_clusters_are_detected(environ, found):
    assert bootstrap.detect(environ | {"JAX_PLATFORMS": "cpu"}) == found


def test_slurm_is_detected_only_in_a_step():
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    environ = {f"SLURM_{name}": "2" for name in names}
    assert bootstrap.detect(environ) == "Slurm"


def test_one_process_is_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SHARDPAGE_", "SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    processes = bootstrap.initialize()
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert bootstrap.initialize() is processes
    assert len(processes.devices()) == 8
    guard.step()  # nothing to guard
    guard.barrier("here", 0.1)
    assert not guard.is_installed()


def test_rank_environment_is_clean():
    stale = {"MEGASCALE_SLICE_ID": "1", "SLURM_NTASKS": "4", "NPROC": "3", "SHARDPAGE_MESH": "x=1"}
    kept = {"SHARDPAGE_WEIGHTS": "w", "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --a"}
    environ = environment.rank_environment(stale | kept, {"process_id": 1, "mesh": None})
    assert not set(stale) & set(environ)
    assert environ["SHARDPAGE_WEIGHTS"] == "w"
    assert environ["XLA_FLAGS"] == "--a"
    assert environ["SHARDPAGE_PROCESS_ID"] == "1"


def test_noise_is_left_out_and_text_comes_at_once():
    lines = output.LineFilter()
    assert lines.feed(b"The capi") == b"The capi"
    assert lines.feed(b"tal\n[Glo") == b"tal\n"
    assert lines.feed(b"o] Rank 0 is connected\nof") == b"of"
    assert lines.feed(b" France\nI1122 10:00:00.123456  77 ") == b" France\n"
    assert lines.feed(b"coordination_service.cc:1] up\n[") == b""
    assert lines.flush() == b"["


PIECES = (b"[Gloo] Rank ", b"0", b" is connected to ", b"1", b" peer ranks. ")


@pytest.mark.parametrize(
    "line",
    [
        b"".join(PIECES[1:]) + b"Expected number of connected peer ranks is : 1",
        b"".join(2 * piece for piece in PIECES),
        b" peer ranks. ",
    ],
)
def test_lines_that_threads_have_mixed_are_noise(line):
    lines = output.LineFilter()
    shown = b"".join(lines.feed(bytes([byte])) for byte in line + b"\n")
    assert shown + lines.feed(b"12\n") == b"12\n"


NO_NOISE = (b"I am", b"Is it", b"[Glow", b"W is a letter", b"I1122 is not", b"42", b"0 is here")


@pytest.mark.parametrize("line", [*NO_NOISE, b"1" * 99 + b"x"])
def test_text_that_only_begins_like_noise_is_shown(line):
    lines = output.LineFilter()
    shown = b"".join(lines.feed(bytes([byte])) for byte in line)
    assert shown + lines.feed(b"\n") == line + b"\n"


def test_log_files_are_private(tmp_path):
    with output.open_log(tmp_path / "log") as log:
        log.write(b"[Gloo] Rank 1\nfirst\nlast\n")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    assert output.tail(tmp_path / "log") == ["first", "last"]


def ended(rank: int, status: int, at=None, steps=None, waiting=False) -> Outcome:
    end = None if at is None else (status, f"reason {rank}", at)
    found = notes.Found("joined", steps, end, waiting)
    return Outcome(rank, status, order=rank, found=found)


@pytest.mark.parametrize(
    ("outcomes", "rank", "code"),
    [
        ([ended(0, 1, at=2.0), ended(1, 1, at=1.0)], 1, 1),  # by their own clock
        ([ended(0, -6), ended(1, 3, at=9.0)], 1, 3),  # an abort follows from something
        ([ended(0, 1, at=1.0), ended(1, -9)], 1, 137),  # nobody else can have killed it
        ([ended(0, 75, at=1.0, steps=5), ended(1, 75, at=1.1, steps=4)], 1, 75),  # the least far
        ([ended(0, 75, at=1.0, waiting=True), ended(1, 75, at=1.1, steps=4)], 1, 75),
        ([ended(0, -6), ended(1, 0)], 0, 134),
    ],
)
def test_who_is_to_blame(outcomes, rank, code):
    blamed = verdict.first_failure(outcomes)
    assert blamed is not None
    assert (blamed.rank, blamed.code) == (rank, code)


def test_nobody_is_to_blame():
    stopped = Outcome(1, -15, stopped=True)
    assert verdict.first_failure([ended(0, 0), stopped]) is None


def test_notes_are_read_back(tmp_path):
    written = notes.Notes(str(tmp_path), 3)
    assert notes.read(tmp_path, 3) == notes.Found()
    written.state("joining")
    written.step(12)
    written.step(7)
    written.ended(75, "hung")
    found = notes.read(tmp_path, 3)
    assert (found.state, found.steps) == ("joining", 7)
    assert found.end is not None
    assert found.end[:2] == (75, "hung")


def test_scripts_import_the_guard_by_its_short_name_without_jax():
    program = (
        "import sys, launch.bootstrap, launch.guard; from launch import bootstrap, guard; "
        "from launch.processes import guard as same; "
        "assert launch.guard is guard is same; assert launch.bootstrap is bootstrap; "
        "assert not {'jax', 'typer', 'launch.generate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def texts(findings) -> str:
    return "\n".join(map(str, findings))


def test_doctor_finds_leftovers_and_shows_no_secrets():
    environ = {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:99", "MEGASCALE_AUTH_TOKEN": "hunter2"}
    found = texts(doctor.stale(environ))
    assert "10.0.0.1:99" in found
    assert "unset MEGASCALE_AUTH_TOKEN MEGASCALE_COORDINATOR_ADDRESS" in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MEGASCALE_DB_PWD", "hunter2"),
        ("MEGASCALE_DB_PASSWORD", "hunter2"),
        ("MEGASCALE_API_KEY", "hunter2"),
        ("MEGASCALE_CLIENT_SECRET", "hunter2"),
        ("MEGASCALE_PROXY", "https://joe:hunter2@proxy:99"),
        ("JAX_COORDINATOR_ADDRESS", "joe:hunt@hunter2@proxy:99"),
        ("JAX_COORDINATOR_ADDRESS", "http://proxy/?access_token=hunter2"),
    ],
)
def test_doctor_masks_what_looks_like_a_secret(name, value):
    found = texts(doctor.stale({name: value}))
    assert f"{name}=(not shown)" in found
    assert "hunter2" not in found
    assert ("proxy:99" in found) == ("@" in value)


def test_doctor_knows_half_a_slurm():
    (finding,) = doctor.slurm({"SLURM_JOB_ID": "7"})
    assert "start it with srun" in finding.cure
    assert not list(doctor.slurm({}))


def test_doctor_sees_a_taken_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        environ = IDENTITY | {"SHARDPAGE_COORDINATOR": address}
        (finding,) = doctor.coordinator_port(environ | {"SHARDPAGE_PROCESS_ID": "0"})
        assert finding.is_problem
        (finding,) = doctor.coordinator_port(environ)
        assert finding.text == f"rank 0 answers at {address}"
    (finding,) = doctor.coordinator_port(environ)
    assert "nothing answers" in finding.text


def test_doctor_sees_who_holds_the_chips(tmp_path):
    folder = tmp_path / "123" / "fd"
    folder.mkdir(parents=True)
    (folder / "4").symlink_to("/dev/accel0")
    (tmp_path / "123" / "comm").write_text("python\n")
    (finding,) = doctor.chip_holders(tmp_path)
    assert finding.is_problem
    assert finding.text == "process 123 (python) holds /dev/accel0"


def test_doctor_explains_the_lock_file(tmp_path):
    assert not list(doctor.lock_file(tmp_path))
    (tmp_path / doctor.LOCK_FILE).touch()
    (finding,) = doctor.lock_file(tmp_path)
    assert not finding.is_problem


def test_doctor_compares_devices_with_what_is_expected():
    found = list(doctor.backend("data=3", 4, across=False))
    assert "not 4" in texts(found)
    assert "Axes data fit as data=8" in texts(found)
    assert sum(finding.is_problem for finding in found) == 2


def test_doctor_as_a_command(monkeypatch):
    monkeypatch.setenv("SHARDPAGE_PROCESS_ID", "1")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "SHARDPAGE_COORDINATOR and SHARDPAGE_NUM_PROCESSES must be set too" in result.output


FORKS = pytest.mark.filterwarnings(r"ignore:os\.fork\(\)")  # the command itself starts no JAX


@FORKS
def test_simulate_of_a_command_that_is_not_there():
    result = CliRunner().invoke(app, ["simulate", "--", "no-such-command"])
    assert result.exit_code == 127
    assert "cannot start no-such-command: No such file or directory" in result.output


def test_simulate_with_no_place_for_its_logs(tmp_path):
    (tmp_path / "taken").write_text("")
    result = CliRunner().invoke(app, ["simulate", "--log-dir", f"{tmp_path}/taken", "--", "true"])
    assert result.exit_code == 1
    assert "File exists" in result.output


@FORKS
def test_rank_that_ends_between_two_looks_at_it(monkeypatch, tmp_path):
    """It is then no child that could be stopped, which must not be taken for an error."""
    reap = gang._Attempt._reap

    def reap_and_wait(self):
        reap(self)
        for _, process in self._running():
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(gang._Attempt, "_reap", reap_and_wait)
    monkeypatch.setattr(gang, "_NOTES_SECONDS", 0.0)
    assert gang.run(gang.Gang(["true"], log_dir=tmp_path)) == 0


def test_simulate_refuses_other_ranks():
    result = CliRunner().invoke(app, ["simulate", "--ranks", "1", "--", "true"])
    assert result.exit_code == 2


def _in_a_finalizer() -> None:
    class Finalizer:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    Finalizer()


def _where_everything_is_caught() -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("drop", [_in_a_finalizer, _where_everything_is_caught])
def test_a_signal_that_comes_where_exceptions_are_dropped_is_not_lost(drop):
    @stop_on_signals()
    def go_on() -> None:
        drop()
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(Stopped, match="SIGTERM"):
        go_on()
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_second_signal_does_not_cut_short_what_the_first_began():
    cleaned = []

    @stop_on_signals()
    def clean_up() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)
            cleaned.append(True)

    with pytest.raises(Stopped, match="SIGTERM"):
        clean_up()
    assert cleaned
