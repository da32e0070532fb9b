"""A language model of a few kilobytes in a GGUF file: random weights, tokens are bytes."""

import gguf
import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STOP_ID = SPECIAL.index("<|im_end|>")

NUM_LAYERS, HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FFN, MAX_CONTEXT = 2, 96, 6, 3, 16, 128, 512


def byte_tokens() -> list[str]:
    """The 256 bytes as byte-level BPE writes them: printable ones as they are, others above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def write(path, change=lambda file: None) -> None:
    """Writes the file. Weights are large enough for clear preferences between tokens.

    `change` may change the fields of the writer before it writes them.
    """
    rng = np.random.default_rng(0)
    tokens = [*SPECIAL, *byte_tokens(), "ab"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(NUM_LAYERS)
    file.add_embedding_length(HIDDEN)
    file.add_head_count(NUM_HEADS)
    file.add_head_count_kv(NUM_KV_HEADS)
    file.add_feed_forward_length(FFN)
    file.add_vocab_size(len(tokens))
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_context_length(MAX_CONTEXT)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3] * len(SPECIAL) + [1] * 257)
    file.add_token_merges(["a b"])
    file.add_eos_token_id(STOP_ID)

    def add(name: str, *shape: int) -> None:
        weight = rng.standard_normal(shape) / np.sqrt(shape[-1])
        file.add_tensor(f"{name}.weight", weight.astype(np.float32))

    def add_norm(name: str) -> None:
        file.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    add("token_embd", len(tokens), HIDDEN)
    add_norm("output_norm")
    for layer in range(NUM_LAYERS):
        add_norm(f"blk.{layer}.attn_norm")
        add(f"blk.{layer}.attn_q", NUM_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_k", NUM_KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_v", NUM_KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_output", HIDDEN, NUM_HEADS * HEAD_DIM)
        add_norm(f"blk.{layer}.ffn_norm")
        add(f"blk.{layer}.ffn_gate", FFN, HIDDEN)
        add(f"blk.{layer}.ffn_up", FFN, HIDDEN)
        add(f"blk.{layer}.ffn_down", HIDDEN, FFN)
    change(file)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
