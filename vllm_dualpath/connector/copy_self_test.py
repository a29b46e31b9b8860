"""Shows that a copy engine moves the right bytes, before any KV is trusted to it."""

from __future__ import annotations

import mmap
import threading

import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyEngine
from vllm_dualpath.connector.metadata import Claim, PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.errors import TransferTimeout, TransportError
from vllm_dualpath.messages import TransferKey

_DEADLINE_S = 20.0
_BLOCKS, _HEADS, _TOKENS, _CONTENT = 8, 2, 16, 256
_PAGE_BYTES = _HEADS * _TOKENS * _CONTENT
_SLOTS = 4
_GEOMETRY = Geometry(2 * _TOKENS, _TOKENS, (_PAGE_BYTES, _PAGE_BYTES), "self-test", _HEADS, "bytes")
_OUT, _IN = (6, 1, 4), (0, 7, 3)


def self_test(engine: CopyEngine, device: torch.device) -> None:
    """Copy pages out of caches on ``device`` and back into others; compare every byte.

    Raises ``TransportError`` if a byte is wrong, ``TransferTimeout`` if there is no end to it, and
    what the engine raises. Leaves nothing behind unless it hangs.
    """
    problems: list[BaseException] = []

    def run() -> None:
        try:
            _copy_there_and_back(engine, device)
        except (RuntimeError, ValueError, TransportError) as exc:
            problems.append(exc)

    # A driver that hangs must not hang the engine's start.
    thread = threading.Thread(target=run, name="dualpath-copy-test", daemon=True)
    thread.start()
    thread.join(_DEADLINE_S)
    if thread.is_alive():
        raise TransferTimeout(f"a copy of {_PAGE_BYTES} bytes did not end in {_DEADLINE_S:.0f} s")
    if problems:
        raise problems[0]


def _copy_there_and_back(engine: CopyEngine, device: torch.device) -> None:
    shape = (_HEADS, _BLOCKS, _TOKENS, _CONTENT)
    numbers = torch.arange(2 * _HEADS * _BLOCKS * _TOKENS * _CONTENT, device=device)
    content = (numbers * 31 + numbers // 253).to(torch.uint8).reshape(2, *shape)
    # Of one layer the pages are in one piece, of the other in a piece for each head.
    caches = [content[0].transpose(0, 1).contiguous(), content[1].transpose(0, 1)]
    paged = PagedCaches(caches, _BLOCKS, _GEOMETRY.layer_page_bytes)
    want = [cache.clone() for cache in caches]
    for cache in want:
        cache[list(_IN)] = cache[list(_OUT)]
    memory = mmap.mmap(-1, _SLOTS * _GEOMETRY.slot_bytes)
    mapping = engine.map(paged, memory, _SLOTS, _GEOMETRY)
    try:
        engine.submit(engine.rows(mapping, [_copy(_OUT)]), 0, 2, load=False)
        rows = engine.rows(mapping, [_copy(_IN)])
        mark = engine.submit_background(rows, 0, 2, engine.now(), load=True)
        engine.hold_forward(mark)
        engine.wait(mark)
    finally:
        engine.unmap(mapping)
    for layer, (cache, expected) in enumerate(zip(caches, want, strict=True)):
        if not torch.equal(cache, expected):
            raise TransportError(f"copies on {device}: wrong bytes in layer {layer} of a self test")


def _copy(blocks: tuple[int, ...]) -> PageCopy:
    return PageCopy("", Claim(TransferKey(bytes(16), 0), bytes(16)), 1, blocks, (2, 0))
