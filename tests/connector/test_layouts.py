"""The contract of copies, over every layout of vLLM's caches and every engine that is here."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.connector.layouts import NUM_BLOCKS, PAGES_PER_BLOCK, Caches, Case, cases
from vllm_dualpath.connector.copies import CopyEngine, HostCopies
from vllm_dualpath.connector.cuda_copies import WAYS
from vllm_dualpath.connector.metadata import Claim, PageCopy
from vllm_dualpath.messages import TransferKey

NUM_SLOTS = 7
FIRST_PAGE = 3  # the second page of its Full Block
SAVED, LOADED = (5, 2, 9, 11), (1, 7, 3, 0)
SLOTS = (4, 0, 6)


def copy(blocks: tuple[int, ...]) -> PageCopy:
    claim = Claim(TransferKey(bytes(16), 0), bytes(16))
    return PageCopy("r", claim, FIRST_PAGE, blocks, SLOTS)


ENGINES: dict[str, tuple[str, Callable[[torch.device], CopyEngine]]] = {
    "host": ("cpu", lambda _: HostCopies()),
    **{name.replace(" ", "-"): ("cuda", make) for name, make in WAYS.items()},
}


def gpu_missing(engine: str) -> str | None:
    """Why ``engine`` cannot be tried here."""
    if ENGINES[engine][0] == "cuda" and not torch.cuda.is_available():
        return f"{engine}: torch finds no GPU here"
    return None


class Rig:
    """Caches of one layout, a staging memory, and an engine between them."""

    def __init__(self, case: Case, device: str, engine: CopyEngine) -> None:
        self.caches = Caches(case, torch.device(device))
        self.caches.fill()
        self.geometry = self.caches.geometry
        self.memory = mmap.mmap(-1, NUM_SLOTS * self.geometry.slot_bytes)
        self.engine = engine
        self.mapping = engine.map(self.caches.paged, self.memory, NUM_SLOTS, self.geometry)
        self.layers = range(self.geometry.num_layers)

    def staged(self, layer: int, idx: int) -> np.ndarray:
        """The page of staging that the ``idx``-th page of a copy belongs to; writable."""
        page = FIRST_PAGE + idx
        slot = SLOTS[page // PAGES_PER_BLOCK - FIRST_PAGE // PAGES_PER_BLOCK]
        start = slot * self.geometry.slot_bytes
        start += self.geometry.page_offset(layer, page % PAGES_PER_BLOCK)
        num_bytes = self.geometry.layer_page_bytes[layer]
        return np.frombuffer(self.memory, np.int8, num_bytes, start)

    def close(self) -> None:
        self.engine.unmap(self.mapping)
        self.engine.close()


@pytest.fixture(params=list(ENGINES))
def rig(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], Rig]]:
    device, make_engine = ENGINES[request.param]
    if (reason := gpu_missing(request.param)) is not None:
        pytest.skip(reason)
    made: list[Rig] = []

    def make(case: Case) -> Rig:
        made.append(Rig(case, device, make_engine(torch.device(device))))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_saved_pages_lie_in_slots_as_in_the_cache(rig, case):
    """[layer][page][bytes as they lie in the cache] in each slot; nothing else is written."""
    r = rig(case)
    before = r.caches.raw.clone()
    rows = r.engine.rows(r.mapping, [copy(SAVED)])
    for layer in r.layers:
        mark = r.engine.submit(rows, layer, layer + 1, load=False)
    r.engine.wait(mark)
    got = np.frombuffer(r.memory, np.int8).copy()
    r.memory[:] = bytes(len(r.memory))
    for layer in r.layers:
        for idx, block in enumerate(SAVED):
            r.staged(layer, idx)[:] = r.caches.page(layer, block).cpu().numpy()
    assert (got == np.frombuffer(r.memory, np.int8)).all()
    assert torch.equal(r.caches.raw, before)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_loaded_pages_are_those_of_the_slots(rig, case):
    """What was saved from some blocks and loaded into others is equal; all else, padding
    included, is as before.
    """
    r = rig(case)
    pages = [[r.caches.page(layer, block) for block in SAVED] for layer in r.layers]
    for layer in r.layers:
        for idx, page in enumerate(pages[layer]):
            r.staged(layer, idx)[:] = page.cpu().numpy()
    before = r.caches.raw.clone()
    rows = r.engine.rows(r.mapping, [copy(LOADED)])
    r.engine.wait(r.engine.submit_background(rows, 0, len(r.layers), r.engine.now(), load=True))
    got = r.caches.raw.clone()
    r.caches.raw.copy_(before)
    for layer in r.layers:
        for block, page in zip(LOADED, pages[layer], strict=True):
            r.caches.set_page(layer, block, page)
    assert torch.equal(got, r.caches.raw)
    assert not torch.equal(got, before)


@pytest.mark.parametrize("case", cases()[:1], ids=str)
def test_order_of_copies(rig, case):
    """A load into a page waits for the save that reads it; what the forward pass does next waits
    for both.
    """
    r = rig(case)
    for turn in range(20):
        first, second = (SAVED, LOADED) if turn % 2 else (LOADED, SAVED)
        want = [[r.caches.page(layer, block) for block in first] for layer in r.layers]
        out = r.engine.rows(r.mapping, [copy(first)])
        into = r.engine.rows(r.mapping, [copy(second)])
        r.engine.submit(out, 0, len(r.layers), load=False)
        mark = r.engine.submit(into, 0, len(r.layers), load=True)
        assert r.engine.hold_forward(mark) >= 0
        for layer in r.layers:
            for block, page in zip(second, want[layer], strict=True):
                assert torch.equal(r.caches.page(layer, block), page)


@pytest.mark.parametrize("case", cases()[:1], ids=str)
def test_reports_come_when_the_copy_is_there(rig, case):
    """Of each reported copy, and of a barrier, an end is told once what it copied can be read."""
    r = rig(case)
    rows = r.engine.rows(r.mapping, [copy(SAVED)])
    seen = 0
    for layer in r.layers:
        r.engine.submit(rows, layer, layer + 1, load=False)
        r.engine.submit(rows, layer, layer + 1, load=False, reported=True)
        while seen <= layer:
            seen, error = r.engine.wait_reports(seen)
        assert (seen, error) == (layer + 1, "")
        for idx, block in enumerate(SAVED):
            assert (r.staged(layer, idx) == r.caches.page(layer, block).cpu().numpy()).all()
    r.engine.submit_barrier()
    assert r.engine.wait_reports(seen) == (seen + 1, "")


@pytest.mark.parametrize("case", cases()[:1], ids=str)
def test_impossible_rows_are_refused(rig, case):
    """A block, a slot or a page that is not there never reaches memory."""
    r = rig(case)
    for blocks, slots in (((NUM_BLOCKS,), (0,)), ((0,), (NUM_SLOTS,)), ((0, 1, 2), (0,))):
        bad = PageCopy("r", copy(()).claim, FIRST_PAGE, blocks, slots)
        with pytest.raises(ValueError, match=r"expected less than|do not fit"):
            r.engine.rows(r.mapping, [bad])
