"""What the movers of a transfer are told to do, as messages made of its prompt and plan."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dualpath.messages import Donate, Peer, SegmentSpec, Stage, TransferKey
from vllm_dualpath.plan import ReadPlan
from vllm_dualpath.router.engine import Engine


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a transfer moves: the prompt, its blocks' hashes and how often it is taken."""

    num_tokens: int
    root: bytes
    block_hashes: tuple[bytes, ...]
    digest: bytes
    num_releases: int


@dataclass(frozen=True, slots=True)
class Orders:
    """Of one attempt: ``key``, what it moves and who reads it."""

    key: TransferKey
    prompt: Prompt
    plan: ReadPlan

    def stage(self, pool: str, peer: Peer) -> Stage:
        """For the side whose slots are of ``pool``; ``peer`` is the other one."""
        return Stage(
            key=self.key,
            pool=pool,
            num_tokens=self.prompt.num_tokens,
            num_hit_blocks=self.plan.num_hit_blocks,
            num_cached_blocks=self.plan.num_cached_blocks,
            root=self.prompt.root,
            block_hashes=self.prompt.block_hashes,
            digest=self.prompt.digest,
            segments=self._segments(),
            peer=peer,
            num_releases=self.prompt.num_releases if pool == "decode" else 1,
        )

    def donate(self, donor: Engine, prefill: Peer, decode: Peer) -> Donate:
        """For a donor that has a part in the plan."""
        own = tuple(part for part in self._segments() if part.reader == donor.engine_id)
        return Donate(
            key=self.key,
            block_hashes=self.prompt.block_hashes[: own[-1].last_block],
            segments=own,
            prefill=prefill,
            decode=decode,
        )

    def _segments(self) -> tuple[SegmentSpec, ...]:
        return tuple(
            SegmentSpec(part.reader, part.first_block, part.last_block)
            for part in self.plan.segments
        )


def peer_of(engine: Engine, slots: tuple[int, ...] = ()) -> Peer:
    """An engine's mover as another one has to know it."""
    hello = engine.hello
    return Peer(
        engine_id=hello.engine_id,
        boot_id=hello.boot_id,
        host_id=hello.host_id,
        pid=hello.pid,
        pid_start=hello.pid_start,
        address=hello.address,
        region=hello.region,
        staging_address=hello.staging_address,
        slots=slots,
    )
