"""From a configuration and the assumptions to the core's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_dualpath import native
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import Assumptions, ModelShape
from vllm_dualpath.sim.config import SimulationConfig, StorageSlows
from vllm_dualpath.sim.costs import GIGA, EngineCosts, engine_costs, model_work
from vllm_dualpath.workload import TraceStatistics


@dataclass(frozen=True, slots=True)
class ModeParts:
    """A mode as the policy core and the engines know it."""

    policy: str
    placement: str | None
    layerwise: bool
    oracle: bool


# The paper's Basic is the same engine without its three additions: reads by the prefill side, no
# layer-wise prefill, engines by turns. `prefill_only` is the router's mode of that name.
MODES = {
    "basic": ModeParts("prefill_only", "round_robin", layerwise=False, oracle=False),
    "prefill_only": ModeParts("prefill_only", None, layerwise=True, oracle=False),
    "dual": ModeParts("dual", None, layerwise=True, oracle=False),
    "split": ModeParts("split", None, layerwise=True, oracle=False),
    "pool": ModeParts("pool", None, layerwise=True, oracle=False),
    "oracle": ModeParts("dual", None, layerwise=True, oracle=True),
}

_PLACEMENTS = {
    "round_robin": native.Placement.ROUND_ROBIN,
    "fewest_tokens": native.Placement.FEWEST_TOKENS,
    "paper": native.Placement.PAPER,
    "balanced": native.Placement.BALANCED,
}
_READ_PATHS = {
    "prefill": native.ReadPath.PREFILL,
    "alternate": native.ReadPath.ALTERNATE,
    "shorter_queue": native.ReadPath.SHORTER_QUEUE,
    "split": native.ReadPath.SPLIT,
    "pool": native.ReadPath.POOL,
}


def core_settings(
    config: SimulationConfig, assumptions: Assumptions, trace: TraceStatistics
) -> native.SimSettings:
    """What the core simulates. ``trace`` tells how long prompts are, for beta."""
    shape = assumptions.model(config.model)
    costs = engine_costs(assumptions, shape)
    settings = native.SimSettings()
    _set_shape(settings, config, assumptions, shape)
    _set_costs(settings, config, costs, shape)
    _set_policy(settings, config, assumptions, trace)
    parts = MODES[config.mode]
    settings.switches.oracle = parts.oracle
    settings.switches.layerwise = parts.layerwise if config.layerwise is None else config.layerwise
    settings.switches.prefill_stages_all = config.prefill_stages_all
    settings.kv_bytes_per_token = model_work(shape).kv_bytes_per_token
    settings.block_tokens = assumptions.scheduling.block_tokens
    settings.quota_s = assumptions.scheduling.quota_s
    settings.report_every_s = assumptions.scheduling.report_every_s
    settings.tool_time_s = config.tool_time_s
    settings.seed = config.seed
    if config.agents_per_s is not None:
        settings.stop_s = settings.measure_until_s = config.duration_s
        settings.measure_from_s = config.warm_up_s
    for fault in config.faults:
        if isinstance(fault, StorageSlows):
            factor, until_s = fault.factor, fault.until_s
        else:
            factor, until_s = 0.0, math.inf
        settings.add_fault(fault.kind, fault.node, fault.at_s, factor, until_s)
    return settings


def _set_shape(
    settings: native.SimSettings,
    config: SimulationConfig,
    assumptions: Assumptions,
    model: ModelShape,
) -> None:
    hardware, shape = assumptions.hardware, settings.shape
    shape.num_prefill_nodes = config.prefill_nodes
    shape.num_decode_nodes = config.decode_nodes
    shape.engines_per_node = hardware.gpus_per_node // model.gpus_per_engine
    # A deployment smaller than a group is one group.
    shape.prefill_group_nodes = min(model.prefill_group_nodes, config.prefill_nodes)
    shape.decode_group_nodes = min(model.decode_group_nodes, config.decode_nodes)
    for role, nodes, group in (
        ("prefill", config.prefill_nodes, shape.prefill_group_nodes),
        ("decode", config.decode_nodes, shape.decode_group_nodes),
    ):
        if nodes % group:
            raise ConfigError(
                f"{role}_nodes: expected a multiple of {group}, over which {config.model}'s "
                f"experts are spread, found {nodes}"
            )
    shape.storage_bytes_per_s = hardware.storage_gbytes_per_s * GIGA * config.storage_scale
    shape.engine_nic_bytes_per_s = hardware.compute_gbytes_per_s * GIGA * model.gpus_per_engine
    shape.staging_bytes = int(model.staging_gbytes * GIGA)


def _set_costs(
    settings: native.SimSettings, config: SimulationConfig, costs: EngineCosts, model: ModelShape
) -> None:
    prefill, decode, scale = settings.prefill, settings.decode, config.compute_scale
    prefill.step_s = costs.prefill_step_s * scale
    prefill.token_s = costs.prefill_token_s * scale
    prefill.pair_s = costs.prefill_pair_s * scale
    prefill.selected_pair_s = costs.prefill_selected_pair_s * scale
    prefill.selected = decode.selected = model.top_k
    prefill.cache_tokens = costs.prefill_cache_tokens
    decode.step_s = costs.decode_step_s * scale
    decode.request_s = costs.decode_request_s * scale
    decode.token_s = costs.decode_token_s * scale
    decode.selected_token_s = costs.decode_selected_token_s * scale
    decode.cache_tokens = costs.decode_cache_tokens


def _set_policy(
    settings: native.SimSettings,
    config: SimulationConfig,
    assumptions: Assumptions,
    trace: TraceStatistics,
) -> None:
    scheduling, parts = assumptions.scheduling, MODES[config.mode]
    policy = native.PolicyParameters(parts.policy)
    if placement := config.placement or parts.placement:
        policy.placement = _PLACEMENTS[placement]
    if config.read_path is not None:
        policy.read_path = _READ_PATHS[config.read_path]
    policy.alpha_s = scheduling.alpha_s
    policy.beta_tokens = int(scheduling.beta_s * prompt_tokens_per_s(settings, trace))
    policy.min_segment_blocks = scheduling.min_segment_blocks
    policy.max_readers = scheduling.max_readers
    policy.recompute = config.recompute
    policy.read_past_cache = config.engine_caches and parts.policy in ("split", "pool")
    settings.policy = policy
    # The mean slope of attention over the whole context: the curve that the policy knows is linear.
    context = max(1, int(trace.mean_context))
    new = max(1, int(trace.append_tokens))
    slope = settings.prefill.attention_s(context, new) / (new * (context + new / 2))
    if settings.prefill.token_s > 0:
        settings.set_curve(1.0 / settings.prefill.token_s, slope)


def prompt_tokens_per_s(settings: native.SimSettings, trace: TraceStatistics) -> float:
    """Prompt tokens, cached ones counted, that an engine passes a second on this trace."""
    new = max(1, int(trace.append_tokens))
    cached = max(0, int(trace.mean_context) - new)
    prefill = settings.prefill
    seconds = prefill.token_s * new + prefill.attention_s(cached, new)
    return trace.mean_context / seconds if seconds > 0 else 1e12
