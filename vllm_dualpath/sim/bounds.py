"""What a cluster can do at most, resource by resource, without simulating it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dualpath.sim.assumptions import Assumptions, Hardware, ModelShape
from vllm_dualpath.sim.costs import GIGA, engine_costs, model_work
from vllm_dualpath.workload import TrajectorySet


def bottleneck_free_ratios(hardware: Hardware) -> tuple[float, float]:
    """The P/D ratios at which all storage NICs can be busy and no compute NIC or memory limits.

    s / (g - s) <= P/D <= min((g - 2s) / s, (g - s) / (2s), (M / (B s) - 3) / 2), with g GPUs a
    node, one compute NIC of bandwidth B each, a storage NIC of s B, memory bandwidth M.
    Source: the paper's section 4.2, equation 9.
    """
    g = float(hardware.gpus_per_node)
    s = hardware.storage_gbytes_per_s / hardware.compute_gbytes_per_s
    memory = hardware.dram_gbytes_per_s / hardware.storage_gbytes_per_s
    least = s / (g - s) if g > s else float("inf")
    return least, min((g - 2 * s) / s, (g - s) / (2 * s), (memory - 3) / 2)


@dataclass(frozen=True, slots=True)
class TurnDemand:
    """What a mean turn of a trace asks for."""

    hit_tokens: float
    new_tokens: float
    generated_tokens: float
    room_tokens: float
    """Prompt and answer."""
    prefill_s: float
    """Seconds of one prefill engine."""


def turn_demand(
    assumptions: Assumptions, shape: ModelShape, trajectories: TrajectorySet
) -> TurnDemand:
    """Means over all turns of the trace."""
    block = assumptions.scheduling.block_tokens
    prompts = trajectories.prompt_tokens()
    context = prompts - trajectories.append_tokens
    hits = context // block * block
    new = prompts - hits
    costs = engine_costs(assumptions, shape)
    pairs = new * hits + new * (new + 1) / 2
    selected = new * np.minimum(prompts, shape.top_k) if shape.top_k else np.zeros(len(new))
    seconds = (
        costs.prefill_token_s * new
        + costs.prefill_pair_s * pairs
        + costs.prefill_selected_pair_s * selected
    )
    return TurnDemand(
        hit_tokens=float(hits.mean()),
        new_tokens=float(new.mean()),
        generated_tokens=float(trajectories.generated_tokens.mean()),
        room_tokens=float((prompts + trajectories.generated_tokens).mean()),
        prefill_s=float(seconds.mean()),
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """The most turns a second that one resource allows."""

    resource: str
    turns_per_s: float


def throughput_bounds(
    assumptions: Assumptions,
    shape: ModelShape,
    trajectories: TrajectorySet,
    nodes: tuple[int, int],
    both_sides_read: bool,
    num_agents: int | None = None,
) -> list[Bound]:
    """The bounds of ``nodes`` (prefill, decode), the tightest first.

    They ignore that ranks wait for each other and that load varies: no run gets beyond them.
    ``num_agents`` adds what so many agents can ask for if nothing ever makes them wait.
    """
    demand, costs = turn_demand(assumptions, shape, trajectories), engine_costs(assumptions, shape)
    hardware, kv_bytes = assumptions.hardware, model_work(shape).kv_bytes_per_token
    per_node = hardware.gpus_per_node // shape.gpus_per_engine
    engine_nic = hardware.compute_gbytes_per_s * GIGA * shape.gpus_per_engine
    storage = hardware.storage_gbytes_per_s * GIGA
    num_readers = sum(nodes) if both_sides_read else nodes[0]
    loaded, decode_engines = demand.hit_tokens * kv_bytes, nodes[1] * per_node
    running = costs.decode_cache_tokens / demand.room_tokens
    context = demand.room_tokens
    step_s = costs.decode_step_s + running * (
        costs.decode_request_s
        + costs.decode_token_s * context
        + costs.decode_selected_token_s * min(context, float(shape.top_k))
    )
    bounds = [
        Bound("storage NICs", num_readers * storage / loaded),
        Bound("prefill compute", nodes[0] * per_node / demand.prefill_s),
        Bound("prefill compute NICs", nodes[0] * per_node * engine_nic / loaded),
        Bound("decode KV room", decode_engines * running / (demand.generated_tokens * step_s)),
    ]
    if num_agents is not None:
        alone_s = loaded / (storage * (2 if both_sides_read else 1)) + costs.prefill_step_s
        alone_s += demand.prefill_s + demand.generated_tokens * costs.decode_step_s
        bounds.append(Bound("the agents' own pace", num_agents / alone_s))
    return sorted(bounds, key=lambda bound: bound.turns_per_s)
