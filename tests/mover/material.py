"""Prompts, their blocks in a store, and waiting: what the tests of this folder work on."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vllm_dualpath.blocks import Geometry, chain_hashes, chain_root, prompt_digest
from vllm_dualpath.storage.posix import PosixStore

WAIT_S = 15.0
GEOMETRY = Geometry(8, 4, (1024, 512, 2048), "LBHNC", 2, "uint8")
FINGERPRINT = bytes(range(32))
ROOT = chain_root(FINGERPRINT)
MAX_MODEL_LEN = 64
BLOCKING_IO: dict[str, Any] = {"store_io": "threads", "store_threads": 4}
"""Config of movers whose reads hang on a named pipe, as ``make_pipe`` wants; io_uring would not."""
_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], what: str, timeout_s: float = WAIT_S) -> _T:
    """Poll ``condition`` until it is true; fails with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out: {what}")
        time.sleep(0.005)
    return result


def block_payload(block_hash: bytes) -> bytes:
    """A slot's bytes of a stored block, a function of its hash; the padding is zero."""
    seed = int.from_bytes(block_hash[:8], "little")
    generator = np.random.default_rng(seed)
    return generator.bytes(GEOMETRY.payload_bytes).ljust(GEOMETRY.slot_bytes, b"\0")


def open_test_store(directory: Path) -> PosixStore:
    return PosixStore(f"file://{directory}", FINGERPRINT, GEOMETRY)


def make_pipe(directory: Path, block_hash: bytes) -> Path:
    """Replace a stored block by a named pipe: opening it for reading blocks, as on a dead disk."""
    path = block_path(directory, block_hash)
    path.unlink()
    os.mkfifo(path)
    return path


def release_pipe(pipe: Path) -> None:
    """Let the reader that hangs on a pipe return; it finds no block."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as exc:
        raise AssertionError(f"nobody reads {pipe}: {exc}") from exc
    finally:
        pipe.unlink(missing_ok=True)


def block_path(directory: Path, block_hash: bytes) -> Path:
    """The file of a stored block."""
    name = block_hash.hex()
    (path,) = directory.glob(f"*/{name[:2]}/{name[2:4]}/{name}")
    return path


class Prompt:
    """Token ids with their chain; ``store`` puts leading blocks into a store."""

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        self.tokens = [seed * 1000 + idx for idx in range(num_tokens)]
        self.hashes = tuple(chain_hashes(ROOT, self.tokens, GEOMETRY.block_tokens))
        self.digest = prompt_digest(ROOT, self.tokens)
        self.num_blocks = GEOMETRY.num_blocks(num_tokens)
        self.num_pages = GEOMETRY.num_pages(num_tokens)

    def store(self, directory: Path, num_blocks: int) -> None:
        store = open_test_store(directory)
        for idx in range(num_blocks):
            with mmap.mmap(-1, GEOMETRY.slot_bytes) as buffer:
                buffer[:] = block_payload(self.hashes[idx])
                view = memoryview(buffer)
                store.put(self.hashes[idx], self.hashes[idx - 1] if idx else ROOT, view)
                view.release()
        store.close()

    def expected_blocks(self) -> list[bytes]:
        """The payload every block of the prompt shall have, the partial last one included."""
        names = [*self.hashes, self.digest]
        return [block_payload(name)[: GEOMETRY.payload_bytes] for name in names][: self.num_blocks]
