"""Measures whether a long prompt holds up running answers: `python -m launch.generate.mixed_load`.

Eight answers are being made when a prompt of 1500 tokens arrives. What counts is the time between
two tokens of an answer: before that, and the longest while the prompt is read. Processor time is
shown beside it, since a machine with other work to do makes some steps slow that are not.
"""

import json
import statistics
import time

import jax.numpy as jnp
import numpy as np

from launch.devices import open_mesh
from launch.generate.engine import Engine
from launch.generate.requests import Pool, Request
from launch.generate.smollm2 import GGUFFile, Model, find_weights, put_weights

NUM_ANSWERS, LONG, USUAL = 8, 1500, 16


def main() -> None:
    """Prints one JSON object; times are milliseconds."""
    file = GGUFFile(find_weights())
    config = file.config()
    model = Model(config, open_mesh(None, None, num_kv_heads=config.num_kv_heads))
    weights = put_weights(file.weights(), model.split, jnp.float32)
    pool = Pool(num_rows=NUM_ANSWERS + 1, num_pages=192, page_size=16, max_blocks=128)
    engine = Engine(model, weights, pool, dtype=jnp.float32, stop_id=-1)
    for _ in engine.run(_requests(config.vocab_size, max_new_tokens=USUAL + 2)):  # compiles
        pass
    gaps: dict[str, list[tuple[float, float]]] = {"usual": [], "mixed": []}
    requests = _requests(config.vocab_size, max_new_tokens=128)
    running, prompt = requests[0], requests[-1]
    before = None
    for event in engine.run(requests):
        if event.request is running and event.kind == "token":
            now = (engine.clock(), time.process_time())
            if before is not None and prompt.num_prefilled < LONG:
                kind = "mixed" if prompt.num_prefilled else "usual"
                gaps[kind].append((now[0] - before[0], now[1] - before[1]))
            before = now
    print(json.dumps(_summary(gaps, prompt)))


def _requests(vocab_size: int, max_new_tokens: int) -> list[Request]:
    """Answers that outlast the long prompt, which waits for the row of a short one."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(3, vocab_size, count).tolist()
    answers = [Request(key, draw(16), max_new_tokens) for key in range(NUM_ANSWERS)]
    last = Request(NUM_ANSWERS, draw(16), USUAL)
    return [*answers, last, Request(NUM_ANSWERS + 1, draw(LONG), 1)]


def _summary(gaps: dict[str, list[tuple[float, float]]], prompt: Request) -> dict[str, float | int]:
    assert prompt.first_token is not None
    assert prompt.started is not None
    found: dict[str, float | int] = {"steps": len(gaps["mixed"])}
    for column, name in enumerate(("wall", "processor")):
        usual = statistics.median(gap[column] for gap in gaps["usual"])
        mixed = [gap[column] for gap in gaps["mixed"]]
        found |= {
            f"{name}_usual": round(usual * 1e3),
            f"{name}_mixed": round(statistics.median(mixed) * 1e3),
            f"{name}_slowest": round(max(mixed) * 1e3),
            f"{name}_slowest_over_usual": round(max(mixed) / usual, 2),
        }
    return found | {"first_token_s": round(prompt.first_token - prompt.started, 2)}


if __name__ == "__main__":
    main()
