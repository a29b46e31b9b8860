"""Byte views over caches of every layout, and copies through them."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyThread, HostCopies, copy_engine
from vllm_dualpath.connector.metadata import Claim, PageCopy
from vllm_dualpath.connector.paging import PagedCaches, make_rows
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.errors import ConfigError, IncompatiblePeer, TransferTimeout
from vllm_dualpath.messages import PROTOCOL_VERSION, Attached, TransferKey

BLOCKS, HEADS, TOKENS, CONTENT = 12, 2, 4, 8
ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "LHBNC": (0, 2, 1, 3, 4),
}


def caches(layout: str, dtype: torch.dtype, layers: int = 2) -> list[torch.Tensor]:
    """Logical [B, H, N, C] views over one allocation in the layout's physical order."""
    order = ORDERS[layout]
    shape = (layers, BLOCKS, HEADS, TOKENS, CONTENT)
    raw = torch.zeros([shape[dim] for dim in order], dtype=dtype)
    view = raw.permute([order.index(dim) for dim in range(5)])
    return [view[layer] for layer in range(layers)]


def geometry(page_bytes: int, layers: int = 2) -> Geometry:
    return Geometry(8, 4, (page_bytes,) * layers, "x", HEADS, "x")


def staging(paged: PagedCaches, geo: Geometry, num_slots: int = 6, **changes) -> Staging:
    fd = os.memfd_create("test")
    os.ftruncate(fd, num_slots * geo.slot_bytes)
    attached = Attached(
        version=PROTOCOL_VERSION, boot_id=bytes(16), pid=1, num_slots=num_slots, table_capacity=1,
        table_max_blocks=1, index_capacity_blocks=0,
        **{"staging_bytes": num_slots * geo.slot_bytes, "slot_bytes": geo.slot_bytes, **changes},
    )  # fmt: skip
    try:
        return Staging(attached, fd, geo, paged, HostCopies())
    finally:
        os.close(fd)


def copy(first_page: int, blocks: tuple[int, ...], slots: tuple[int, ...]) -> PageCopy:
    return PageCopy("r", Claim(TransferKey(bytes(16), 0), bytes(16)), first_page, blocks, slots)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_save_and_load_move_whole_pages(layout, dtype):
    """Pages saved from some blocks and loaded into others are equal, and nothing else is
    touched.
    """
    layers = caches(layout, dtype)
    for layer, cache in enumerate(layers):
        values = torch.arange(cache.numel()).reshape(cache.shape) % 97 + layer
        cache.copy_(values.to(dtype))
    before = [cache.clone() for cache in layers]
    page_bytes = HEADS * TOKENS * CONTENT * dtype.itemsize
    paged = PagedCaches(layers, BLOCKS, [page_bytes] * 2)
    geo = geometry(page_bytes)
    memory = staging(paged, geo)
    out = make_rows([copy(1, (5, 2, 9), (4, 0))], geo, torch.device("cpu"))
    into = make_rows([copy(1, (1, 7, 3), (4, 0))], geo, torch.device("cpu"))
    assert out.slots.tolist() == [4, 0, 0] and out.pages.tolist() == [1, 0, 1]
    for layer in range(2):
        memory.save(layer, out)
        memory.load(layer, into)
    for cache, old in zip(layers, before, strict=True):
        old[[1, 7, 3]] = old[[5, 2, 9]]
        assert torch.equal(cache, old)
    memory.retire(1)


def test_pages_lie_in_slots_as_the_format_says():
    """[layer][page][bytes] in each slot, as the store's format and the peers expect."""
    layers = caches("LBHNC", torch.uint8)
    layers[1][3] = 7
    paged = PagedCaches(layers, BLOCKS, [64, 64])
    geo = geometry(64)
    memory = staging(paged, geo)
    memory.save(1, make_rows([copy(1, (3,), (2,))], geo, torch.device("cpu")))
    raw = memory._bytes.reshape(6, -1)
    assert torch.equal(
        raw[2, geo.page_offset(1, 1) :][:64], torch.full((64,), 7, dtype=torch.uint8)
    )
    assert int(raw.sum()) == 64 * 7
    memory.retire(1)


def test_kernel_blocks_inside_a_page():
    """VLLM may split its blocks for a kernel: a page is then several of the cache's rows."""
    cache = torch.arange(2 * BLOCKS * HEADS * 2 * CONTENT).reshape(2 * BLOCKS, HEADS, 2, CONTENT)
    paged = PagedCaches([cache], BLOCKS, [HEADS * 4 * CONTENT * 8])
    assert paged.pages_split == 2
    assert torch.equal(paged.layers[0][3], cache[6:8].flatten())


def test_scattered_pages_are_refused():
    """A layout that tears pages apart is an error at start that says what to set."""
    with pytest.raises(ConfigError, match="VLLM_KV_CACHE_LAYOUT"):
        PagedCaches(caches("LHBNC", torch.uint8), BLOCKS, [64, 64])
    with pytest.raises(ConfigError, match="expected 12 pages of 65 bytes"):
        PagedCaches(caches("LBHNC", torch.uint8), BLOCKS, [65, 64])


def test_mapping_outlives_its_users():
    """The memory is given up only when the last copy has ended; nobody new gets it meanwhile."""
    paged = PagedCaches(caches("LBHNC", torch.uint8), BLOCKS, [64, 64])
    memory = staging(paged, geometry(64))
    assert memory.acquire()
    with pytest.raises(TransferTimeout, match="1 copies"):
        memory.retire(0.05)
    assert not memory.acquire()
    threading.Timer(0.1, memory.release).start()
    memory.retire(5)
    assert memory._bytes is None
    memory.retire(5)


def test_other_slot_size_is_refused():
    """A mover that was started for another geometry is not used."""
    paged = PagedCaches(caches("LBHNC", torch.uint8), BLOCKS, [64, 64])
    with pytest.raises(IncompatiblePeer, match="expected slots of 4096 bytes, found 8192"):
        staging(paged, geometry(64), slot_bytes=8192)


def test_copy_thread_keeps_order_and_survives_errors():
    """Jobs run in order; one that raises does not end the thread; close runs what is queued."""
    thread = CopyThread()
    seen: list[int] = []
    thread.put(lambda: seen.append(1))
    thread.put(lambda: 1 // 0)
    thread.put(lambda: seen.append(2))
    thread.close()
    assert seen == [1, 2]


def test_devices():
    """The CPU and CUDA are covered, others are refused by name."""
    assert isinstance(copy_engine(torch.device("cpu")), HostCopies)
    with pytest.raises(ConfigError, match="found meta"):
        copy_engine(torch.device("meta"))
