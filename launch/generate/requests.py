"""What goes into the engine and comes out of it: requests, sizes, events, work done."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

Ending = Literal["stop", "length", "interrupted", "error"]


@dataclasses.dataclass
class Request:
    """A prompt and what becomes of it.

    Attributes:
      key: names the prompt; those with lower keys are read first.
      prompt_ids: its tokens.
      max_new_tokens: the answer ends after this many.
      temperature: 0 takes the likeliest token each time.
      seed: with the position, decides what a temperature above 0 draws.
      ids: the answer so far, the stop token included.
      ending: why it ended: the model's "stop" token, the "length" asked for, "interrupted", or
        "error", for which `error` says more; None while it has not.
      num_prefilled: prompt tokens that are in the cache.
      started, first_token, ended: seconds on the engine's clock, which stands still during
        compilation; None if that has not happened.
      first_logits: [vocab] float32, what the first token was chosen from, if asked for.
    """

    key: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    ending: Ending | None = None
    error: str | None = None
    num_prefilled: int = 0
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    first_logits: np.ndarray | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.ending in ("stop", "length")

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding, while this prompt shared the device with others."""
        if self.first_token is None or self.ended is None or len(self.ids) < 2:
            return None
        return (len(self.ids) - 1) / max(self.ended - self.first_token, 1e-9)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The size of the engine: fixed when it starts, since programs are compiled for it.

    Attributes:
      num_rows: sequences that run at the same time, divisible by the data shards.
      num_pages: pages of the pool, divisible by the page shards.
      page_size: tokens per page.
      max_blocks: pages that the longest sequence may have.
    """

    num_rows: int
    num_pages: int
    page_size: int
    max_blocks: int


@dataclasses.dataclass
class Stats:
    """Work done so far. Seconds are without compilation, which is counted apart.

    A step may read prompt tokens and add to answers at once. Its time cannot be divided: it counts
    in full as prefill and as decode, each of which is thus what prompts, or answers, waited for.
    """

    steps: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def count(self, num_read: int, num_made: int, seconds: float) -> None:
        """Adds a step that read prompt tokens and lengthened answers."""
        self.steps += 1
        self.seconds += seconds
        if num_read:
            self.prefill_tokens += num_read
            self.prefill_seconds += seconds
        if num_made:
            self.decode_tokens += num_made
            self.decode_steps += 1
            self.decode_seconds += seconds


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to show: a request "started", "read" a chunk, got a "token", or "ended"."""

    kind: Literal["started", "read", "token", "ended"]
    request: Request
    token: int | None = None


def num_cached_tokens(num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that a sequence may have in the cache: no later token attends to its last one."""
    return num_prompt_tokens + max_new_tokens - 1
