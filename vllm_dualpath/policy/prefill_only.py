"""``prefill_only``: the prefill engine reads everything, as systems without a second path do."""

from __future__ import annotations

from vllm_dualpath.policy.base import ClusterSnapshot, Decision, PlanRequest
from vllm_dualpath.policy.placement import place, two_part_plan


class PrefillOnly:
    """The paper's Basic: the baseline that the other modes are measured against."""

    @property
    def mode(self) -> str:
        return "prefill_only"

    def decide(self, snapshot: ClusterSnapshot, request: PlanRequest) -> Decision | None:
        engines = place(snapshot, request)
        if engines is None:
            return None
        prefill, decode = engines[0].engine_id, engines[1].engine_id
        num_hit = request.num_hit_blocks
        return Decision(prefill, decode, two_part_plan(num_hit, prefill, num_hit, decode))
