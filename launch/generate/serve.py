"""A run of `shardpage generate`: model, mesh and pool from the options, then serve the prompts."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh
from rich.console import Console

from shardpage.page_format import QUANTISED

from ..devices import describe_mesh, is_simulated, mesh_text, open_mesh
from ..json_file import JsonOption
from ..processes import bootstrap, guard
from . import results, resume, smollm2
from .console import open_output
from .engine import Engine
from .requests import Pool, Request, num_cached_tokens

# Tokens per page. Of one byte per element a TPU's tiles have 32 rows, of two tokens of this model.
PAGE, TPU_QUANTISED_PAGE = 16, 64
# The widest batch of sequences on one data shard, unless the options say otherwise.
ROWS_PER_SHARD = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the job, as `launch.jobs.generate` documents them."""

    prompts: list[str]
    mesh: str | None = None
    simulate: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    page_size: int | None = None
    num_pages: int | None = None
    batch: int | None = None
    step_tokens: int | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None
    json_file: Path | None = None
    raw: bool = False
    resume: bool = False
    quiet: bool = False


def run(options: Options) -> bool:
    """Serves the prompts of the options and shows what comes of it.

    Returns:
      Whether all of them were answered.

    Raises:
      typer.BadParameter: if options do not fit each other, the model or the devices.
      launch.generate.smollm2.MissingWeights: if there is no model.
      launch.generate.smollm2.BadGGUF: if its file cannot be used.
    """
    began = time.perf_counter()
    file = smollm2.GGUFFile(smollm2.find_weights())
    config = file.config()
    mesh = open_mesh(options.mesh, options.simulate, num_kv_heads=config.num_kv_heads)
    options = dataclasses.replace(options, page_size=choose_page_size(options, mesh))
    tokenizer = file.tokenizer()
    encode = tokenizer.encode if options.raw else tokenizer.encode_chat
    requests = [
        Request(key, encode(prompt), options.max_new_tokens, options.temperature, seed)
        for key, prompt in enumerate(options.prompts)
        for seed in [prompt_seed(options.seed, key)]
    ]
    processes = bootstrap.initialize()
    report = _Report(options, mesh, requests, tokenizer, processes.is_main)
    num_done = 0
    if options.json_file and (options.resume or processes.attempt):
        limits = resume.Limits(config.vocab_size, tokenizer.stop_id)
        num_done = resume.restore(options.json_file, report.settings(), requests, processes, limits)
    waiting = [request for request in requests if request.ending is None]
    # before the work: a path that cannot be written to is an error now
    report.write(last=not waiting)
    if not waiting:
        report.file.close()
        return True
    model = smollm2.Model(config, mesh)
    shards = model.layout.shards(mesh)
    pool = choose_pool(options, waiting, shards.seqs, shards.context, config.max_context_len)

    engine = None
    progress = lambda: report.progress(engine)
    try:
        with open_output(
            options.prompts, progress, speaks=processes.is_main, quiet=options.quiet
        ) as output:
            if num_done:
                output.status(f"{num_done} of {len(requests)} prompts were answered before")
            output.status(f"mesh {describe_mesh(mesh, is_simulated(mesh))}")
            output.status("reading weights ...")
            dtype = jnp.dtype(options.dtype)
            weights = smollm2.put_weights(file.weights(), model.split, dtype)
            engine = Engine(
                model,
                weights,
                pool,
                dtype=jnp.dtype(options.kv_dtype or dtype),
                stop_id=tokenizer.stop_id,
                step_tokens=options.step_tokens,
                on_compile=lambda what: output.status(f"compiling {what} ..."),
            )
            report.engine, report.load_seconds = engine, round(time.perf_counter() - began, 2)
            _show(engine, waiting, tokenizer, output, report)
    finally:
        guard.disarm()
        report.write(last=True)
        if engine is not None and processes.is_main:
            results.print_summary(engine, mesh, requests, Console())
    report.file.close()
    return all(request.finished for request in requests)


def _show(engine: Engine, requests: list[Request], tokenizer, output, report: "_Report") -> None:
    """Serves requests, passing their text on as it comes."""
    streams = {request.key: smollm2.TextStream(tokenizer) for request in requests}
    # closing: an exception here must also end the engine's loop, which then ends its requests
    with contextlib.closing(engine.run(requests)) as events:
        guard.step()
        for event in events:
            guard.step()
            index = event.request.key
            if event.kind == "started":
                output.started(index)
            elif event.token is not None:
                output.write(index, streams[index].push(event.token))
            elif event.kind == "ended":
                output.write(index, streams[index].flush())
                output.ended(index, event.request.error or "")
                report.write()
            output.tick()


def choose_page_size(options: Options, mesh: Mesh) -> int:
    """Tokens per page: small ones waste little at the end of an answer."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    quantised = options.kv_dtype in QUANTISED
    return options.page_size or (TPU_QUANTISED_PAGE if on_tpu and quantised else PAGE)


def choose_pool(
    options: Options,
    requests: list[Request],
    num_seq_shards: int,
    num_context_shards: int,
    max_context_len: int,
) -> Pool:
    """Sizes the batch and its pool of pages: by default enough for the longest to run together.

    Raises:
      typer.BadParameter: if --num-pages does not divide over the page shards.
    """
    wanted = options.batch or ROWS_PER_SHARD * num_seq_shards
    rows_per_shard = -(-min(wanted, len(requests)) // num_seq_shards)
    page_size = options.page_size or PAGE
    num_tokens = [num_cached_tokens(len(r.prompt_ids), r.max_new_tokens) for r in requests]
    blocks = sorted(
        (-(-n // page_size) for n in num_tokens if n <= max_context_len), reverse=True
    ) or [1]
    num_shards = num_seq_shards * num_context_shards
    per_shard = -(-sum(blocks[:rows_per_shard]) // num_context_shards)
    num_pages = options.num_pages or _power_of_two(per_shard) * num_shards
    if num_pages % num_shards:
        below = num_pages // num_shards * num_shards
        nearest = " or ".join(str(n) for n in (below, below + num_shards) if n)
        raise typer.BadParameter(
            f"{num_pages} pages do not divide over the {num_shards} page shards of the mesh "
            f"(data x context); use {nearest}",
            param_hint="--num-pages",
        )
    return Pool(
        num_rows=rows_per_shard * num_seq_shards,
        num_pages=num_pages,
        page_size=page_size,
        max_blocks=min(_power_of_two(blocks[0]), num_pages // num_seq_shards),
    )


def prompt_seed(seed: int, key: int) -> int:
    """A 31-bit seed for each prompt, so that equal prompts are not answered alike."""
    return int(np.random.SeedSequence((seed, key)).generate_state(1)[0] >> 1)


def _power_of_two(least: int) -> int:
    """The next one: of few different shapes, more programs are found in the compilation cache."""
    return max(8, 1 << (least - 1).bit_length())


class _Report:
    """The --json file, and the line of progress."""

    def __init__(self, options: Options, mesh, requests: list[Request], tokenizer, is_main: bool):
        self._options, self._mesh = options, mesh
        self._requests, self._tokenizer = requests, tokenizer
        self.file = JsonOption(options.json_file if is_main else None)
        self.engine: Engine | None = None
        self.load_seconds: float | None = None

    def write(self, *, last: bool = False) -> None:
        """Replaces the --json file, if one is wanted, by what is known now."""
        if self.file.path is not None:
            self.file.write(self._content(), last=last)

    def progress(self, engine: Engine | None) -> str:
        """One line: how far the run is, and how fast."""
        if engine is None:
            return ""
        stats, rates = engine.stats, results.rates(engine)
        num_ended = sum(request.ending is not None for request in self._requests)
        parts = [f"{num_ended} of {len(self._requests)} prompts done"]
        for count, step, what in (
            (stats.prefill_tokens, "prefill", "prompt tokens read"),
            (stats.decode_tokens, "decode", "tokens made"),
        ):
            rate = rates[f"{step}_tokens_per_second"]
            parts.append(f"{count} {what}" + (f" ({rate}/s)" if rate else ""))
        used = engine.pool.num_pages - engine.rows.allocator.num_free()
        return ", ".join([*parts, f"{used} of {engine.pool.num_pages} pages in use"])

    def settings(self) -> dict[str, Any]:
        """The options on which the answers may depend."""
        settings = dataclasses.asdict(self._options)
        for name in ("prompts", "json_file", "mesh", "simulate", "resume", "quiet"):
            del settings[name]
        return settings

    def _content(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "prompts": [self._prompt(request) for request in self._requests],
            "mesh": mesh_text(self._mesh),
            "simulated": is_simulated(self._mesh),
            "settings": self.settings(),
            "rates": {
                "load_seconds": self.load_seconds,
                **(results.rates(engine) if engine else {}),
            },
            "kv_bytes_per_token": engine.cache_bytes_per_token if engine else None,
            "devices": results.devices(engine, self._mesh) if engine else [],
        }

    def _prompt(self, request: Request) -> dict[str, Any]:
        speed = request.tokens_per_second
        return {
            "prompt": self._options.prompts[request.key],
            "prompt_ids": list(request.prompt_ids),
            "ids": request.ids,
            "text": self._tokenizer.decode(request.ids),
            "finished": request.finished,
            "ending": request.ending,
            "error": request.error,
            "tokens_per_second": None if speed is None else round(speed, 2),
        }
