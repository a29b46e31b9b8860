"""Which way of moving blocks a directory's file system takes, found by trying each.

Kernels, seccomp filters and file systems refuse io_uring or direct I/O in many ways, some only when
bytes are moved: so a small file is really written and read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vllm_dualpath.blocks import ALIGNMENT_BYTES
from vllm_dualpath.config import StoreIo
from vllm_dualpath.errors import ConfigError, StorageError, StoreFull
from vllm_dualpath.storage.block_io import Backend, BlockIo, IoChoice, IoStatus
from vllm_dualpath.storage.directio import aligned_buffer
from vllm_dualpath.storage.format import FileLayout

_LAYOUT = FileLayout(
    header_bytes=ALIGNMENT_BYTES,
    payload_bytes=ALIGNMENT_BYTES,
    crc_table_offset=0,
    header_crc_offset=ALIGNMENT_BYTES - 4,
    layer_bytes=(ALIGNMENT_BYTES,),
)


_SCRATCH = bytes(4)
"""Stands for a block's hash in messages."""


def choose_io(directory: Path, wanted: StoreIo = "auto", direct: bool | None = None) -> IoChoice:
    """The best way that works in ``directory``, and why no better one does.

    ``wanted`` narrows the choice to one backend, ``direct`` to direct or buffered I/O. Raises
    ``ConfigError`` with every reason where nothing works.
    """
    refusals: list[str] = []
    for backend, is_direct in _candidates(wanted, direct):
        refusal = _try(directory, IoChoice(backend, is_direct))
        if not refusal:
            return IoChoice(backend, is_direct, "; ".join(refusals))
        refusals.append(f"{IoChoice(backend, is_direct)}: {refusal}")
    raise ConfigError(f"store: no I/O works in {directory}: {'; '.join(refusals)}")


def _candidates(wanted: StoreIo, direct: bool | None) -> Iterator[tuple[Backend, bool]]:
    backends: tuple[Backend, ...] = ("io_uring", "threads") if wanted == "auto" else (wanted,)
    for is_direct in (True, False) if direct is None else (direct,):
        for backend in backends:
            # Buffered, a ring gains nothing over threads: the kernel would use threads of its own.
            if is_direct or backend == "threads" or wanted != "auto":
                yield backend, is_direct


def _try(directory: Path, choice: IoChoice) -> str:
    """Why this way does not work; empty if it does."""
    try:
        io = BlockIo(directory, _LAYOUT, choice, num_threads=1, depth=4)
    except OSError as exc:
        return exc.strerror or str(exc)
    scratch = directory / f"probe-{os.getpid()}-{os.urandom(8).hex()}"
    try:
        return _transfer(io, scratch)
    except StoreFull:
        # The files were opened, so the way works: a full store is to be read, and evicted from.
        return ""
    except StorageError as exc:
        return str(exc)
    finally:
        scratch.unlink(missing_ok=True)
        Path(f"{scratch}-new").unlink(missing_ok=True)
        io.close()


def _transfer(io: BlockIo, scratch: Path) -> str:
    written, found = aligned_buffer(ALIGNMENT_BYTES), aligned_buffer(ALIGNMENT_BYTES)
    written[:] = os.urandom(ALIGNMENT_BYTES)
    outcome = io.write(str(scratch), f"{scratch}-new", written, bytes(ALIGNMENT_BYTES))
    outcome.raise_failure("put", _SCRATCH)
    outcome = io.read(str(scratch), found, verify=False)
    outcome.raise_failure("get", _SCRATCH)
    if outcome.status is not IoStatus.DONE or found != written:
        return "a scratch file does not hold what was written to it"
    return ""
