"""``split``: both sides read a part of every hit, at a fixed fraction."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.policy.base import ClusterSnapshot, Decision, PlanRequest
from vllm_dualpath.policy.placement import place, two_part_plan


@dataclass(frozen=True, slots=True)
class Split:
    """The prefill engine reads the first ``round(fraction * hit blocks)``, the decode one the rest.

    The prefill side has the leading blocks because its own compute needs them first.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise ConfigError(f"split_fraction: expected 0 to 1, found {self.fraction}")

    @property
    def mode(self) -> str:
        return "split"

    def decide(self, snapshot: ClusterSnapshot, request: PlanRequest) -> Decision | None:
        engines = place(snapshot, request)
        if engines is None:
            return None
        prefill, decode = engines[0].engine_id, engines[1].engine_id
        num_first = round(self.fraction * request.num_hit_blocks)
        plan = two_part_plan(request.num_hit_blocks, prefill, num_first, decode)
        return Decision(prefill, decode, plan)
