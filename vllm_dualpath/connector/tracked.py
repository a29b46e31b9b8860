"""What the scheduler side remembers of each unfinished request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dualpath.blocks import extend_chain, token_bytes
from vllm_dualpath.connector.metadata import Claim
from vllm_dualpath.connector.unsupported import why_not_loadable

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_dualpath.control.slot_table import ClaimedTransfer


class HashChain:
    """Chain hashes of a request's Full Blocks, computed as far as they are asked for."""

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self.root = root
        self._block_tokens = block_tokens
        self._hashes: list[bytes] = []

    def hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """The first ``num_blocks`` hashes; that many blocks of tokens must be known."""
        known = len(self._hashes)
        if num_blocks > known:
            size = self._block_tokens
            packed = token_bytes(request.all_token_ids[known * size : num_blocks * size])
            stride = 4 * size
            for start in range(0, len(packed), stride):
                self._hashes.append(
                    extend_chain(self.parent(len(self._hashes)), packed[start : start + stride])
                )
        return self._hashes[:num_blocks]

    def parent(self, block: int) -> bytes:
        """The hash before ``block``'s; it must have been asked for."""
        return self._hashes[block - 1] if block else self.root


@dataclass(slots=True)
class Tracked:
    """One request between its arrival and its end. Owned by the scheduler's thread."""

    request: Request
    chain: HashChain
    epoch: int
    """Generation of the chain root: after a reset, earlier requests store nothing more."""
    excluded: str | None
    """Why its KV must be neither loaded nor stored."""

    claimed: ClaimedTransfer | None = None
    claim: Claim | None = None
    """Set while a ``Release`` is owed: by this side, or once ``issued`` by the worker."""
    issued: bool = False
    looked: bool = False
    settled: bool = False
    """Hits were taken or turned down: from now on the answer is none."""
    answer: int = 0
    """Tokens answered at the last ask."""
    hit_tokens: int = 0
    """Where that answer's hit ends."""
    loading: tuple[int, ...] = ()
    """Blocks that an asynchronous load is filling."""
    missed_cache: bool = False
    """The prefill engine no longer has what the plan left to its own prefix cache."""
    next_save_page: int = 0
    next_persist_block: int = 0

    @classmethod
    def of(cls, request: Request, chain: HashChain, epoch: int) -> Tracked:
        return cls(request, chain, epoch, why_not_loadable(request))

    @property
    def may_load(self) -> bool:
        """Whether a hit may be answered now."""
        return not (
            self.settled
            or self.excluded
            or self.request.num_preemptions
            or self.request.skip_reading_prefix_cache
        )
