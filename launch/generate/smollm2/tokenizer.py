"""Text to token ids and back: the vocabulary of SmolLM2 and its chat template."""

from collections.abc import Sequence

SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TURN_START = "<|im_start|>"
CONTROL_TOKEN = 3  # the token type of GGUF files


class ChatTokenizer:
    """Byte-level BPE that splits digits one by one.

    Attributes:
      stop_id: the token that ends an answer.
    """

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int], stop_id: int
    ):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {token: index for index, token in enumerate(tokens)}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, token_types, strict=True)
                if kind == CONTROL_TOKEN
            ]
        )
        self._tokenizer = tokenizer
        self.stop_id = stop_id
        self._start_id = vocabulary[TURN_START]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is already in chat form: special tokens are recognised."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a chat: the system's message, the user's, and the start of the answer.

        Text of the user that looks like a special token stays text.
        """
        ids: list[int] = []
        for role, content in (("system", SYSTEM_MESSAGE), ("user", message)):
            ids += [self._start_id, *self._encode_plain(f"{role}\n{content}"), self.stop_id]
            ids += self._encode_plain("\n")
        return [*ids, self._start_id, *self._encode_plain("assistant\n")]

    def _encode_plain(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        try:
            return self._tokenizer.encode(text).ids
        finally:
            self._tokenizer.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not complete."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain after this token; often a word, sometimes nothing."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd"):
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
