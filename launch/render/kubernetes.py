"""A JobSet for GKE: one replicated Job per slice, one indexed pod per host."""

import re
from typing import Any

from .job import Job

# Comments of the manifest, before the first line with this key.
COMMENTS = {
    "apiVersion": "shardpage on {slices}, on GKE. Needs the JobSet controller.\n"
    "  kubectl apply -f jobset.yaml; kubectl logs -f -l {selector}",
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "A slice's pods all go to one node pool, which "
    "is one slice.",
    "failurePolicy": "After a failure all pods of all slices start again: there is no elastic "
    "resize.",
    "rules": "Exit code 2 is a mistake in the command; see podFailurePolicy.",
    "replicas": "Slices.",
    "parallelism": "Hosts per slice, all at the same time, each with an index that GKE turns into "
    "TPU_WORKER_ID.",
    "backoffLimit": "No pod is replaced alone: the others would wait for ever for the old one.",
    "nodeSelector": "The slice.",
    "terminationGracePeriodSeconds": "After SIGTERM a process keeps what it has and ends in 5 s; "
    "this is for one that does not.",
    "command": "A list, no shell: nothing in it is interpreted.",
    "ports": "8482: JAX's coordinator on the first host. 8471: libtpu.",
    "google.com/tpu": "All chips of a host.",
}


def jobset(job: Job) -> str:
    """The manifest as YAML with comments.

    Raises:
      ImportError: without PyYAML.
    """
    import yaml

    content = manifest(job)
    text = yaml.dump(content, Dumper=_dumper(yaml), sort_keys=False, width=10_000)
    selector = f"jobset.sigs.k8s.io/jobset-name={job.name}"
    text = _with_comments(text, slices=job.slices_text, selector=selector)
    assert yaml.safe_load(text) == content, "comments must not change a manifest"
    return text


def manifest(job: Job) -> dict[str, Any]:
    """The manifest."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": job.num_slices, "template": {"spec": _job(job)}}
            ],
        },
    }


def inner_job(job: Job) -> dict[str, Any]:
    """The Job that the JobSet makes for each slice, as a manifest of its own, to validate it."""
    metadata = {"name": job.name}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _job(job)}


def _job(job: Job) -> dict[str, Any]:
    return {
        "parallelism": job.hosts_per_slice,
        "completions": job.hosts_per_slice,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
        },
        "template": {"spec": _pod(job)},
    }


def _pod(job: Job) -> dict[str, Any]:
    attempt = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    environment: list[dict[str, Any]] = [
        {"name": "SHARDPAGE_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": attempt}}}
    ]
    if job.mesh is not None:
        environment.append({"name": "SHARDPAGE_MESH", "value": _literal(job.mesh)})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 30,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": job.machine["gke"],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, job.pod.shape)),
        },
        "containers": [
            {
                "name": "shardpage",
                "image": job.image,
                "command": [_literal(word) for word in job.command],
                "env": environment,
                "ports": [{"containerPort": 8482}, {"containerPort": 8471}],
                "resources": {"limits": {"google.com/tpu": job.chips_per_host}},
            }
        ],
    }


def _literal(text: str) -> str:
    """Text that Kubernetes leaves alone: it would put variables in place of $(NAME)."""
    return text.replace("$", "$$")


def _with_comments(text: str, **values: str) -> str:
    """Puts each comment before the first line with its key. A value never spans lines here."""
    left = dict(COMMENTS)
    lines = []
    for line in text.splitlines():
        found = re.match(r"( *(?:- )?)([\w./-]+):", line)
        if found and found[2] in left:
            indent = " " * len(found[1])
            comment = left.pop(found[2]).format(**values)
            lines += [f"{indent}# {part}" for part in comment.splitlines()]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _dumper(yaml: Any) -> Any:
    """Writes every text on one line: those with line breaks in double quotes."""

    class OneLine(yaml.SafeDumper):
        pass

    def represent(dumper: Any, text: str) -> Any:
        style = '"' if any(c in text for c in "\n\r\x85\u2028\u2029") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    OneLine.add_representer(str, represent)
    OneLine.ignore_aliases = lambda self, data: True
    return OneLine
