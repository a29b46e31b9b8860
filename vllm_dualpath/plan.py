"""Read plans: who reads which hit blocks of one request.

A plan is data. Policies make plans, movers execute them, and neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Hit blocks ``[first_block, last_block)`` of one request, read by one engine's mover."""

    reader: str
    """Engine id of the node that reads."""
    first_block: int
    last_block: int

    @property
    def num_blocks(self) -> int:
        return self.last_block - self.first_block


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """An ordered cover of the hit blocks of one request that have to be read:
    ``[num_cached_blocks, num_hit_blocks)``.

    Raises ``ValueError`` when the segments leave a gap, overlap, are empty or out of order:
    a plan that exists is a plan that can be executed.
    """

    num_hit_blocks: int
    segments: tuple[Segment, ...]
    num_cached_blocks: int = 0
    """Leading blocks that the prefill engine has in its own prefix cache: nobody reads them."""

    def __post_init__(self) -> None:
        expected = self.num_cached_blocks
        for segment in self.segments:
            if segment.first_block != expected or segment.num_blocks <= 0:
                raise ValueError(f"read plan: {segment} does not continue at block {expected}")
            expected = segment.last_block
        if expected != self.num_hit_blocks or self.num_cached_blocks < 0:
            raise ValueError(
                f"read plan covers [{self.num_cached_blocks}, {expected}) of"
                f" {self.num_hit_blocks} blocks"
            )
