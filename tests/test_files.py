"""What a run reads and writes, terminals included: whatever it holds, and whatever it is."""

import errno
import io
import json
import os
import stat
import threading

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from launch import bootstrap
from launch.__main__ import app
from launch.generate import resume
from launch.generate.console import LiveOutput, PlainOutput
from launch.generate.requests import Request
from launch.jobs.generate import read_prompts
from launch.json_file import write_json

from . import tiny_model

NESTED = "[" * 100_000
ESCAPES = "a\x1b]52;c;aGk=\x07b\r\x9b2J\u202ec\td\x00"
SHOWN = r"a\x1b]52;c;aGk=\x07b\r\x9b2J\u202ec" + "\td" + r"\x00"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny model takes the place of the real one."""
    tiny_model.write(tmp_path / "tiny.gguf")
    monkeypatch.setenv("SHARDPAGE_WEIGHTS", str(tmp_path / "tiny.gguf"))


def generate(*arguments):
    words = ["generate", "--mesh", "data=1", "--max-new-tokens", 2, *arguments]
    return CliRunner().invoke(app, [*map(str, words)], input="")


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# What --json writes to ------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    """A pipe with a name, and what was read from it once it is closed."""
    path, found = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_text()), daemon=True)
    reader.start()
    yield path, lambda: (reader.join(10), found[0])[1]
    os.close(os.open(path, os.O_RDWR))  # whoever still waits for the other end waits no more


def is_fifo(path) -> bool:
    return stat.S_ISFIFO(path.lstat().st_mode)


def test_a_pipe_gets_the_text_once_and_stays(fifo):
    path, text = fifo
    write_json(path, ["not yet"], last=False)
    write_json(path, ["all"])
    assert json.loads(text()) == ["all"]
    assert is_fifo(path)


def test_a_run_writes_to_a_pipe_at_its_end(tiny, fifo):
    path, text = fifo
    assert generate("-p", "x", "--json", path, "--resume").exit_code == 0
    assert json.loads(text())["prompts"][0]["finished"]
    assert is_fifo(path)


def test_a_link_to_a_pipe_stays(fifo, tmp_path):
    path, text = fifo
    (tmp_path / "link").symlink_to(path)
    write_json(tmp_path / "link", ["all"])
    assert json.loads(text()) == ["all"]
    assert is_fifo(path)
    assert (tmp_path / "link").is_symlink()


def test_a_device_stays(tmp_path):
    node = tmp_path / "node"
    try:
        os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # one of our own
    except OSError as error:
        pytest.skip(f"cannot make a device: {error}")
    try:
        write_json(node, ["all"])
    except PermissionError:
        pytest.skip("devices do not open here")
    assert node.is_char_device()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_file_stays_and_the_file_is_replaced(tmp_path, there):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target.json", tmp_path / "link.json"
    if there:
        target.write_text("[]")
    link.symlink_to("folder/target.json")
    write_json(link, ["all"])
    assert link.is_symlink()
    assert read(target) == ["all"]
    assert sorted(os.listdir(tmp_path / "folder")) == ["target.json"]


def test_a_folder_is_refused(tiny, tmp_path):
    result = generate("-p", "x", "--json", tmp_path)
    assert result.exit_code == 2
    assert "Is a directory" in result.output
    assert tmp_path.is_dir()


def test_what_a_killed_run_left_goes_with_the_next(tmp_path):
    other, left = tmp_path / "other", tmp_path / ".out.json.part"
    other.write_text("mine")
    left.symlink_to(other)  # also if someone planted it
    write_json(tmp_path / "out.json", ["all"])
    assert read(tmp_path / "out.json") == ["all"]
    assert other.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["other", "out.json"]


def test_a_full_disk_is_no_end_but_worth_a_restart(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("[]")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("launch.json_file.os.fsync", full)
    result = generate("-p", "x", "--json", out)
    assert result.exit_code == 75
    assert result.output.count(f"--json {out}: No space left on device; going on") == 1
    assert "made 2 new ones" in result.output
    assert out.read_text() == "[]"
    assert not list(tmp_path.glob(".out*"))


def test_a_disk_that_has_room_again_is_no_failure(tiny, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full_once(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("launch.json_file.os.fsync", full_once)
    result = generate("-p", "x", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "out.json")["prompts"][0]["finished"]


# Prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [NESTED, '{"a":' * 100_000, '["\\ud800"]', "[1]", "["])
def test_unreadable_prompts_are_usage_errors(tmp_path, content):
    (tmp_path / "prompts.json").write_text(content)
    result = CliRunner().invoke(app, ["generate", "--prompts", str(tmp_path / "prompts.json")])
    assert result.exit_code == 2
    assert "prompt" in result.output


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8")])
def test_an_unreadable_standard_input_is_a_usage_error(monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(typer.BadParameter, match=r"there is no prompt|standard input: 'utf-8'"):
        read_prompts([], None)


def test_control_tokens_in_a_prompt_are_text_unless_raw(tiny, tmp_path):
    out, special = tmp_path / "out.json", tiny_model.SPECIAL
    for raw, expected in (([], [5, 5]), (["--raw"], [0, 3])):
        result = generate("-p", "hello", "-p", "".join(special), *raw, "--json", out)
        assert result.exit_code == 0, result.output
        ids = [prompt["prompt_ids"] for prompt in read(out)["prompts"]]
        assert [sum(token < len(special) for token in found) for found in ids] == expected


# What a terminal sees --------------------------------------------------------------------------


@pytest.mark.parametrize("titles", [["x"], ["x", ESCAPES]])
def test_control_characters_are_shown_as_what_they_are(titles, capsys):
    with PlainOutput(titles, lambda: "") as output:
        output.started(len(titles) - 1)
        output.write(0, ESCAPES + "\n" + ESCAPES)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 2
    assert (r"> a\x1b]52;c;aGk=\x07b\r\x9b2J\u202ec d\x00" in out) == (len(titles) > 1)
    assert out.replace("\n", "").replace("\t", "").isprintable()


def test_panels_show_them_too():
    screen = io.StringIO()
    output = LiveOutput([ESCAPES], lambda: "")
    output._console = Console(file=screen, width=100)
    output.started(0)
    output.write(0, ESCAPES)
    output.ended(0, "")
    assert screen.getvalue().count(r"\x1b]52;c;aGk=\x07b\r\x9b2J\u202ec") == 2
    assert screen.getvalue().replace("\n", "").isprintable()


def test_json_keeps_control_characters(tiny, tmp_path):
    out = tmp_path / "out.json"
    result = generate("-p", ESCAPES, "-p", "x", "--json", out)
    assert result.exit_code == 0, result.output
    assert read(out)["prompts"][0]["prompt"] == ESCAPES
    assert "\x1b" not in result.output


# What --resume believes ------------------------------------------------------------------------


LIMITS = resume.Limits(vocab_size=8, stop_id=7)

SETTINGS = {"seed": 0, "temperature": 0.0, "page_size": 16}


def saved(path, ids=((1, 2), (3,)), **settings):
    prompts = [
        {"prompt_ids": list(x), "ids": [7], "ending": "stop", "finished": not number}
        for number, x in enumerate(ids)
    ]
    path.write_text(json.dumps({"prompts": prompts, "settings": SETTINGS | settings}))
    return path


def requests() -> list[Request]:
    return [Request(0, [1, 2], 4), Request(1, [3], 4)]


def test_finished_answers_are_kept(tmp_path):
    first, second = found = requests()
    file = saved(tmp_path / "results.json", page_size=32)  # a size that changes no answer
    assert resume.restore(file, SETTINGS, found, bootstrap.Processes(), LIMITS) == 1
    assert (first.ids, first.ending, second.ids, second.ending) == ([7], "stop", [], None)


def test_without_a_file_nothing_was_finished(tmp_path):
    found = requests()
    assert (
        resume.restore(tmp_path / "none.json", SETTINGS, found, bootstrap.Processes(), LIMITS) == 0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ((1, 2), (4,))}, "holds results of other prompts"),
        ({"seed": 1}, "holds results with seed=1, not 0"),
        ({"dtype": "bfloat16"}, "holds results with dtype='bfloat16', not None"),
    ],
)
def test_results_of_another_run_are_refused(tmp_path, change, message):
    file = saved(tmp_path / "results.json", **change)
    with pytest.raises(typer.BadParameter, match=message):
        resume.restore(file, SETTINGS, requests(), bootstrap.Processes(), LIMITS)


def test_what_is_no_results_file_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(typer.BadParameter, match="cannot be read as results"):
        resume.restore(
            tmp_path / "results.json", SETTINGS, requests(), bootstrap.Processes(), LIMITS
        )


@pytest.mark.parametrize(
    ("entry", "name", "value", "message"),
    [
        (0, "ids", [8], r"prompts\[0\].ids\[0\] = 8 must be a token, from 0 to 7"),
        (0, "ids", [-1], r"prompts\[0\].ids\[0\] = -1 must be"),
        (0, "ids", [1, 7.0], r"prompts\[0\].ids\[1\] = 7.0 must be"),
        (0, "ids", [True, 7], r"prompts\[0\].ids\[0\] = True must be"),
        (0, "ids", "text", r"prompts\[0\].ids = 'text' must be a list"),
        (0, "ids", ["\x1b"], r"prompts\[0\].ids\[0\] = '\\x1b' must be"),
        (
            0,
            "ids",
            [1, 2, 3, 4, 7],
            r"prompts\[0\] is finished by 'stop' after 5 tokens; it must be",
        ),
        (0, "ids", [7, 7], r"prompts\[0\] is finished by 'stop' after 2 tokens"),
        (0, "ids", [], r"prompts\[0\] is finished by 'stop' after 0 tokens"),
        (0, "ending", "length", r"prompts\[0\] is finished by 'length' after 1 tokens"),
        (0, "ending", "bored", r"prompts\[0\] is finished by 'bored'"),
        (0, "ending", ["stop"], r"prompts\[0\] is finished by \['stop'\]"),
        (0, "ending", None, r"prompts\[0\] is finished by None"),
        (1, "finished", "no", r"prompts\[1\].finished = 'no' must be true or false"),
        (1, "finished", ..., r"prompts\[1\].finished is missing"),
        (1, "prompt_ids", [3.0], r"prompts\[1\].prompt_ids\[0\] = 3.0 must be"),
        (1, "prompt_ids", ..., r"prompts\[1\].prompt_ids is missing"),
        (None, "prompts", [3], r"prompts\[0\] = 3 must be an object"),
        (None, "prompts", {}, r"prompts = {} must be a list"),
        (None, "settings", [], r"settings = \[\] must be an object"),
        (None, "settings", ..., r"settings is missing"),
    ],
)
def test_a_file_that_cannot_be_true_is_refused_and_kept(tmp_path, entry, name, value, message):
    file = saved(tmp_path / "results.json")
    content = read(file)
    found = content if entry is None else content["prompts"][entry]
    found[name] = value
    if value is ...:
        del found[name]
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(typer.BadParameter, match=message):
        resume.restore(file, SETTINGS, requests(), bootstrap.Processes(), LIMITS)
    assert file.read_bytes() == before


def test_each_mistake_is_a_line(tmp_path):
    file = saved(tmp_path / "results.json")
    file.write_text(file.read_text().replace("7", "9"))
    with pytest.raises(typer.BadParameter) as refused:
        resume.restore(file, SETTINGS, requests(), bootstrap.Processes(), LIMITS)
    lines = refused.value.message.splitlines()
    assert [line.split(" = ")[0].strip() for line in lines[1:3]] == [
        "prompts[0].ids[0]",
        "prompts[1].ids[0]",
    ]


def test_the_job_refuses_it_before_it_writes(tiny, tmp_path):
    out = tmp_path / "out.json"
    assert generate("-p", "x", "--json", out).exit_code == 0
    assert generate("-p", "x", "--json", out, "--resume").exit_code == 0
    for content in (out.read_text().replace('"ids": [', '"ids": [1000000,'), NESTED):
        out.write_text(content)
        result = generate("-p", "x", "--json", out, "--resume")
        assert result.exit_code == 2
        assert "cannot be read as results" in result.output
        assert out.read_text() == content
