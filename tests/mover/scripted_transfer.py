"""One transfer as a router drives it, step by step."""

from __future__ import annotations

import os

from tests.mover.material import GEOMETRY, ROOT, Prompt
from tests.mover.scripted_engine import MoverProcess
from tests.mover.scripted_router import ScriptedRouter
from vllm_dualpath.control.slot_table import ClaimedTransfer
from vllm_dualpath.messages import (
    Donate,
    End,
    Peer,
    Reserve,
    Reserved,
    SegmentSpec,
    Stage,
    TransferKey,
)


class Transfer:
    """One transfer as a router drives it; each step is a method."""

    def __init__(
        self,
        router: ScriptedRouter,
        prefill: MoverProcess,
        decode: MoverProcess,
        prompt: Prompt,
        donor: MoverProcess | None = None,
    ) -> None:
        self.router = router
        self.prefill = prefill
        self.decode = decode
        self.prompt = prompt
        self.donor = donor
        self.donor_reads_from: int | None = None
        self.num_cached = 0
        """Leading blocks that the plan leaves to the prefill engine's own cache."""
        self.key = TransferKey(os.urandom(16), 0)
        self.prefill_slots: tuple[int, ...] = ()
        self.decode_slots: tuple[int, ...] = ()
        self.staged = False
        """Whether a ``Stage`` was sent to anybody."""

    def ask_decode(self) -> None:
        """Send the decode side's ``Reserve``."""
        num_tokens = len(self.prompt.tokens)
        reserve = Reserve(self.key, "decode", num_tokens, self.prefill.peer(), self._donors())
        self.router.send(self.decode, reserve)

    def reserve_decode(self) -> None:
        self.ask_decode()
        self.decode_slots = self.router.expect(self.decode, Reserved, self.key).slots

    def reserve_prefill(self) -> None:
        num_tokens = len(self.prompt.tokens)
        peer = self.decode.peer(self.decode_slots)
        reserve = Reserve(self.key, "prefill", num_tokens, peer, self._donors())
        self.router.send(self.prefill, reserve)
        self.prefill_slots = self.router.expect(self.prefill, Reserved, self.key).slots

    def reserve(self) -> None:
        self.reserve_decode()
        self.reserve_prefill()

    def _donors(self) -> tuple[Peer, ...]:
        return () if self.donor is None else (self.donor.peer(),)

    def stage_donated(self, split: int, donated: int, num_hit_blocks: int) -> None:
        """As ``stage``, and the donor reads ``[donated, num_hit_blocks)``."""
        self.donor_reads_from = donated
        self.stage(split, num_hit_blocks)
        self.donate(num_hit_blocks)

    def donate(self, num_hit_blocks: int) -> None:
        assert self.donor is not None
        (part,) = (s for s in self._segments(0, num_hit_blocks) if s.reader == self.donor.engine_id)
        donate = Donate(
            key=self.key,
            block_hashes=self.prompt.hashes[:num_hit_blocks],
            segments=(part,),
            prefill=self.prefill.peer(self.prefill_slots),
            decode=self.decode.peer(self.decode_slots),
        )
        self.router.send(self.donor, donate)

    def _segments(self, split: int, num_hit_blocks: int) -> tuple[SegmentSpec, ...]:
        donated = num_hit_blocks if self.donor_reads_from is None else self.donor_reads_from
        parts = [
            SegmentSpec(self.prefill.engine_id, self.num_cached, min(split, donated)),
            SegmentSpec(self.decode.engine_id, min(split, donated), donated),
        ]
        if self.donor is not None:
            parts.append(SegmentSpec(self.donor.engine_id, donated, num_hit_blocks))
        return tuple(each for each in parts if each.first_block < each.last_block)

    def stage(self, split: int, num_hit_blocks: int, num_releases: int = 1) -> None:
        """The prefill side reads ``[0, split)``, the decode side the rest."""
        self.stage_at(self.prefill, split, num_hit_blocks, num_releases)
        self.stage_at(self.decode, split, num_hit_blocks, num_releases)

    def stage_at(
        self,
        mover: MoverProcess,
        split: int,
        num_hit_blocks: int,
        num_releases: int = 1,
        peer: Peer | None = None,
    ) -> None:
        at_prefill = mover is self.prefill
        peer = peer or (
            self.decode.peer(self.decode_slots)
            if at_prefill
            else self.prefill.peer(self.prefill_slots)
        )
        message = Stage(
            key=self.key,
            pool="prefill" if at_prefill else "decode",
            num_tokens=len(self.prompt.tokens),
            num_hit_blocks=num_hit_blocks,
            num_cached_blocks=self.num_cached,
            root=ROOT,
            block_hashes=self.prompt.hashes,
            digest=self.prompt.digest,
            segments=self._segments(split, num_hit_blocks),
            peer=peer,
            num_releases=num_releases,
        )
        self.router.send(mover, message)
        self.staged = True

    def end(self, mover: MoverProcess, drain: bool) -> None:
        self.router.send(mover, End(self.key, drain, "test", self.staged))

    def assert_staged(self, claimed: ClaimedTransfer, mover: MoverProcess, num_blocks: int) -> None:
        """The blocks that were read are in the slots, byte for byte what they shall be."""
        expected = self.prompt.expected_blocks()
        for block in range(self.num_cached, num_blocks):
            assert mover.engine.slot(claimed.slots[block]) == expected[block], f"block {block}"

    def assert_whole(self, claimed: ClaimedTransfer, mover: MoverProcess) -> None:
        """Every page of the prompt is in the slots; what lies beyond its last token is not."""
        blocks = self.prompt.expected_blocks()
        per_block = GEOMETRY.pages_per_block
        for layer in range(GEOMETRY.num_layers):
            for page in range(self.prompt.num_pages):
                block, in_block = divmod(page, per_block)
                start = GEOMETRY.page_offset(layer, in_block)
                end = start + GEOMETRY.layer_page_bytes[layer]
                found = mover.engine.slot(claimed.slots[block])[start:end]
                assert found == blocks[block][start:end], f"layer {layer} page {page}"
