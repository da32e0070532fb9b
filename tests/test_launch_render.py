"""Scripts and manifests: right for the slice, safe with what users pass, the same as in launch/."""

import copy
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from typer.testing import CliRunner

import meshes
from launch import render
from launch.__main__ import app
from meshes import PodSlice

from .launcher import ROOT

NASTY = ("generate", "--prompt", "it's $(touch owned) `id` \"x\" $HOME\nline two: 'y' # z")
SLICES = ("v5p:2x2x2", "v4:2x2x1", "v5e:4x8", "v6e:1x1", "v5p:16x16x24")


def make(name: str = "v5p:2x2x2", /, **options) -> render.Job:
    return render.Job(PodSlice.parse(name), **options)


@pytest.mark.parametrize(("file", "kind"), render.FILES.items())
def test_files_in_launch_are_what_render_makes(file, kind):
    text = (ROOT / "launch" / file).read_text(encoding="utf-8")
    assert text == render.RENDERERS[kind](render.default_job())


@pytest.mark.parametrize("kind", ["slurm", "gcloud", "mpirun", "local"])
@pytest.mark.parametrize("words", [("verify",), NASTY])
def test_shell_scripts_are_sound(kind, words, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(render.RENDERERS[kind](make(words=words, mesh="data=2,context=4")))
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only parsed by bash")
    hidden = "--exclude=SC2016" if words is NASTY else "--severity=style"  # $ in its quotes
    subprocess.run(["shellcheck", "--shell=bash", hidden, str(script)], check=True)


@pytest.mark.parametrize("kind", ["slurm", "mpirun", "local", "gcloud"])
def test_what_users_pass_arrives_as_it_is(kind, tmp_path):
    """Runs the scripts with the launchers replaced by one that records its arguments."""
    seen, folder = tmp_path / "seen", tmp_path / "bin"
    folder.mkdir()
    record = f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" > {shlex.quote(str(seen))}\n'
    for name in ("srun", "mpirun", "python3", "gcloud", "shardpage"):
        (folder / name).write_text(record)
        (folder / name).chmod(0o755)
    if kind == "gcloud":  # runs it the way ssh does: through a shell of the other side
        (folder / "gcloud").write_text('#!/usr/bin/env bash\nHOME=/ bash -c "${!##--command=}"\n')
    script = tmp_path / "script.sh"
    script.write_text(render.RENDERERS[kind](make(words=NASTY, mesh="data=2,context=4")))
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(tmp_path)}
    words = ["bash", str(script), *(["run"] if kind == "gcloud" else [])]
    subprocess.run(words, env=environ, cwd=tmp_path, check=True, timeout=20)
    arguments = seen.read_text().split("\0")[:-1]
    assert arguments[-len(NASTY) :] == list(NASTY)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", SLICES)
def test_jobset_of_slices(name):
    job = make(name, num_slices=2)
    content = yaml.safe_load(render.jobset(job))
    check_jobset(content)
    (replicated,) = content["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    assert replicated["replicas"] == 2
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] * chips == PodSlice.parse(name).num_chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == name.split(":")[1]


def test_jobset_takes_users_text_literally():
    content = yaml.safe_load(render.jobset(make(words=NASTY, mesh="data=$(HOME)")))
    spec = content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    # Kubernetes turns $$ into $, and $(NAME) into a variable
    assert [word.replace("$$", "$") for word in container["command"][1:]] == list(NASTY)
    assert "$$(touch owned)" in container["command"][3]
    assert container["env"][-1]["value"] == "data=$$(HOME)"


def check_jobset(content) -> None:
    """What a JobSet must be, outside its Job: fields, types, and what makes a gang of it."""
    require(set(content) == {"apiVersion", "kind", "metadata", "spec"}, "fields")
    require(content["apiVersion"] == "jobset.x-k8s.io/v1alpha2", "apiVersion")
    require(content["kind"] == "JobSet", "kind")
    annotations = content["metadata"].get("annotations", {})
    topology = annotations.get("alpha.jobset.sigs.k8s.io/exclusive-topology")
    require(topology == "cloud.google.com/gke-nodepool", "exclusive topology")
    spec = content["spec"]
    require(set(spec) == {"failurePolicy", "replicatedJobs"}, "fields of spec")
    policy = spec["failurePolicy"]
    restarts = policy.get("maxRestarts")
    require(isinstance(restarts, int) and restarts >= 0, "maxRestarts")
    for rule in policy["rules"]:
        require({"name", "action"} <= set(rule), "a rule has a name and an action")
        require(
            rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
            "action",
        )
    names = [replicated["name"] for replicated in spec["replicatedJobs"]]
    require(len(names) == 1 and all(names), "replicated jobs")
    for replicated in spec["replicatedJobs"]:
        require(set(replicated) == {"name", "replicas", "template"}, "fields of a replicated job")
        require(isinstance(replicated["replicas"], int), "replicas")
        job = replicated["template"]["spec"]
        require(job["completionMode"] == "Indexed", "completionMode")
        require(job["backoffLimit"] == 0, "backoffLimit")
        require(job["parallelism"] == job["completions"] > 0, "all hosts at once")
        require(job["template"]["spec"]["restartPolicy"] == "Never", "restartPolicy")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
MUTATIONS = [
    (("apiVersion",), "jobset.x-k8s.io/v1"),
    (("kind",), "Job"),
    (("metadata", "annotations"), {}),
    (("spec", "failurePolicy", "maxRestarts"), "3"),
    (("spec", "failurePolicy", "rules", 0, "name"), None),
    (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
    (("spec", "failurePolicy", "rule"), []),
    (("spec", "successPolicies"), {}),
    (("spec", "replicatedJobs"), []),
    (("spec", "replicatedJobs", 0, "replicas"), "1"),
    ((*JOB, "completionMode"), "NonIndexed"),
    ((*JOB, "backoffLimit"), 6),
    ((*JOB, "completions"), 3),
    ((*JOB, "template", "spec", "restartPolicy"), "OnFailure"),
]


@pytest.mark.parametrize(("path", "value"), MUTATIONS)
def test_the_check_of_jobsets_notices(path, value):
    content = copy.deepcopy(render.manifest(make()))
    check_jobset(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    if path[-1] == "rule":
        place = content["spec"]["failurePolicy"]
        del place["rules"]
    elif value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises((ValueError, KeyError)):
        check_jobset(content)


def test_inner_job_is_valid_kubernetes(tmp_path):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for name in SLICES:
        validate.validate(render.inner_job(make(name, mesh="data=-1")), "1.29", strict=True)
        broken = render.inner_job(make(name))
        broken["spec"]["paralelism"] = 1
        with pytest.raises(validate.ValidationError):
            validate.validate(broken, "1.29", strict=True)


@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5p:4x4x12", "v5e:4x8", "v4:4x4x4"])
def test_gcloud_names_the_slice(name):
    text = render.RENDERERS["gcloud"](make(name))
    options = dict(re.findall(r"--(accelerator-type|type|topology)=(\S+)", text))
    if "accelerator-type" in options:
        assert PodSlice.parse(options["accelerator-type"]) == PodSlice.parse(name)
    else:
        assert f"{options['type']}:{options['topology']}" == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a b"}, "name 'a b' must be"),
        ({"name": "a\n#SBATCH --uid=0"}, "must be of lower-case"),
        ({"image": "x; rm"}, "image 'x; rm' has characters"),
        ({"zone": "$(id)"}, "zone"),
        ({"hosts": ("a", "b c")}, "host 'b c'"),
        ({"hosts": ("a",)}, "1 hosts for v5p:2x2x2: 2 hosts"),
        ({"words": ()}, "nothing to run"),
    ],
)
def test_jobs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(**options)


def test_gcloud_refuses_what_only_gke_has():
    with pytest.raises(ValueError, match="tpu7x has no TPU VMs; use render jobset"):
        render.RENDERERS["gcloud"](make("tpu7x:2x2x2"))
    with pytest.raises(ValueError, match="use render jobset"):
        render.RENDERERS["gcloud"](make(num_slices=2))


def test_every_generation_has_a_machine():
    for chip in meshes.chips().values():
        assert "gke" in make(f"{chip.name}:{chip.shapes[-1]}").machine


def test_command_line():
    result = CliRunner().invoke(app, ["render", "slurm", "--slice", "v5e:4x4", "--mesh", "data=3"])
    assert result.exit_code == 2
    assert "Axes data fit as data=16" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["render", "mpirun", "--hosts", "a,b", "--", "my", "a b"])
    assert result.exit_code == 0
    assert "hosts=a:1,b:1\n" in result.output
    assert "my 'a b'" in result.output
