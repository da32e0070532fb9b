"""What is asked: a model's attention, for how many sequences, how long, in what pages."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal, Self, get_args

KVLayoutName = Literal["blocks_first", "heads_first", "fused"]
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Dtypes of quantised caches, and the bytes of one token's scale.
QUANTISED, SCALE_BYTES = {"int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}, 4


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Layers of a model that attend alike.

    Attributes:
      count: how many there are.
      window: how many tokens they look back; None for all.
    """

    count: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of a model's attention.

    Attributes:
      scale: factor on the logits; None for `head_dim ** -0.5`.
      soft_cap: of the logits, or None.
      sinks: whether each query head has a sink logit.
      source: where these figures are from.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    source: str = "given on the command line"

    @classmethod
    def preset(cls, name: str) -> Self:
        """A model from `models.json`.

        Raises:
          ValueError: for an unknown one, listing the known; for one that cannot run, saying why.
        """
        presets = _presets()
        if name not in presets:
            known = [n for n, entry in presets.items() if "refused" not in entry]
            raise ValueError(
                f"unknown model {name!r}; known are {', '.join(known)}. Or give --layers, --heads, "
                f"--kv-heads and --head-dim"
            )
        entry = dict(presets[name])
        if "refused" in entry:
            raise ValueError(f"{name} cannot be planned: {entry['refused']}")
        layers = tuple(LayerKind(**kind) for kind in entry.pop("layers"))
        return cls(name=name, layers=layers, **entry)

    @property
    def num_layers(self) -> int:
        """All layers."""
        return sum(kind.count for kind in self.layers)


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("launch.plan").joinpath("models.json").read_text()
    return json.loads(text)


def preset_names() -> list[str]:
    """All presets, the refused ones too."""
    return list(_presets())


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step: `batch` sequences of `context` tokens each, the last of which are new.

    Attributes:
      model: whose attention.
      batch: sequences over all devices.
      context: tokens of each, the new ones included.
      new_tokens: of each: one where it decodes, more where it reads a chunk of its prompt.
      page_size: tokens per page.
      dtype: of the cache; quantised ones have a scale of each token.
      query_dtype: of queries and outputs, and of the new tokens of a quantised cache.
      kv_layout: of the cache; None for what suits the devices.
      backend: of `page_attention` and `write_kv`; None for the library's choice.
    """

    model: Model
    batch: int = 256
    context: int = 8192
    page_size: int = 64
    dtype: str = "bfloat16"
    query_dtype: str = "bfloat16"
    kv_layout: KVLayoutName | None = None
    backend: str | None = None
    new_tokens: int = 1

    def __post_init__(self) -> None:
        sizes = {"batch": self.batch, "context": self.context, "page size": self.page_size}
        sizes |= {"new tokens": self.new_tokens}
        sizes |= {"layers": self.model.num_layers, "head_dim": self.model.head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more; got {size}")
        if self.new_tokens > self.context:
            raise ValueError(
                f"new tokens must be among the {self.context} of a context; got {self.new_tokens}"
            )
        caches = ITEMSIZE | QUANTISED
        for name, dtype, known in (
            ("dtype", self.dtype, caches),
            ("query dtype", self.query_dtype, ITEMSIZE),
        ):
            if dtype not in known:
                raise ValueError(f"{name} {dtype!r} is none of {', '.join(known)}")
        if self.kv_layout not in (None, *get_args(KVLayoutName)):
            known = ", ".join(get_args(KVLayoutName))
            raise ValueError(f"KV layout {self.kv_layout!r} is none of {known}")

    @property
    def new_dtype(self) -> str:
        """Of keys and values that are written."""
        return self.query_dtype if self.dtype in QUANTISED else self.dtype

    @property
    def head_bytes(self) -> int:
        """Bytes of a token's key and value, or of their elements and scales, of one KV head."""
        if self.dtype in QUANTISED:
            return 2 * (self.model.head_dim * QUANTISED[self.dtype] + SCALE_BYTES)
        return 2 * self.model.head_dim * ITEMSIZE[self.dtype]

    @property
    def pages_per_seq(self) -> int:
        """Pages of a sequence."""
        return -(-self.context // self.page_size)

    @property
    def num_queries(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.new_tokens

    def window_pages(self, kind: LayerKind) -> int:
        """Pages of a sequence that these layers read."""
        before = self.context - self.new_tokens + 1  # tokens that the first new one may see
        if kind.window is None or kind.window >= before:
            return self.pages_per_seq
        return self.pages_per_seq - (before - kind.window) // self.page_size

    def flops(self, kind: LayerKind) -> int:
        """Of one such layer's two products, for what the new tokens see and no more."""
        first = self.context - self.new_tokens + 1
        seen = (min(tokens, kind.window or tokens) for tokens in range(first, self.context + 1))
        return 4 * self.model.num_heads * self.model.head_dim * self.batch * sum(seen)
