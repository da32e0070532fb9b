"""A language model served by several processes: the same tokens, also after one was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.generate.smollm2 import MissingWeights, find_weights

from . import tiny_model
from .launcher import ROOT, launching

ORACLE = json.loads((ROOT / "tests/data/smollm2_public.json").read_text(encoding="utf-8"))
PROMPTS = ["one", "another prompt", "the third"]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for left-over processes in /proc"
)


@pytest.fixture
def launcher(tmp_path):
    with launching(tmp_path / "logs") as launcher:
        yield launcher


@pytest.fixture
def tiny_prompts(tmp_path, monkeypatch) -> list[str]:
    """Options of generate for three prompts of the tiny model, one after the other."""
    tiny_model.write(tmp_path / "tiny.gguf")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    monkeypatch.setenv("SHARDPAGE_WEIGHTS", str(tmp_path / "tiny.gguf"))
    return f"--prompts {tmp_path}/prompts.json --raw --batch 1 --max-new-tokens 60".split()


def test_oracle_tokens_over_two_processes(launcher, tmp_path):
    try:
        find_weights()
    except MissingWeights as error:
        pytest.skip(str(error))
    oracle, file = ORACLE["capital"], tmp_path / "results.json"
    options = ("--mesh", "data=2,kv=1,context=4")
    job = ("generate", "--raw", "--prompt", oracle["prompt"], "--json", str(file))
    assert launcher.start(*job, options=options, devices=4).end(within=300) == 0
    results = json.loads(file.read_text())
    assert results["prompts"][0]["ids"] == oracle["greedy_ids"]
    assert len(results["devices"]) == 8
    assert "The capital of France is Paris." in launcher.out


def test_killed_midway_and_restarted(launcher, tmp_path, tiny_prompts):
    plain = tmp_path / "plain.json"
    words = [sys.executable, "-m", "launch", "generate", *tiny_prompts, "--simulate", "2"]
    subprocess.run([*words, "--json", str(plain)], cwd=ROOT, check=True, timeout=120)
    expected = [prompt["ids"] for prompt in json.loads(plain.read_text())["prompts"]]

    file = tmp_path / "results.json"
    job = ("generate", *tiny_prompts, "--json", str(file))
    launcher.start(*job, options=("--max-restarts", "1"))
    first = wait_for_an_answer(file)
    os.kill(launcher.pid_of(1), signal.SIGKILL)
    assert launcher.end(within=120) == 0
    assert launcher.first() == (1, "killed by SIGKILL")
    assert "restart 1 of 1" in launcher.err
    found = re.search(r"(\d) of 3 prompts were answered before", launcher.err)
    assert found, launcher.err
    assert int(found[1]) >= len(first)
    results = json.loads(file.read_text())["prompts"]
    assert [prompt["ids"] for prompt in results] == expected
    assert all(prompt["finished"] for prompt in results)
    # what was finished was not made again: those of the second run have a speed, these have none
    assert sum(prompt["tokens_per_second"] is None for prompt in results) == int(found[1])
    assert all(results[key]["tokens_per_second"] is None for key in first)


def test_terminated_with_what_was_done(launcher, tmp_path, tiny_prompts):
    file = tmp_path / "results.json"
    launcher.start("generate", *tiny_prompts, "--json", str(file))
    first = wait_for_an_answer(file)
    launcher.process.terminate()
    assert launcher.end(within=60) == 143
    prompts = json.loads(file.read_text())["prompts"]
    assert all(prompts[key]["finished"] for key in first)
    endings = {prompt["ending"] for prompt in prompts if not prompt["finished"]}
    # None: one that waited in a collective for a process that had gone was ended as it was
    assert endings <= {"interrupted", None}


def wait_for_an_answer(file: Path) -> list[int]:
    """Waits until some of the answers are whole; which."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if file.exists():
            prompts = json.loads(file.read_text())["prompts"]  # whole at any time
            if found := [key for key, prompt in enumerate(prompts) if prompt["finished"]]:
                return found
        time.sleep(0.005)
    raise AssertionError("no prompt was answered")
