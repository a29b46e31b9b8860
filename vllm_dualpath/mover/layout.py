"""How a spec's geometry and the staging memory are laid out; what cannot work is refused here."""

from __future__ import annotations

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import EngineConfig
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.messages import MoverSpec
from vllm_dualpath.mover.staging import SlotPool


def geometry_of(spec: MoverSpec) -> Geometry:
    """The geometry in a spec. Raises ``ConfigError`` if it cannot be one."""
    wire = spec.geometry
    try:
        return Geometry(
            block_tokens=wire.block_tokens,
            page_tokens=wire.page_tokens,
            layer_page_bytes=wire.layer_page_bytes,
            layout=wire.layout,
            kv_heads=wire.kv_heads,
            kv_dtype=wire.kv_dtype,
        )
    except ValueError as exc:
        raise ConfigError(f"mover spec: {exc}") from exc


def make_pools(
    config: EngineConfig, geometry: Geometry, max_model_len: int
) -> tuple[SlotPool, SlotPool]:
    """Divide the staging memory. Raises ``ConfigError`` if the longest request would not fit."""
    num_slots = config.staging_bytes // geometry.slot_bytes
    num_persist = 0 if config.role == "prefill" else config.persist_slots
    needed = geometry.num_blocks(max_model_len) + num_persist
    if num_slots < needed:
        raise ConfigError(
            f"staging_bytes: {config.staging_bytes} holds {num_slots} slots of"
            f" {geometry.slot_bytes} bytes; a prompt of max_model_len {max_model_len} and"
            f" {num_persist} persist slots need {needed}: set staging_bytes to at least"
            f" {needed * geometry.slot_bytes}, or lower max_model_len"
        )
    name = "load" if config.role == "both" else config.role
    persist = SlotPool("persist", num_slots - num_persist, num_persist)
    return SlotPool(name, 0, num_slots - num_persist), persist
