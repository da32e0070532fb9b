"""A language model served on the library: the right tokens on every mesh, and the pool's rules."""

import contextlib
import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from launch.generate.engine import Engine, default_step_tokens
from launch.generate.requests import Pool, Request, num_cached_tokens
from launch.generate.smollm2 import (
    GGUFFile,
    MissingWeights,
    Model,
    TextStream,
    find_weights,
    put_weights,
)
from launch.generate.smollm2.model import Batch

from . import tiny_model
from .cases import build_mesh

DATA = pathlib.Path(__file__).parent / "data"
ORACLE = json.loads((DATA / "smollm2_public.json").read_text(encoding="utf-8"))
LOGITS = np.load(DATA / "smollm2_public.npz")
CLEAR_MARGIN = 0.005  # below it, rounding may choose the other token
SHORT = ("capital", "colours", "haiku")


@pytest.fixture(scope="session")
def smollm2():
    """The real model: (config, weights on the host, tokenizer)."""
    try:
        file = GGUFFile(find_weights())
    except MissingWeights as error:
        pytest.skip(str(error))
    return file.config(), file.weights(), file.tokenizer()


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_model.write(path)
    return GGUFFile(path)


def serve(model: Model, weights, requests, stop_id, **options) -> Engine:
    """Runs requests to their end; the pool is as large as it needs to be, unless given."""
    engine = make_engine(model, weights, requests, stop_id, **options)
    for _ in engine.run(requests):
        pass
    return engine


def make_engine(
    model,
    weights,
    requests,
    stop_id,
    *,
    page_size=16,
    num_pages=None,
    rows=None,
    max_blocks=None,
    dtype=jnp.float32,
    **kw,
):
    shards = model.layout.shards(model.mesh)
    rows = rows or len(requests)
    rows = -(-rows // shards.seqs) * shards.seqs
    lens = [num_cached_tokens(len(r.prompt_ids), r.max_new_tokens) for r in requests]
    blocks = [-(-n // page_size) for n in lens]
    if num_pages is None:
        num_pages = -(-sum(blocks) // shards.context) * shards.pages
    pool = Pool(rows, num_pages, page_size, max_blocks=max_blocks or max(blocks))
    return Engine(model, weights, pool, dtype=dtype, stop_id=stop_id, **kw)


def assert_tokens_match(ids, oracle) -> None:
    """Equal, wherever the outside implementation was not of two minds."""
    for step, (token, expected, margin) in enumerate(
        zip(ids, oracle["greedy_ids"], oracle["margin"], strict=False)
    ):
        if token != expected:
            assert margin < CLEAR_MARGIN, f"step {step}: {token}, not {expected}"
            return  # from here on the two texts differ
    assert len(ids) == len(oracle["greedy_ids"])


def assert_says_what_the_oracle_says(smollm2, mesh_spec, names):
    config, host_weights, tokenizer = smollm2
    model = Model(config, build_mesh(mesh_spec))
    weights = put_weights(host_weights, model.split, jnp.float32)
    requests = [
        Request(key, ORACLE[name]["prompt_ids"], max_new_tokens=48)
        for key, name in enumerate(names)
    ]
    serve(model, weights, requests, tokenizer.stop_id, keep_first_logits=True)
    for name, request in zip(names, requests, strict=True):
        expected = LOGITS[f"{name}.first_logits"]
        assert np.abs(request.first_logits - expected).max() < 2e-3, name
        assert_tokens_match(request.ids, ORACLE[name])


@pytest.mark.parametrize("mesh_spec", ["data=1", "kv=3"])
def test_short_prompts_give_the_tokens_of_an_outside_implementation(smollm2, mesh_spec):
    assert_says_what_the_oracle_says(smollm2, mesh_spec, SHORT)


def test_all_prompts_a_row_each_give_the_tokens_of_an_outside_implementation(smollm2):
    assert_says_what_the_oracle_says(smollm2, "data=2,context=4", tuple(ORACLE))


def test_vocabulary_is_that_of_the_model(smollm2):
    tokenizer = smollm2[2]
    for oracle in ORACLE.values():
        assert tokenizer.encode(oracle["prompt"]) == oracle["prompt_ids"]
        said = oracle["text"].removesuffix("<|im_end|>")
        assert tokenizer.decode(oracle["greedy_ids"]) == said
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, oracle["greedy_ids"])) + stream.flush() == said


def test_chat_form_is_the_models_template_and_keeps_special_words_of_the_user_as_text(smollm2):
    tokenizer = smollm2[2]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    expected = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi 12!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode_chat("Hi 12!") == tokenizer.encode(expected)
    sly = tokenizer.encode_chat("<|im_end|>")
    assert sly.count(tokenizer.stop_id) == 2  # of the system's and of the user's turn
    assert tokenizer.encode("<|im_end|>") == [tokenizer.stop_id]


def test_characters_of_several_tokens_come_out_whole(tiny_file):
    tokenizer = tiny_file.tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("aé🙂")]
    assert pieces == ["a", "", "é", "", "", "", "🙂"]
    stream.push(tokenizer.encode("é")[0])
    assert stream.flush() == "\ufffd"


# The engine, on a tiny model -----------------------------------------------------------------


PROMPT_LENS = (5, 40, 1, 17, 33)
# Tests share these shapes where they can: what takes their time is compilation.
SMALL_POOL = {"mesh_spec": "data=2", "num_pages": 8, "rows": 4}


def tiny_requests(tiny_file, max_new_tokens=12, prompt_lens=PROMPT_LENS):
    rng = np.random.default_rng(7)
    vocab_size = tiny_file.config().vocab_size
    return [
        Request(key, rng.integers(3, vocab_size, n).tolist(), max_new_tokens)
        for key, n in enumerate(prompt_lens)
    ]


def tiny_serve(tiny_file, mesh_spec="data=1", requests=None, **options):
    model = Model(tiny_file.config(), build_mesh(mesh_spec))
    weights = put_weights(tiny_file.weights(), model.split, jnp.float32)
    requests = requests or tiny_requests(tiny_file)
    engine = serve(model, weights, requests, tiny_model.STOP_ID, **options)
    return [request.ids for request in requests], engine


@pytest.fixture(scope="session")
def alone(tiny_file):
    """The answer to each prompt, served on its own by a dense float64 model."""
    return [dense_answer(tiny_file, request) for request in tiny_requests(tiny_file)]


def dense_answer(tiny_file, request) -> list[int]:
    ids = list(request.prompt_ids)
    while len(ids) < len(request.prompt_ids) + request.max_new_tokens:
        ids.append(int(dense_logits(tiny_file, ids).argmax()))
        if ids[-1] == tiny_model.STOP_ID:
            break
    return ids[len(request.prompt_ids) :]


def dense_logits(tiny_file, ids) -> np.ndarray:
    """The last logits in float64 NumPy; interleaved rotary pairs, as the file stores them."""
    config = tiny_file.config()
    weight = lambda name: tiny_file.tensor(f"{name}.weight").astype(np.float64)
    norm = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
    steps = np.arange(config.head_dim // 2) * 2 / config.head_dim
    angles = np.arange(len(ids))[:, None] * config.rope_theta**-steps

    def heads(x, name, rotated):
        x = (x @ weight(name).T).reshape(len(ids), -1, config.head_dim)
        if rotated:
            pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
            x = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
        return x.swapaxes(0, 1)

    x = weight("token_embd")[ids]
    for layer in range(config.num_layers):
        blk, normed = f"blk.{layer}", norm(x)
        q = heads(normed, f"{blk}.attn_q", True)
        k, v = heads(normed, f"{blk}.attn_k", True), heads(normed, f"{blk}.attn_v", False)
        k, v = (np.repeat(y, config.num_heads // config.num_kv_heads, axis=0) for y in (k, v))
        logits = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
        logits = np.where(np.tri(len(ids), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + attended.swapaxes(0, 1).reshape(len(ids), -1) @ weight(f"{blk}.attn_output").T
        normed = norm(x)
        gate, up = (normed @ weight(f"{blk}.ffn_{name}").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{blk}.ffn_down").T
    return norm(x[-1]) @ weight("token_embd").T


@pytest.mark.parametrize("mesh_spec", ["data=1", "data=2,context=2", "context=8", "data=2,kv=3"])
def test_any_mesh_gives_the_answers_of_a_dense_model(tiny_file, alone, mesh_spec):
    assert tiny_serve(tiny_file, mesh_spec)[0] == alone


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 8, "rows": 1},
        {"page_size": 64},
        {"step_tokens": 7},
    ],
)
def test_page_and_chunk_sizes_do_not_change_answers(tiny_file, alone, options):
    assert tiny_serve(tiny_file, **options)[0] == alone


@pytest.mark.parametrize(("num_rows", "tokens"), [(1, 16), (9, 16), (16, 32), (32, 64)])
def test_a_step_has_room_for_prompts_beside_all_answers(num_rows, tokens):
    assert default_step_tokens(num_rows) == tokens


def test_prompts_wait_for_pages_and_use_them_again(tiny_file, alone):
    ids, engine = tiny_serve(tiny_file, **SMALL_POOL)
    assert ids == alone
    assert engine.rows.peak_pages.max() == 4
    assert engine.rows.allocator.num_free() == 8
    assert sum(-(-num_cached_tokens(n, 12) // 16) for n in PROMPT_LENS) > 8


def test_a_prompt_that_cannot_fit_says_what_it_needs_and_the_others_run(tiny_file, alone):
    requests = tiny_requests(tiny_file)
    requests[3] = dataclasses.replace(requests[3], prompt_ids=[5] * 100)
    tiny_serve(tiny_file, requests=requests, max_blocks=4, **SMALL_POOL)
    assert requests[3].ending == "error"
    assert requests[3].error == (
        "needs 7 pages of 16 tokens (100 prompt tokens and up to 12 new ones), and 4 are available "
        "for a sequence (8 over 2 data shards); use --num-pages 14 or more, or fewer "
        "--max-new-tokens"
    )
    others = [0, 1, 2, 4]
    assert [requests[i].ids for i in others] == [alone[i] for i in others]


def test_a_prompt_beyond_the_models_sight_or_without_tokens_is_an_error(tiny_file):
    requests = tiny_requests(tiny_file, prompt_lens=(3, 0, tiny_model.MAX_CONTEXT))
    tiny_serve(tiny_file, requests=requests, max_blocks=4, **SMALL_POOL)
    assert requests[0].finished
    assert requests[1].error == "the prompt has no tokens"
    assert "exceed the 512 tokens that the model can see" in requests[2].error


def test_a_long_prompt_holds_up_no_answer(tiny_file):
    requests = tiny_requests(tiny_file, 24, prompt_lens=(5, 3, 4, 160))
    requests[2].max_new_tokens = 6  # the long one takes its row
    model = Model(tiny_file.config(), build_mesh("data=1"))
    weights = put_weights(tiny_file.weights(), model.split, jnp.float32)
    engine = make_engine(model, weights, requests, -1, rows=3)
    token_steps, read = [], []
    for event in engine.run(requests):
        if event.request is requests[3] and event.kind == "read":
            read.append((engine.stats.steps, requests[3].num_prefilled))
        elif event.request is requests[0] and event.kind == "token":
            token_steps.append(engine.stats.steps)
    assert np.all(np.diff(token_steps) == 1)  # a token a step, from its first to its last
    chunks = np.diff([0, *(tokens for _, tokens in read)])
    assert list(chunks) == [14] * 11 + [6]  # beside the two answers
    assert {step for step, _ in read} < set(token_steps)
    stats = engine.stats
    assert stats.prefill_tokens == 172
    assert stats.decode_tokens == sum(len(request.ids) - 1 for request in requests)
    assert stats.prefill_seconds < stats.seconds < stats.prefill_seconds + stats.decode_seconds


def test_stopping_early_keeps_what_there_is_and_frees_the_pages(tiny_file, alone):
    requests = tiny_requests(tiny_file)
    model = Model(tiny_file.config(), build_mesh("data=2"))
    weights = put_weights(tiny_file.weights(), model.split, jnp.float32)
    engine = make_engine(model, weights, requests, tiny_model.STOP_ID, num_pages=8, rows=4)
    with contextlib.closing(engine.run(requests)) as events:
        num_tokens = 0
        while num_tokens < 6:
            num_tokens += next(events).kind == "token"
    assert {request.ending for request in requests} <= {"interrupted", "stop", "length"}
    assert requests[-1].ending == "interrupted"
    assert requests[-1].ids == []
    for request, expected in zip(requests, alone, strict=True):
        assert request.ids == expected[: len(request.ids)]
    assert engine.rows.allocator.num_free() == engine.pool.num_pages


SCALES = np.full((tiny_model.NUM_LAYERS, tiny_model.NUM_KV_HEADS), 0.01, np.float32)
SCALES *= np.arange(1, 1 + SCALES.size).reshape(SCALES.shape)
CACHES = {
    "float32": {},
    "token": {"dtype": "float8_e4m3fn"},
    "head": {"dtype": "float8_e4m3fn", "scales": (SCALES, 2 * SCALES)},
}


@pytest.mark.parametrize("kind", CACHES)
def test_running_answers_move_to_another_mesh(tiny_file, alone, kind):
    if kind != "float32":
        exact, (alone, _) = alone, tiny_serve(tiny_file, **CACHES[kind])
        assert alone != exact  # it says of what it is made
    requests = tiny_requests(tiny_file)
    requests[0].max_new_tokens = 6
    there, here = (Model(tiny_file.config(), build_mesh(m)) for m in ("data=2,context=4", "kv=3"))
    there_weights, weights = (
        put_weights(tiny_file.weights(), model.split, jnp.float32) for model in (there, here)
    )
    options = {"num_pages": 16, "rows": 2, "step_tokens": 16, **CACHES[kind]}
    engine = make_engine(there, there_weights, requests, tiny_model.STOP_ID, **options)
    half_read, has_moved = requests[4], False
    for event in engine.run([*requests[:2], half_read, *requests[2:4]]):
        if has_moved or (event.kind, event.request) != ("read", half_read):
            continue
        assert half_read.num_prefilled == 16
        assert [len(request.ids) for request in requests] == [6, 7, 0, 0, 0]
        with pytest.raises(ValueError, match=r"has no room for prompt 1 beside those that joined"):
            engine.move_to(here, weights, Pool(1, 16, 16, 4))
        with pytest.raises(ValueError, match=r"page_size=8 must be 16, that of the cache"):
            engine.move_to(here, weights, Pool(3, 16, 8, 8))
        assert engine.model is there
        engine.move_to(here, weights, Pool(3, 16, 16, 5))
        assert engine.cache.key.sharding.mesh == here.mesh
        assert engine.cache.scale == (kind if kind in ("token", "head") else "none")
        assert engine.rows.allocator.num_free() == 16 - 7
        has_moved = True
    assert has_moved
    assert [request.ids for request in requests] == [alone[0][:6], *alone[1:]]


def test_samples_depend_on_the_seed_but_not_on_the_batch(tiny_file, alone):
    def draw(seed, **options):
        requests = tiny_requests(tiny_file)
        for request in requests[1:]:
            request.temperature, request.seed = 1.5, seed
        return tiny_serve(tiny_file, requests=requests, **options)[0]

    together = draw(3)
    assert draw(3, **SMALL_POOL) == together
    assert together[0] == alone[0]  # the greedy one among them
    assert all(a != b for a, b in zip(together[1:], draw(4)[1:], strict=True))


@pytest.mark.parametrize(("mesh_spec", "num_rows"), [("data=2,context=4", 6), ("data=1", 1)])
def test_a_step_updates_the_cache_in_place_and_talks_little(tiny_file, mesh_spec, num_rows):
    model = Model(tiny_file.config(), build_mesh(mesh_spec))
    weights = put_weights(tiny_file.weights(), model.split, jnp.float32)
    cache = model.empty_cache(4096, 16, jnp.float32)
    # where there is one row, of one token: XLA rewrites such writes
    batch = Batch.empty(64 if num_rows > 1 else 1, num_rows, 4)
    compiled = Model.step.lower(model, weights, cache, batch).compile()
    memory, cache_bytes = compiled.memory_analysis(), cache.bytes_per_device()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
    text = compiled.as_text()
    collectives = [text.count(f" {name}(") for name in ("all-gather", "all-reduce")]
    assert sum(collectives) <= 9, collectives
    assert "all-to-all" not in text
    assert "collective-permute" not in text


def test_rows_must_divide_over_the_data_shards(tiny_file):
    model = Model(tiny_file.config(), build_mesh("data=4"))
    with pytest.raises(ValueError, match=r"num_rows=3 must be divisible by the 4 data shards"):
        Engine(model, None, Pool(3, 8, 16, 2), dtype=jnp.float32, stop_id=0)
