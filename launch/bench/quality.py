"""What a quantised cache costs in quality: `python -m launch.bench.quality FILE.json`.

SmolLM2-135M in float32 reads and writes the same texts with caches of each dtype; all else is the
same. Takes 20 minutes of processor time.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shardpage import PagedKVCache

from ..devices import open_mesh
from ..generate.engine import PROMPT_TOKENS, Engine
from ..generate.requests import Pool, Request
from ..generate.smollm2 import GGUFFile, Model, Weights, find_weights, put_weights
from ..generate.smollm2.model import Batch
from ..verify import oracle
from .report import environment

ROOT = Path(__file__).parents[2]
TEXT, CALIBRATION = "launch/MULTIHOST.md", "meshes/README.md"
PROMPTS = "tests/data/smollm2_public.json"
NUM_TOKENS, TOKENS_PER_STEP, PAGE_SIZE = 2000, 100, 16
# Beginnings of answers: the short prompts of the tests, and passages of the text.
NUM_PASSAGES, PASSAGE, NUM_NEW = 5, 48, 64
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
SCALE_DTYPES = ("float32", "bfloat16")


class Kind(NamedTuple):
    """A kind of cache; the first of all is what the others are compared with."""

    dtype: str
    scale: str = ""


EXACT = Kind("float32")
KINDS = (EXACT, Kind("bfloat16"), *(Kind(d, s) for d in QUANTISED for s in ("token", "head")))


@dataclasses.dataclass(frozen=True)
class Reader(Model):
    """Gives the logits of every token, where a model gives those of each row's last."""

    def _last_tokens(self, batch: Batch) -> jax.Array:
        return jnp.arange(len(batch.tokens))


class Served(NamedTuple):
    """The model, ready to run."""

    model: Model
    weights: Weights
    largest: tuple[np.ndarray, np.ndarray]  # key and value elements of each [layers, kv_heads]

    def scales(self, kind: Kind) -> Any:
        """What `PagedKVCache.zeros` takes."""
        if kind.scale != "head":
            return kind.scale or None
        return tuple(x / oracle.largest(kind.dtype) for x in self.largest)

    def cache(self, kind: Kind, num_tokens: int) -> PagedKVCache:
        """An empty cache for one text."""
        num_pages = -(-num_tokens // PAGE_SIZE)
        return self.model.empty_cache(num_pages, PAGE_SIZE, kind.dtype, self.scales(kind))


def measure(kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """The report."""
    file = GGUFFile(find_weights())
    config, tokenizer = file.config(), file.tokenizer()
    model = Model(config, open_mesh("data=1", None, num_kv_heads=config.num_kv_heads))
    weights = put_weights(file.weights(), model.split, jnp.float32)
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in (TEXT, CALIBRATION)}
    tokens, others = (tokenizer.encode(text)[: NUM_TOKENS + 1] for text in texts.values())
    public = [each["prompt_ids"] for each in json.loads((ROOT / PROMPTS).read_text()).values()]
    prompts = [ids for ids in public if len(ids) <= PASSAGE]
    starts = np.linspace(0, NUM_TOKENS - PASSAGE, NUM_PASSAGES).astype(int)
    prompts += [tokens[start : start + PASSAGE] for start in starts]

    nothing = np.zeros((config.num_layers, config.num_kv_heads))
    served = Served(model, weights, (nothing, nothing))
    served = served._replace(largest=_largest(_read(served, [EXACT], others)[EXACT]))
    read = _read(served, kinds, tokens)
    answers = {kind: _answers(served, kind, prompts) for kind in kinds}
    rows = [
        kind._asdict() | read_by_kind.figures() | _equal(answers[kind], answers[EXACT])
        for kind, read_by_kind in read.items()
    ]
    return environment("python -m launch.bench.quality FILE") | {
        "model": "SmolLM2-135M-Instruct, float32",
        "text": {"file": TEXT, "tokens": NUM_TOKENS, "sha256": _sha256(texts[TEXT])},
        "calibration": {"file": CALIBRATION, "tokens": _num_read(others),
                        "sha256": _sha256(texts[CALIBRATION])},
        "prompts": len(prompts),
        "new_tokens": NUM_NEW,
        "rows": rows,
        "scales": list(_scale_errors(read[EXACT].cache)),
    }  # fmt: skip


def _num_read(tokens: Sequence[int]) -> int:
    """How many of a text's tokens whole steps read, each followed by another."""
    return (len(tokens) - 1) // TOKENS_PER_STEP * TOKENS_PER_STEP


class Read:
    """A text as one kind of cache reads it: sums over its tokens."""

    def __init__(self, cache: PagedKVCache):
        self.cache = cache
        self.largest_error = self.sum_of_errors = self.nll = 0.0
        self.num_likeliest = self.num_tokens = 0

    def add(self, logits: jax.Array, exact: jax.Array, targets: np.ndarray) -> None:
        """Adds a step's `[tokens, vocab]`."""
        most, mean, nll, likeliest = map(float, _compare(logits, exact, targets))
        self.largest_error = max(self.largest_error, most)
        self.sum_of_errors += mean * len(targets)
        self.nll += nll
        self.num_likeliest += int(likeliest)
        self.num_tokens += len(targets)

    def figures(self) -> dict[str, float]:
        """Means over the text."""
        cache = self.cache
        page_bytes = cache.format.page_bytes * (cache.num_layers or 1)
        return {
            "bytes_per_token": page_bytes // cache.format.page_size,
            "largest_logit_error": round(self.largest_error, 4),
            "mean_logit_error": round(self.sum_of_errors / self.num_tokens, 5),
            "same_likeliest": round(self.num_likeliest / self.num_tokens, 4),
            "perplexity": round(float(np.exp(self.nll / self.num_tokens)), 4),
        }


@jax.jit
def _compare(logits: jax.Array, exact: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    errors = jnp.abs(logits - exact)
    log_weights = jax.nn.log_softmax(logits)
    nll = -jnp.sum(log_weights[jnp.arange(len(targets)), targets])
    likeliest = jnp.sum(jnp.argmax(logits, -1) == jnp.argmax(exact, -1))
    return jnp.max(errors), jnp.mean(errors), nll, likeliest


def _read(served: Served, kinds: Sequence[Kind], tokens: Sequence[int]) -> dict[Kind, Read]:
    """Reads a text with each kind of cache, some tokens at a time, in step."""
    read = {kind: Read(served.cache(kind, len(tokens))) for kind in kinds}
    reader = Reader(served.model.config, served.model.mesh)
    for batch, targets in _steps(tokens, read[kinds[0]].cache.num_pages):
        exact = None
        for of_kind in read.values():
            result = reader.step(served.weights, of_kind.cache, batch)
            of_kind.cache, exact = result.cache, result.logits if exact is None else exact
            of_kind.add(result.logits, exact, targets)
        print(".", end="", file=sys.stderr, flush=True)
    return read


def _steps(tokens: Sequence[int], num_pages: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Steps through a text, as many rows as tokens of which the first has all; and the token that
    follows each."""
    size = TOKENS_PER_STEP
    for first in range(0, _num_read(tokens), size):
        batch = Batch.empty(size, size, num_pages)
        batch.tokens[:], batch.query_lens[0] = tokens[first : first + size], size
        batch.context_lens[0] = first + size
        batch.tables[0] = np.arange(num_pages)
        yield batch, np.array(tokens[first + 1 : first + size + 1])


def _tokens_of(cache: PagedKVCache) -> list[np.ndarray]:
    """Keys and values of a blocks-first cache of one text, `[layers, kv_heads, tokens, dim]`."""
    arrays = (np.asarray(x, np.float32).swapaxes(1, 2) for x in cache.arrays)
    return [x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :NUM_TOKENS] for x in arrays]


def _largest(read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Of keys and of values, the largest element of each layer and KV head."""
    key, value = (np.abs(x).max(axis=(2, 3)) for x in _tokens_of(read.cache))
    return key, value


def _answers(served: Served, kind: Kind, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest tokens after each prompt; answers go on behind their end."""
    requests = [Request(key, ids, NUM_NEW) for key, ids in enumerate(prompts)]
    blocks = [-(-(len(ids) + NUM_NEW) // PAGE_SIZE) for ids in prompts]
    pool = Pool(len(prompts), sum(blocks), PAGE_SIZE, max(blocks))
    cache = {"dtype": kind.dtype, "scales": served.scales(kind)}
    engine = Engine(
        served.model, served.weights, pool, **cache, stop_id=-1, step_tokens=PROMPT_TOKENS[-1]
    )
    for _ in engine.run(requests):
        pass
    print("+", end="", file=sys.stderr, flush=True)
    return [request.ids for request in requests]


def _equal(answers: list[list[int]], exact: list[list[int]]) -> dict[str, float]:
    """How many tokens of an answer are the exact one's, before the first that is not."""
    equal = [
        int(np.argmin([*np.equal(ids, wanted), False]))
        for ids, wanted in zip(answers, exact, strict=True)
    ]
    return {"equal_least": min(equal), "equal_median": float(np.median(equal))}


def _scale_errors(cache: PagedKVCache) -> Iterator[dict[str, Any]]:
    """What scales of tokens in float32, and in bfloat16, leave of the text's keys and values."""
    both = np.concatenate(_tokens_of(cache))
    size = np.sqrt(np.mean(both**2))
    for dtype in QUANTISED:
        for scale_dtype in SCALE_DTYPES:
            errors = oracle.quantised(both, dtype, scale_dtype=scale_dtype) - both
            rms = float(np.sqrt(np.mean(errors**2)) / size)
            yield {"dtype": dtype, "scale_dtype": scale_dtype, "rms_error": round(rms, 6)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
