"""Tiny models with random weights: real for vLLM, small enough for two cores, no hub needed.

The scale of the weights matters. With the usual 0.02 a random model repeats one token for ever, so
that equal answers prove nothing; with 0.12 and untied embeddings the greedy continuation is varied
and depends on the whole prompt. Such a model is chaotic, so that only float32 is exact whatever the
batch shape: equality is tested in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from vllm_dualpath.bench.byte_tokenizer import BEGIN_ID, END_ID, MIN_VOCAB, PAD_ID, write_tokenizer
from vllm_dualpath.errors import ConfigError

Arch = Literal["llama", "qwen3"]
WeightDtype = Literal["float32", "bfloat16"]

INITIALIZER_RANGE = 0.12

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Shape and seed of a random model. Raises ``ConfigError`` for a shape that cannot work."""

    arch: Arch = "llama"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 320
    max_len: int = 2048
    seed: int = 0
    dtype: WeightDtype = "float32"

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.max_len)
        problems = []
        if self.arch not in get_args(Arch):
            problems.append(f"arch: expected one of {get_args(Arch)}, found {self.arch!r}")
        if self.dtype not in get_args(WeightDtype):
            problems.append(f"dtype: expected one of {get_args(WeightDtype)}, found {self.dtype!r}")
        if min(sizes) < 1:
            problems.append(f"sizes: expected positive numbers, found {sizes}")
        elif self.heads % self.kv_heads:
            problems.append(
                f"heads: expected a multiple of kv-heads {self.kv_heads}, found {self.heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head-dim: expected an even number, found {self.head_dim}")
        if self.vocab < MIN_VOCAB:
            problems.append(f"vocab: expected at least {MIN_VOCAB}, found {self.vocab}")
        if problems:
            raise ConfigError("tiny model: " + "; ".join(problems))

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layers."""
        return 2 * self.hidden

    def config(self) -> dict[str, object]:
        """The content of ``config.json``."""
        return {
            "architectures": [_ARCHITECTURES[self.arch]],
            "model_type": self.arch,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": BEGIN_ID,
            "eos_token_id": END_ID,
            "pad_token_id": PAD_ID,
            "torch_dtype": self.dtype,
            "use_cache": True,
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (query, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (key_value, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (key_value, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, query)
            if self.arch == "qwen3":
                yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
                yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def weight(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """One weight, a function of the seed, the name and the shape alone."""
        if len(shape) == 1:
            return np.ones(shape, dtype=np.float32)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        values = generator.standard_normal(shape, dtype=np.float32)
        return values * np.float32(INITIALIZER_RANGE)


def write_tiny_model(model: TinyModel, directory: Path) -> None:
    """Write weights, configuration and tokenizer into ``directory``; made if missing.

    The same model gives the same bytes. Raises ``ConfigError`` if ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"out: expected a directory, found a file at {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: model.weight(name, shape) for name, shape in model.shapes()}
    _write_safetensors(directory / "model.safetensors", tensors, model.dtype)
    _write_json(directory / "config.json", model.config())
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID},
    )
    write_tokenizer(directory, model.vocab, model.max_len)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_safetensors(
    path: Path, tensors: dict[str, npt.NDArray[np.float32]], dtype: WeightDtype
) -> None:
    """The safetensors format by hand: eight bytes of length, a JSON header, the data.

    numpy has no bfloat16, and the format is smaller than a conversion through torch.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    payloads = []
    offset = 0
    for name, values in tensors.items():
        payload = values.astype("<f4").tobytes() if dtype == "float32" else _bfloat16_bytes(values)
        header[name] = {
            "dtype": "F32" if dtype == "float32" else "BF16",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(payload)],
        }
        payloads.append(payload)
        offset += len(payload)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(payloads)


def _bfloat16_bytes(values: npt.NDArray[np.float32]) -> bytes:
    """Round to nearest even and keep the upper half of each float32."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()
