"""`shardpage generate`: a real language model answers prompts, its attention paged and sharded."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from ..json_file import read_json
from . import options


def generate(
    mesh: options.Mesh = None,
    simulate: options.Simulate = None,
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="A file with a prompt on each line, or FILE.json with a list of prompts; - is "
            "standard input, which is also read if there is no other prompt.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Length of an answer, at most.")] = 128,
    temperature: Annotated[
        float, Option(min=0.0, help="0 takes the likeliest token; higher is more varied.")
    ] = 0.0,
    seed: Annotated[int, Option(min=0, help="Seed for a temperature above 0.")] = 0,
    page_size: Annotated[
        int | None,
        Option(min=1, help="Tokens per page. Default: 16; of a quantised cache on TPUs, 64."),
    ] = None,
    num_pages: Annotated[
        int | None,
        Option(min=1, help="Pages of the pool, over all devices. Default: enough for the batch."),
    ] = None,
    batch: Annotated[
        int | None,
        Option(min=1, help="Prompts that run at the same time, rounded up to the data shards."),
    ] = None,
    step_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens of a step on each data shard, at most, while answers are made: one for "
            "each of them (always), the rest for prompts. Fewer keep answers steady while a long "
            "prompt is read, more read it sooner. Default: half as many again as rows, and up to "
            "the next power of two; at least 16.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], Option(help="Dtype of the weights.")
    ] = "float32",
    kv_dtype: Annotated[
        options.KVDtype | None,
        Option(
            help="Dtype of the KV cache: int8 and fp8 are quantised, with a scale per token and KV "
            "head. Default: that of the weights."
        ),
    ] = None,
    json_file: options.Json = None,
    raw: Annotated[
        bool, Option("--raw", help="Prompts are in chat form already, or no chat at all.")
    ] = False,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Keep the answers that the --json file has whole. Restarts of shardpage simulate "
            "do so by themselves.",
        ),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer prompts with SmolLM2-135M, its KV cache in pages over a mesh of devices.

    Without --mesh all devices go to context. A machine that has only a CPU simulates as many
    devices as --mesh asks for. --json is written as prompts finish, each time whole.
    """
    from ..generate import serve
    from ..generate.smollm2 import BadGGUF, MissingWeights

    chosen = serve.Options(
        mesh=mesh,
        simulate=simulate,
        prompts=read_prompts(prompt or [], prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        page_size=page_size,
        num_pages=num_pages,
        batch=batch,
        step_tokens=step_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
        json_file=json_file,
        raw=raw,
        resume=resume,
        quiet=quiet,
    )
    if resume and json_file is None:
        raise typer.BadParameter("needs the --json FILE to resume", param_hint="--resume")
    try:
        with options.stoppable():
            all_finished = serve.run(chosen)
    except (BadGGUF, MissingWeights) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not all_finished:
        raise typer.Exit(1)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, of a file and of standard input, in this order.

    Raises:
      typer.BadParameter: if there are none, or the file cannot be read.
    """
    prompts = list(given)
    if file is not None and str(file) != "-":
        try:
            prompts += _read_file(file)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{file}: {error}", param_hint="--prompts") from None
    elif file is not None or (not prompts and sys.stdin and not sys.stdin.isatty()):
        try:
            prompts += _lines(sys.stdin.read() if sys.stdin else "")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"standard input: {error}", param_hint="--prompts") from None
    if not prompts:
        raise typer.BadParameter(
            "there is no prompt; give one, e.g. --prompt 'What is the capital of France?', a file "
            "with --prompts FILE, or lines on standard input",
            param_hint="--prompt",
        )
    for number, prompt in enumerate(prompts, 1):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise typer.BadParameter(
                f"prompt {number} is no text: {ascii(prompt)[:70]}; write it in UTF-8",
                param_hint="--prompt",
            )
    return prompts


def _read_file(file: Path) -> list[str]:
    if file.suffix != ".json":
        return _lines(file.read_text(encoding="utf-8"))
    prompts = read_json(file)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("a JSON file of prompts must hold a list of texts")
    return prompts


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
