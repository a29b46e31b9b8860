"""``dual``: the whole hit is read by the side whose storage NIC has less to read."""

from __future__ import annotations

from vllm_dualpath.policy.base import ClusterSnapshot, Decision, PlanRequest
from vllm_dualpath.policy.placement import place, two_part_plan


class Dual:
    """The paper's read-path choice: the shorter read queue, the prefill side on a tie.

    The engines themselves are chosen by fewest tokens; the paper's choice between engines, which
    also weighs read queues, is not built.
    """

    @property
    def mode(self) -> str:
        return "dual"

    def decide(self, snapshot: ClusterSnapshot, request: PlanRequest) -> Decision | None:
        engines = place(snapshot, request)
        if engines is None:
            return None
        prefill, decode = engines
        prefill_reads = prefill.read_queue_tokens <= decode.read_queue_tokens
        num_first = request.num_hit_blocks if prefill_reads else 0
        return Decision(
            prefill.engine_id,
            decode.engine_id,
            two_part_plan(request.num_hit_blocks, prefill.engine_id, num_first, decode.engine_id),
        )
