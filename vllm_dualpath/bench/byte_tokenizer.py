"""A tokenizer of 256 bytes and a few special tokens: id n is byte n.

Token ids of any text are known without a model hub, and every id below 256 is a valid prompt token.
Knows nothing of models or servers.
"""

from __future__ import annotations

import json
from pathlib import Path

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN_ID, END_ID, PAD_ID = range(NUM_BYTES, NUM_BYTES + 3)
MIN_VOCAB = NUM_BYTES + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, by byte.

    Printable Latin-1 stands for itself, the rest for code points from 256 on: the convention of
    every byte-level BPE, so that the stock ``ByteLevel`` steps understand it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(NUM_BYTES + others.index(byte))
        for byte in range(NUM_BYTES)
    ]


def special_tokens(vocab_size: int) -> list[str]:
    """Special tokens, padded with reserved ones so that every id of the model can be decoded."""
    num_reserved = vocab_size - MIN_VOCAB
    return [*SPECIAL_TOKENS, *(f"<|reserved_{idx}|>" for idx in range(num_reserved))]


def write_tokenizer(directory: Path, vocab_size: int, max_len: int) -> None:
    """Write the files of a tokenizer of ``vocab_size`` >= ``MIN_VOCAB`` tokens."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    added = [
        {
            "id": NUM_BYTES + idx,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for idx, token in enumerate(special_tokens(vocab_size))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
