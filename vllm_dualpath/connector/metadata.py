"""What the scheduler side tells the worker side in each step.

Plain data, pickled by vLLM between its own processes. A *page* is a vLLM block; pages are numbered
from the start of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from vllm_dualpath.messages import TransferKey


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of a transfer's slots, which one ``Release`` ends."""

    key: TransferKey
    boot_id: bytes
    """The mover whose staging memory the slots are in."""


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Pages ``[first_page, first_page + len(block_ids))`` of a request, between slots and cache."""

    request_id: str
    claim: Claim
    first_page: int
    block_ids: tuple[int, ...]
    slots: tuple[int, ...]
    """Slot of each Full Block from the one that holds ``first_page`` on."""

    @property
    def last_page(self) -> int:
        return self.first_page + len(self.block_ids)


@dataclass(frozen=True, slots=True)
class StoreLoad:
    """Without a router: Full Blocks to read from the store, and the pages to fill from them."""

    request_id: str
    boot_id: bytes
    load_id: bytes
    hashes: tuple[bytes, ...]
    """From the Full Block that holds ``first_page`` on."""
    first_page: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockSave:
    """A Full Block to copy into a persist slot and have stored."""

    boot_id: bytes
    slot: int
    hash: bytes
    parent: bytes
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class DualPathMetadata(KVConnectorMetadata):
    """The orders of one step, in the order in which the worker carries them out."""

    scheduler_boot: bytes | None = None
    """The mover the scheduler side is attached to: nothing later names an older one."""
    persists: list[BlockSave] = field(default_factory=list)
    sync_loads: list[PageCopy] = field(default_factory=list)
    async_loads: list[PageCopy] = field(default_factory=list)
    store_loads: list[StoreLoad] = field(default_factory=list)
    saves: list[PageCopy] = field(default_factory=list)
    failed_loads: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Asynchronous loads that cannot be ordered: report them as failed."""
    failed_blocks: set[int] = field(default_factory=set)
    """Blocks of synchronous loads that cannot be ordered."""
    delayed_frees: set[str] = field(default_factory=set)
    """Finished requests whose blocks vLLM holds until they are reported as sent."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be copied in this step."""
        return not (
            self.sync_loads or self.async_loads or self.store_loads or self.saves or self.persists
        )

    def boot_ids(self) -> set[bytes]:
        """The movers whose staging memory this step's orders name."""
        if self.is_empty:
            return set()
        copies = (*self.sync_loads, *self.async_loads, *self.saves)
        named = {copy.claim.boot_id for copy in copies}
        named.update(load.boot_id for load in self.store_loads)
        named.update(block.boot_id for block in self.persists)
        return named
