"""Where pages lie in caches, the life of a mapping, and the thread behind copies."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyThread, HostCopies, copy_engine
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.errors import ConfigError, IncompatiblePeer, TransferTimeout
from vllm_dualpath.messages import PROTOCOL_VERSION, Attached

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


def test_pages_in_pieces():
    """Heads apart are pieces at equal distances; a page in one piece is one, in any order of its
    dimensions.
    """
    heads_apart = PagedCaches(caches("LHBNC", torch.float32), BLOCKS, [256, 256]).layers[1]
    assert (heads_apart.num_runs, heads_apart.run_bytes) == (HEADS, TOKENS * CONTENT * 4)
    assert heads_apart.run_stride == BLOCKS * heads_apart.run_bytes
    assert heads_apart.block_stride == heads_apart.run_bytes
    for layout in ("LBHNC", "LBNHC", "BLHNC"):
        whole = PagedCaches(caches(layout, torch.uint8), BLOCKS, [64, 64]).layers[1]
        assert (whole.num_runs, whole.run_bytes) == (1, 64)


def test_kernel_blocks_inside_a_page():
    """VLLM may split its blocks for a kernel: a page is then several of the cache's rows."""
    cache = torch.arange(2 * BLOCKS * HEADS * 2 * CONTENT).reshape(2 * BLOCKS, HEADS, 2, CONTENT)
    paged = PagedCaches([cache], BLOCKS, [HEADS * 4 * CONTENT * 8])
    assert paged.pages_split == 2
    assert (paged.layers[0].num_runs, paged.layers[0].block_stride) == (1, HEADS * 4 * CONTENT * 8)


def test_scattered_pages_are_refused():
    """A layout that tears pages apart at unequal distances is an error at start that says what to
    set.
    """
    torn = torch.zeros(2, HEADS, BLOCKS, TOKENS, 2, CONTENT, dtype=torch.uint8)[..., 0, :]
    with pytest.raises(ConfigError, match=r"layout TORN: expected a page in one piece.*VLLM_KV"):
        PagedCaches(list(torn.permute(0, 2, 1, 3, 4)), BLOCKS, [64, 64], "TORN")
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
    assert memory._memory.closed
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
