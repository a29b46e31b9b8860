"""The block files of a store, found and damaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_dualpath.blocks import chain_hashes, chain_root

from .deployment import Deployment
from .models import BLOCK_TOKENS, LLAMA, PAGE_TOKENS, QWEN3

_HEADER_BYTES = 4096
_FIRST_VALUE_BYTES = 4 * PAGE_TOKENS * LLAMA.head_dim
"""In a head's part of a page the values lie behind the keys, on a CPU. A spoilt key may do no more
than take a token's weight away.
"""
_EXPONENT_BYTE = 3
_EXPONENT_BIT = 0x40
"""The highest bit of a float32's exponent: the value becomes huge."""

assert LLAMA.head_dim == QWEN3.head_dim


def stored_by(deployment: Deployment, prompt: Sequence[int]) -> list[Path]:
    """Ask ``prompt`` and return the files of its full blocks, first block first."""
    deployment.ask(prompt, 1)
    deployment.expect_clean()
    return files_of(deployment.store, prompt)


def files_of(store: Path, prompt: Sequence[int]) -> list[Path]:
    """The files of those full blocks of ``prompt`` that the store of one model has."""
    (directory,) = (path for path in store.iterdir() if path.is_dir())
    root = chain_root(bytes.fromhex(directory.name))
    names = [digest.hex() for digest in chain_hashes(root, prompt, BLOCK_TOKENS)]
    paths = [next(directory.glob(f"??/??/{name}"), None) for name in names]
    return [path for path in paths if path is not None]


def flip_byte(path: Path) -> None:
    """Damage one byte of a value: in place, as a failing disk would."""
    with path.open("r+b") as file:
        file.seek(_HEADER_BYTES + _FIRST_VALUE_BYTES + _EXPONENT_BYTE)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ _EXPONENT_BIT]))


def make_stuck(path: Path) -> None:
    """Let every read of this block wait: a FIFO cannot be opened before it has a writer."""
    path.unlink()
    os.mkfifo(path)


def end_stuck(path: Path) -> None:
    """Let the waiting reads fail; the block is gone."""
    writer = os.open(path, os.O_WRONLY)
    path.unlink()
    os.close(writer)
