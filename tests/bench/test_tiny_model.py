"""Tiny models: deterministic, loadable, and sensitive to their whole prompt."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from vllm_dualpath.bench.byte_tokenizer import MIN_VOCAB
from vllm_dualpath.bench.tiny_model import Arch, TinyModel, write_tiny_model
from vllm_dualpath.errors import ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT_TOKENS = 96
GENERATED_TOKENS = 24


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def greedy(model: object, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of prompts of one length, without regard to an end token."""
    output = model.generate(  # type: ignore[attr-defined]
        torch.tensor(prompts),
        max_new_tokens=GENERATED_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, len(prompts[0]) :].tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_greedy_output_depends_on_every_prompt_token(arch: Arch, tmp_path: Path) -> None:
    """Changing any one token changes the continuation, which is no single repeated token."""
    write_tiny_model(TinyModel(arch=arch), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    generator = random.Random(7)
    prompt = [generator.randrange(256) for _ in range(PROMPT_TOKENS)]
    expected, alone = greedy(model, [prompt, prompt])[0], greedy(model, [prompt])[0]
    assert expected == alone, "float32 answers must not depend on the batch"
    assert len(set(expected)) > GENERATED_TOKENS // 3
    positions = [*range(8), *range(8, PROMPT_TOKENS, 11)]
    changed = [list(prompt) for _ in positions]
    for variant, position in zip(changed, positions, strict=True):
        variant[position] = (variant[position] + 1) % 256
    same = [
        position
        for position, answer in zip(positions, greedy(model, changed), strict=True)
        if answer == expected
    ]
    assert same == [], f"changing these positions changed nothing: {same}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_gives_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    """Two directories of one model are equal byte by byte; another seed differs in weights only."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_tiny_model(TinyModel(layers=1, seed=seed, dtype=dtype), tmp_path / name)  # type: ignore[arg-type]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    differing = {
        name
        for name, digest in digests(tmp_path / "c").items()
        if digests(tmp_path / "a")[name] != digest
    }
    assert differing == {"model.safetensors"}


def test_bfloat16_weights_are_the_float32_ones_rounded(tmp_path: Path) -> None:
    """The hand-written bfloat16 file equals torch's own conversion."""
    from safetensors.torch import load_file

    for dtype in ("float32", "bfloat16"):
        write_tiny_model(TinyModel(layers=1, dtype=dtype), tmp_path / dtype)  # type: ignore[arg-type]
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    rounded = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_token_ids_are_bytes_and_survive_a_round_trip(tmp_path: Path) -> None:
    """Text is its UTF-8 bytes; special tokens are one id each; every id can be decoded."""
    model = TinyModel(layers=1, vocab=MIN_VOCAB + 10)
    write_tiny_model(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "héllo\n\twörld \x00\U0001f600"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == model.vocab
    assert tokenizer("<|user|>")["input_ids"] == [260]
    assert all(tokenizer.convert_ids_to_tokens(token) is not None for token in range(model.vocab))


def test_chat_template_marks_every_turn(tmp_path: Path) -> None:
    """Roles, contents and the opening of the answer are all in the prompt."""
    write_tiny_model(TinyModel(layers=1), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab", 100), ("kv_heads", 3), ("layers", 0), ("arch", "mamba"), ("head_dim", 33)],
)
def test_impossible_shapes_are_refused(field: str, value: object) -> None:
    """A shape that cannot work is a ConfigError that names the value."""
    with pytest.raises(ConfigError, match=str(value)):
        TinyModel(**{field: value})  # type: ignore[arg-type]
