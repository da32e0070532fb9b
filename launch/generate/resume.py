"""Goes on where an earlier run stopped: answers that its --json file has are not made again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ..processes.bootstrap import Processes
from .requests import Request

# Settings that may differ: they change how fast answers come, not what they are.
_HARMLESS = ("page_size", "num_pages", "batch")


def restore(
    path: Path,
    settings: Mapping[str, Any],
    requests: Sequence[Request],
    processes: Processes,
) -> int:
    """Ends the requests that an earlier run has finished, with the answers that it gave.

    Rank 0 reads the file and tells the others which these are, so that all do the same even where
    each host has a disk of its own.

    Args:
      path: the --json file; if there is none, nothing was finished.
      settings: those of this run, as the file records them.
      requests: of this run, all of them, in order.
      processes: who this process is.

    Returns:
      How many were finished.

    Raises:
      typer.BadParameter: if the file is of a run with other prompts or settings.
    """
    saved: dict[int, dict[str, Any]] = {}
    if processes.is_main and path.exists():
        saved = _finished(path, settings, requests)
    is_done = np.array([request.key in saved for request in requests], bool)
    if processes.count > 1:
        from jax.experimental import multihost_utils

        is_done = np.asarray(multihost_utils.broadcast_one_to_all(is_done))
    for request, done in zip(requests, is_done, strict=True):
        if done:
            answer = saved.get(request.key, {"ids": [], "ending": "stop"})
            request.ids, request.ending = list(answer["ids"]), answer["ending"]
            request.num_prefilled = len(request.prompt_ids)
    return int(is_done.sum())


def _finished(
    path: Path, settings: Mapping[str, Any], requests: Sequence[Request]
) -> dict[int, dict[str, Any]]:
    """The finished answers of a file, by number of the prompt."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts, before = content["prompts"], content["settings"]
        ids = [prompt["prompt_ids"] for prompt in prompts]
        finished = {key: prompt for key, prompt in enumerate(prompts) if prompt["finished"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refuse(path, f"cannot be read as results ({error})") from None
    if ids != [list(request.prompt_ids) for request in requests]:
        raise _refuse(path, "holds results of other prompts")
    for name in sorted({*before, *settings} - {*_HARMLESS}):
        if before.get(name) != settings.get(name):
            was, now = before.get(name), settings.get(name)
            raise _refuse(path, f"holds results with {name}={was}, not {now}")
    return finished


def _refuse(path: Path, why: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{path} {why}; to begin anew leave out --resume, or name another --json file",
        param_hint="--resume",
    )
