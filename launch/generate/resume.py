"""Goes on where an earlier run stopped: answers that its --json file has are not made again."""

import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

from ..json_file import is_stream, read_json
from ..processes.bootstrap import Processes
from .requests import Request

# Settings that may differ: they change how fast answers come, not what they are.
_HARMLESS = ("page_size", "num_pages", "batch", "step_tokens")
_MISTAKES_SHOWN = 8
_WORDS = {list: "a list", dict: "an object", bool: "true or false"}
_short = reprlib.repr


class Limits(NamedTuple):
    """What the tokens of a model can be."""

    vocab_size: int
    stop_id: int


def restore(
    path: Path,
    settings: Mapping[str, Any],
    requests: Sequence[Request],
    processes: Processes,
    limits: Limits,
) -> int:
    """Ends the requests that an earlier run has finished, with the answers that it gave.

    Rank 0 reads the file and tells the others which these are, so that all do the same even where
    each host has a disk of its own.

    Args:
      path: the --json file; if there is none, nothing was finished.
      settings: those of this run, as the file records them.
      requests: of this run, all of them, in order.
      processes: who this process is.
      limits: of the tokens of an answer.

    Returns:
      How many were finished.

    Raises:
      typer.BadParameter: if the file is damaged, or of a run with other prompts or settings. It is
        left as it is.
    """
    saved: dict[int, dict[str, Any]] = {}
    if processes.is_main and path.exists() and not is_stream(path):
        saved = _finished(path, settings, requests, limits)
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
    path: Path, settings: Mapping[str, Any], requests: Sequence[Request], limits: Limits
) -> dict[int, dict[str, Any]]:
    """The finished answers of a file, by number of the prompt."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise _refuse(path, f"cannot be read as results ({error})") from None
    _check(path, _malformed(content, limits.vocab_size))
    prompts, before = content["prompts"], content["settings"]
    if [prompt["prompt_ids"] for prompt in prompts] != [list(r.prompt_ids) for r in requests]:
        raise _refuse(path, "holds results of other prompts")
    for name in sorted({*before, *settings} - {*_HARMLESS}):
        if before.get(name) != settings.get(name):
            was, now = _short(before.get(name)), _short(settings.get(name))
            raise _refuse(path, f"holds results with {_short(name)[1:-1]}={was}, not {now}")
    _check(path, _not_finished(prompts, requests, limits.stop_id))
    return {key: prompt for key, prompt in enumerate(prompts) if prompt["finished"]}


def _malformed(content: Any, vocab_size: int) -> Iterator[str]:
    """What is not as a run writes it, a line for each."""
    wrong = list(_wrong_types("", content, {"prompts": list, "settings": dict}))
    yield from wrong
    for key, prompt in enumerate(() if wrong else content["prompts"]):
        entry = f"prompts[{key}]"
        wrong = list(
            _wrong_types(entry, prompt, {"prompt_ids": list, "ids": list, "finished": bool})
        )
        yield from wrong
        for name in () if wrong else ("prompt_ids", "ids"):
            for index, token in enumerate(prompt[name]):
                if type(token) is not int or not 0 <= token < vocab_size:
                    where = f"{entry}.{name}[{index}]"
                    yield f"{where} = {_short(token)} must be a token, from 0 to {vocab_size - 1}"


def _wrong_types(entry: str, found: Any, kinds: Mapping[str, type]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{entry or 'the whole'} = {_short(found)} must be an object"
        return
    for name, kind in kinds.items():
        where, words = f"{entry}.{name}".lstrip("."), _WORDS[kind]
        if name not in found:
            yield f"{where} is missing; it must be {words}"
        elif type(found[name]) is not kind:
            yield f"{where} = {_short(found[name])} must be {words}"


def _not_finished(prompts: list[Any], requests: Sequence[Request], stop_id: int) -> Iterator[str]:
    """Answers that are called finished and cannot be, a line for each."""
    for key, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        ids, ending, most = prompt["ids"], prompt.get("ending"), request.max_new_tokens
        whole = {
            "stop": len(ids) <= most and ids[-1:] == [stop_id] and stop_id not in ids[:-1],
            "length": len(ids) == most and stop_id not in ids,
        }
        if prompt["finished"] and not any(whole[name] for name in whole if name == ending):
            yield (
                f"prompts[{key}] is finished by {_short(ending)} after {len(ids)} tokens; it must "
                f"be by 'stop', with the token {stop_id}, or by 'length', after {most}"
            )


def _check(path: Path, mistakes: Iterator[str]) -> None:
    if lines := list(itertools.islice(mistakes, _MISTAKES_SHOWN)):
        raise _refuse(path, "\n  ".join(["cannot be read as results:", *lines]) + "\n")


def _refuse(path: Path, why: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{path} {why}; to begin anew leave out --resume, or name another --json file",
        param_hint="--resume",
    )
