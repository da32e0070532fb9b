"""GGUF files from anywhere: they load as what they say, or are refused in words, at once."""

import os
import struct
import time
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from launch.__main__ import app
from launch.generate.smollm2 import BadGGUF, GGUFFile

from . import tiny_model

NUM_MUTATIONS = 400
EXTREMES = (0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**32, 2**63, 2**64 - 1)


@pytest.fixture
def path(tmp_path):
    tiny_model.write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def load(path):
    """Everything that a run reads of a file; the shapes of its weights."""
    file = GGUFFile(path)
    file.config()
    file.tokenizer().encode_chat("a1 <|im_end|>")
    return jax.tree.map(np.shape, file.weights())


def text(content: str | bytes) -> bytes:
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def header(*parts: bytes, tensors=0, fields=1, version=3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, fields) + b"".join(parts)


def field(kind: int, value: bytes, name: str | bytes = "x") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(*dims: int, kind=0, offset=0, name="x") -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GGU", "byte 0: is no GGUF file"),
        (header(version=1), "byte 0: is no GGUF file of version 2 or 3"),
        (header()[:20], "byte 8: 16 bytes do not fit in the 12 bytes left"),
        (header(tensors=2**63), "byte 24: 1 fields do not fit in the 0 bytes"),
        (header(fields=2**63), "byte 24: 9223372036854775808 fields do not fit in the 0 bytes"),
        (header(tensors=2**63, fields=0), "byte 24: 9223372036854775808 tensors do not fit"),
        (header(text("x" * 20)), "byte 52: 4 bytes do not fit"),
        (header(struct.pack("<Q", 2**63), b"x" * 9), "byte 32: 9223372036854775808 bytes of text"),
        (header(field(4, b"1234", name=b"ab\xff")), "byte 34: is no UTF-8"),
        (header(field(8, text(b"ab\xff"))), "byte 47: is no UTF-8"),
        (header(field(13, b"1234")), "byte 37: a value of the unknown type 13"),
        (header(field(9, array(9, 1, array(9, 1)))), "byte 37: an array of type 9 is neither"),
        (header(field(9, array(8, 2**60))), "byte 49: 1152921504606846976 texts do not fit"),
        (header(field(9, array(12, 2**61))), "byte 49: 2305843009213693952 numbers do not fit"),
        (header(field(4, b"1234") * 2, fields=2), "byte 41: 'x' is there twice"),
        (
            header(field(4, struct.pack("<I", 0), name="general.alignment")),
            "byte 24: general.alignment = 0 must be a power of two",
        ),
        (header(tensor(*[1] * 5), fields=0, tensors=1), "byte 33: a tensor of 5 dimensions"),
        (header(tensor(8, kind=99), fields=0, tensors=1), "quantised in an unknown way, 99"),
        (header(tensor(8, kind=8), fields=0, tensors=1), "rows of 8; it must be a multiple of 32"),
        (header(tensor(2**63, 2**63), fields=0, tensors=1), "is not in the .* bytes left for it"),
        (header(tensor(8, offset=32), fields=0, tensors=1), "begins at 32, not 0"),
        (header(tensor(8), b"\0" * 20, fields=0, tensors=1), "is not in the 13 bytes left"),
        (header(field(4, b"1234")), "holds a None model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_headers_are_refused_at_once(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert_refused(path, message)


def assert_refused(path, message):
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(BadGGUF, match=message) as found:
            load(path)
        assert str(found.value).startswith(str(path))
        assert time.process_time() - began < 1.0
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_a_header_that_never_ends_is_given_up(tmp_path):
    path = tmp_path / "long.gguf"
    path.write_bytes(header(field(9, array(8, 2**21))))
    os.truncate(path, 2**30)  # of empty texts, and no bytes on the disk
    assert_refused(path, "byte 49: 2097152 texts do not fit in the 16777167 bytes left of the file")


LLAMA = "llama."
HEADS = f"{LLAMA}attention.head_count"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("general.architecture", "mamba", "holds a 'mamba' model"),
        (f"{LLAMA}block_count", 2**32 - 1, "block_count = 4294967295 must be over 0, up to"),
        (f"{LLAMA}block_count", 2**31 - 1, r"has no tensor 'blk.2.attn_norm.weight'"),
        (f"{LLAMA}block_count", 1, r"tensor 'blk.1.* is none of a llama-like model"),
        (f"{LLAMA}embedding_length", None, "has no field 'llama.embedding_length'"),
        (HEADS, 0, "head_count = 0 must be over 0"),
        (f"{HEADS}_kv", 0, "head_count_kv = 0 must be over 0"),
        (f"{HEADS}_kv", 4, "96 elements must divide into 6 heads of an even size, .* 4 KV heads"),
        (f"{HEADS}_kv", 1, "attn_k.weight' has the shape .48, 96.; it must be .16, 96."),
        (f"{LLAMA}rope.freq_base", float("nan"), "freq_base = nan must be over 0"),
        (f"{LLAMA}rope.freq_base", True, "freq_base = True must be a floating"),
        (f"{LLAMA}context_length", "512", "context_length = '512' must be a whole number"),
        (f"{LLAMA}vocab_size", 259, "token_embd.weight' has the shape"),
        ("tokenizer.ggml.tokens", ["a"], "1 tokens, 1 of them different, with 260 types"),
        ("tokenizer.ggml.tokens", [1, 2], r"tokens = array\(.* must be texts"),
        ("tokenizer.ggml.tokens", ["a"] * 260, "260 tokens, 1 of them different"),
        ("tokenizer.ggml.merges", ["no such"], "no usable vocabulary: .*no.* out of vocabulary"),
        ("tokenizer.ggml.merges", ["ab"], "no usable vocabulary"),
        ("tokenizer.ggml.eos_token_id", 260, "the stop token, 260, must be below 260"),
        ("tokenizer.ggml.token_type", None, "has no field 'tokenizer.ggml.token_type'"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(tmp_path, name, value, message):
    path = tmp_path / "tiny.gguf"
    write_with(path, name, value)
    assert_refused(path, message)


def write_with(path, name, value):
    """Writes the tiny model with one field changed, or left out."""
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}

    def change(file: gguf.GGUFWriter) -> None:
        del file.kv_data[0][name]
        if value is not None:
            file.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]])

    tiny_model.write(path, change)


def test_mutations_load_the_same_shapes_or_are_refused(path):
    whole, shapes = path.read_bytes(), load(path)
    end = GGUFFile(path)._header.start
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(NUM_MUTATIONS):
        content = mutated(whole, end, rng)
        with path.open("r+b") as file:
            file.write(content[:end])
            file.truncate(len(content))
        try:
            assert load(path) == shapes, number
        except BadGGUF:
            refused += 1
        path.write_bytes(whole)
    assert NUM_MUTATIONS / 2 < refused < NUM_MUTATIONS


def mutated(whole: bytes, end: int, rng: np.random.Generator) -> bytes:
    """The file with bytes of its header changed, or cut off at one of them."""
    content = bytearray(whole)
    at = int(rng.integers(end))
    kind = rng.integers(5)
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        content[at : at + 8] = int(rng.choice(np.array(EXTREMES, object))).to_bytes(8, "little")
    elif kind == 3:
        other = int(rng.integers(end - 16))
        content[at : at + 16] = whole[other : other + 16]
    else:
        del content[at : at + int(rng.integers(1, 16))]
    return bytes(content)


def test_a_damaged_file_ends_the_job_in_words(path, monkeypatch):
    os.truncate(path, 1000)
    monkeypatch.setenv("SHARDPAGE_WEIGHTS", str(path))
    result = CliRunner().invoke(app, ["generate", "-p", "x"])
    assert result.exit_code == 1
    assert f"error: {path}, byte " in result.output
