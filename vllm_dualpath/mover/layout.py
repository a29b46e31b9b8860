"""How a spec's geometry and the staging memory are laid out; what cannot work is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import EngineConfig, divide_staging
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.messages import MoverSpec
from vllm_dualpath.mover.staging import SlotPool
from vllm_dualpath.storage import IoOptions


def geometry_of(spec: MoverSpec) -> Geometry:
    """The geometry in a spec. Raises ``ConfigError`` if it cannot be one."""
    try:
        return spec.geometry.to_geometry()
    except ValueError as exc:
        raise ConfigError(f"mover spec: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Pools:
    """Disjoint parts of one staging memory."""

    prompts: SlotPool
    """Of transfers and loads; named by the engine's role."""
    donor: SlotPool
    persist: SlotPool


def make_pools(config: EngineConfig, geometry: Geometry, max_model_len: int) -> Pools:
    """Divide the staging memory. Raises ``ConfigError`` as ``divide_staging``."""
    division = divide_staging(config, geometry, max_model_len)
    name = "load" if config.role == "both" else config.role
    first_donor = division.num_prompt_slots
    first_persist = first_donor + division.num_donor_slots
    return Pools(
        prompts=SlotPool(name, 0, division.num_prompt_slots),
        donor=SlotPool("donor", first_donor, division.num_donor_slots),
        persist=SlotPool("persist", first_persist, division.num_persist_slots),
    )


def io_options(config: EngineConfig) -> IoOptions:
    """How the store shall move its blocks."""
    return IoOptions(config.store_io, config.store_threads, config.store_depth)
