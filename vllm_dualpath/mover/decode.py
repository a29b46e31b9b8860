"""A transfer at the decode side: the whole prompt is gathered, committed, stored."""

from __future__ import annotations

from functools import partial

import numpy as np

from vllm_dualpath.messages import Committed, PagesGood, Peer
from vllm_dualpath.mover.persist import record_store
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.mover.transfer import Transfer
from vllm_dualpath.storage.base import WriteBlock


class DecodeTransfer(Transfer):
    """Committed when every page of every layer is good; then its new blocks go to the store."""

    @property
    def _peer_role(self) -> str:
        return "prefill"

    def _staged(self) -> None:
        geometry = self._ports.geometry
        self._good = np.zeros((geometry.num_layers, geometry.num_pages(self._num_tokens)), np.bool_)

    def _mark_block(self, block: int) -> None:
        per_block = self._ports.geometry.pages_per_block
        self._good[:, block * per_block : (block + 1) * per_block] = True

    def _has_block(self, block: int) -> bool:
        per_block = self._ports.geometry.pages_per_block
        return bool(self._good[:, block * per_block : (block + 1) * per_block].all())

    def _mark_pages(self, notice: PagesGood) -> None:
        in_range = self._saves(notice.first_page, notice.last_page)
        if in_range and notice.layer < self._ports.geometry.num_layers:
            self._good[notice.layer, notice.first_page : notice.last_page] = True
        else:
            self._ports.counters.rejected_messages += 1

    def _cut(self) -> None:
        self._good[:, self._limit * self._ports.geometry.pages_per_block :] = False

    def _check_good(self) -> None:
        if self._good.all() and self._publish():
            self._ports.tell_router(Committed(self.key))
            self._store_new_blocks()

    def _planned_writers(self) -> list[Peer]:
        if self._entry is not None:
            # Every page was announced and none is written twice: nothing is left to write, but what
            # a donor read beyond a cut. Those pages were announced by another.
            return [donor for donor in self.donors if self._reads_beyond_cut(donor)]
        return [self.peer, *self._readers(self.donors)]

    def _needs_peer(self) -> bool:
        return self._entry is None

    def _complete(self) -> bool:
        return (
            self._stage is not None
            and self._entry is not None
            and self._num_releases >= self._stage.num_releases
        )

    def _progress(self) -> None:
        if self._reader is not None and self._reader.is_done:
            self._tell_peer()
        super()._progress()

    def _store_new_blocks(self) -> None:
        """Queue the prompt's full blocks that the store did not have."""
        assert self._stage is not None
        hashes = self._stage.block_hashes
        for block in range(self._limit, len(hashes)):
            if self._ports.storage.num_open_writes >= max(1, self._ports.pool.num_slots // 2):
                self._ports.counters.blocks_not_stored += len(hashes) - block
                return
            parent = hashes[block - 1] if block else self._stage.root
            view = self._ports.slot_view(self._slots[block])
            self._open_stores += 1
            self._ports.storage.submit_write(
                IoTask(
                    work=WriteBlock(hashes[block], parent, view),
                    done=partial(self._block_stored, hashes[block], parent),
                )
            )

    def _block_stored(self, block_hash: bytes, parent: bytes, task: IoTask) -> None:
        self._open_stores -= 1
        record_store(self._ports, block_hash, parent, task)
        self._advance()
