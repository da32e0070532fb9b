"""What `python -m launch.bench.quality` counts, on the tiny model."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import quality
from launch.bench.quality import EXACT, Kind, Served
from launch.generate.smollm2 import GGUFFile, Model, put_weights

from . import tiny_model
from .cases import build_mesh
from .test_generate import dense_logits

NUM_TOKENS, COARSE = 16, Kind("float8_e5m2", "head")


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_model.write(path)
    return GGUFFile(path)


@pytest.fixture(scope="module")
def served(tiny_file):
    model = Model(tiny_file.config(), build_mesh("data=1"))
    largest = np.full((2, tiny_model.NUM_LAYERS, tiny_model.NUM_KV_HEADS), 4.0)
    weights = put_weights(tiny_file.weights(), model.split, jnp.float32)
    return Served(model, weights, (largest[0], largest[1]))


def test_a_text_is_read_as_a_dense_model_reads_it(tiny_file, served, monkeypatch):
    monkeypatch.setattr(quality, "TOKENS_PER_STEP", NUM_TOKENS // 2)
    monkeypatch.setattr(quality, "NUM_TOKENS", NUM_TOKENS)
    tokens = np.random.default_rng(3).integers(3, 259, NUM_TOKENS + 1).tolist()
    read = quality._read(served, (EXACT, COARSE), tokens)
    logits = np.stack([dense_logits(tiny_file, tokens[: n + 1]) for n in range(NUM_TOKENS)])
    log_weights = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -log_weights[np.arange(NUM_TOKENS), tokens[1:]]
    exact, coarse = (read[kind].figures() for kind in (EXACT, COARSE))
    assert exact["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    assert (exact["largest_logit_error"], exact["same_likeliest"]) == (0, 1)
    assert exact["bytes_per_token"] == 4 * coarse["bytes_per_token"]
    assert coarse["perplexity"] != exact["perplexity"]
    assert coarse["largest_logit_error"] > coarse["mean_logit_error"] > 0

    key, value = quality._tokens_of(read[EXACT].cache)
    sizes = tiny_model.NUM_LAYERS, tiny_model.NUM_KV_HEADS
    assert key.shape == value.shape == (*sizes, NUM_TOKENS, tiny_model.HEAD_DIM)
    most, _ = quality._largest(read[EXACT])
    assert most[1, 2] == np.abs(key[1, 2]).max() > 0
    errors = {(e["dtype"], e["scale_dtype"]): e["rms_error"]
              for e in quality._scale_errors(read[EXACT].cache)}  # fmt: skip
    assert errors["int8", "float32"] < errors["float8_e4m3fn", "float32"]
    assert errors["int8", "bfloat16"] != errors["int8", "float32"]


def test_scales_of_heads_are_the_largest_elements_over_the_largest_stored(served):
    key, value = served.scales(Kind("int8", "head"))
    assert np.all(key == 4 / 127)
    assert np.all(value == 4 / 127)
    assert served.scales(Kind("int8", "token")) == "token"
    assert served.scales(EXACT) is None


def test_answers_are_equal_up_to_the_first_token_that_is_not():
    exact = [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    found = quality._equal([[1, 2, 3], [1, 9, 3], [0, 5, 6]], exact)
    assert found == {"equal_least": 0, "equal_median": 1.0}
