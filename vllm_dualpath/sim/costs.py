"""From a model's shape and the hardware to the seconds that the simulator's core counts with.

FLOPs and bytes are sums over layers and of the whole model; an engine divides them by its GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dualpath.sim.assumptions import Assumptions, Hardware, ModelShape

GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What one token asks of the model."""

    linear_flops: float
    """Projections and feed-forward, a new token."""
    pair_flops: float
    """Dense attention, or the indexer where attention is sparse, a pair of tokens."""
    selected_pair_flops: float
    """Sparse attention, a selected pair."""
    total_params: float
    expert_params: float
    """Of those, in routed experts."""
    kv_bytes_per_token: int
    index_bytes_per_token: float
    """Bytes of every context token that a decode step reads."""
    selected_bytes_per_token: float
    """Bytes of every selected context token that it reads besides."""


def model_work(shape: ModelShape) -> ModelWork:
    """The sums over ``shape``'s layers."""
    attention = _attention_params(shape)
    dense = shape.dense_layers * 3.0 * shape.hidden * shape.dense_ffn
    moe_layers = shape.layers - shape.dense_layers
    expert = 3.0 * shape.hidden * shape.expert_ffn
    active = moe_layers * expert * (shape.active_experts + shape.shared_experts)
    routed = moe_layers * expert * shape.experts
    head = float(shape.hidden) * shape.vocabulary
    common = shape.layers * attention + dense + head
    pair, selected = _pair_flops(shape)
    index, chosen = _decode_bytes(shape)
    return ModelWork(
        # The vocabulary's head runs for one position a request: not counted with each token.
        linear_flops=2.0 * (common - head + active),
        pair_flops=pair * shape.layers,
        selected_pair_flops=selected * shape.layers,
        total_params=common + head + routed + moe_layers * expert * shape.shared_experts,
        expert_params=routed,
        kv_bytes_per_token=shape.kv_bytes_per_token_layer * shape.layers,
        index_bytes_per_token=index * shape.layers,
        selected_bytes_per_token=chosen * shape.layers,
    )


def _attention_params(shape: ModelShape) -> float:
    hidden = float(shape.hidden)
    if shape.kv_rank == 0:
        return hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    query_dim = shape.heads * (shape.nope_dim + shape.rope_dim)
    query = (hidden + query_dim) * shape.q_rank if shape.q_rank else hidden * query_dim
    latent = hidden * (shape.kv_rank + shape.rope_dim)
    expand = float(shape.kv_rank) * shape.heads * (shape.nope_dim + shape.value_dim)
    output = float(shape.heads) * shape.value_dim * hidden
    source = shape.q_rank or hidden
    indexer = source * shape.indexer_heads * shape.indexer_dim + hidden * shape.indexer_dim
    return query + latent + expand + output + indexer


def _pair_flops(shape: ModelShape) -> tuple[float, float]:
    """(every pair, every selected pair) of one layer; a multiply-add is 2."""
    if shape.kv_rank == 0:
        return 4.0 * shape.heads * shape.head_dim, 0.0
    # In latent space: scores over kv_rank + rope_dim, values over kv_rank.
    latent = 2.0 * shape.heads * (2 * shape.kv_rank + shape.rope_dim)
    if shape.top_k == 0:
        return latent, 0.0
    return 2.0 * shape.indexer_heads * shape.indexer_dim, latent


def _decode_bytes(shape: ModelShape) -> tuple[float, float]:
    total = float(shape.kv_bytes_per_token_layer)
    if shape.top_k == 0:
        return total, 0.0
    index = shape.indexer_dim + 4.0  # fp8 key and its scale
    return index, total - index


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Seconds of one engine, and the tokens of KV that fit its HBM."""

    prefill_step_s: float
    prefill_token_s: float
    prefill_pair_s: float
    prefill_selected_pair_s: float
    prefill_cache_tokens: int
    decode_step_s: float
    decode_request_s: float
    decode_token_s: float
    decode_selected_token_s: float
    decode_cache_tokens: int


def engine_costs(assumptions: Assumptions, shape: ModelShape) -> EngineCosts:
    """What the paper's engines would take, under the assumptions."""
    hardware, efficiency = assumptions.hardware, assumptions.efficiency
    work, gpus = model_work(shape), shape.gpus_per_engine
    peak = _peak_flops_per_s(hardware, shape)
    linear = peak * (efficiency.linear_fp8 if shape.weight_bytes == 1 else efficiency.linear_bf16)
    attention = hardware.tflops_bf16 * TERA * efficiency.attention * gpus
    indexer = hardware.tflops_fp8 * TERA * efficiency.indexer * gpus
    hbm = hardware.hbm_gbytes_per_s * GIGA * efficiency.hbm
    is_moe = shape.experts > 0
    prefill_layer = efficiency.prefill_layer_moe_s if is_moe else efficiency.prefill_layer_dense_s
    decode_layer = efficiency.decode_layer_moe_s if is_moe else efficiency.decode_layer_dense_s
    decode_weights = _weight_bytes(assumptions, shape, work, shape.decode_group_nodes)
    return EngineCosts(
        prefill_step_s=prefill_layer * shape.layers,
        prefill_token_s=work.linear_flops / linear,
        prefill_pair_s=work.pair_flops / (indexer if shape.top_k else attention),
        prefill_selected_pair_s=work.selected_pair_flops / attention,
        prefill_cache_tokens=_cache_tokens(assumptions, shape, work, shape.prefill_group_nodes),
        decode_step_s=decode_layer * shape.layers + decode_weights / hbm,
        decode_request_s=work.linear_flops / (peak * efficiency.decode_linear),
        decode_token_s=work.index_bytes_per_token / (hbm * gpus),
        decode_selected_token_s=work.selected_bytes_per_token / (hbm * gpus),
        decode_cache_tokens=_cache_tokens(assumptions, shape, work, shape.decode_group_nodes),
    )


def _peak_flops_per_s(hardware: Hardware, shape: ModelShape) -> float:
    tflops = hardware.tflops_fp8 if shape.weight_bytes == 1 else hardware.tflops_bf16
    return tflops * TERA * shape.gpus_per_engine


def _weight_bytes(
    assumptions: Assumptions, shape: ModelShape, work: ModelWork, group_nodes: int
) -> float:
    """Of one GPU: experts lie over the group, everything else over the engine."""
    group_gpus = group_nodes * assumptions.hardware.gpus_per_node
    common = work.total_params - work.expert_params
    params = work.expert_params / group_gpus + common / shape.gpus_per_engine
    return params * shape.weight_bytes


def _cache_tokens(
    assumptions: Assumptions, shape: ModelShape, work: ModelWork, group_nodes: int
) -> int:
    hbm = (assumptions.hardware.hbm_gbytes - assumptions.efficiency.hbm_reserve_gbytes) * GIGA
    free = hbm - _weight_bytes(assumptions, shape, work, group_nodes)
    return int(free * shape.gpus_per_engine / work.kv_bytes_per_token)
