"""What a user may choose of a simulation, checked: cluster, load, policy, faults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_dualpath.config import parse

Mode = Literal["basic", "prefill_only", "dual", "split", "pool", "oracle"]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NodeDies(_Checked):
    """A node, prefill nodes counted first, that is gone from ``at_s`` on."""

    kind: Literal["node_dies"] = "node_dies"
    node: int = Field(ge=0, description="prefill nodes first, then decode nodes")
    at_s: float = Field(ge=0, description="when it dies")


class StorageSlows(_Checked):
    """A storage NIC that has ``factor`` of its rate for a while."""

    kind: Literal["storage_slows"] = "storage_slows"
    node: int = Field(ge=0, description="prefill nodes first, then decode nodes")
    at_s: float = Field(ge=0, description="when it becomes slow")
    factor: float = Field(gt=0, le=1, description="its rate, of the nominal one")
    until_s: float = Field(gt=0, description="when it has recovered")


Fault = Annotated[NodeDies | StorageSlows, Field(discriminator="kind")]


class SimulationConfig(_Checked):
    """One run."""

    model: str = Field("ds-660b", description="a model of assumptions.toml")
    prefill_nodes: int = Field(2, ge=1, description="prefill nodes (P)")
    decode_nodes: int = Field(4, ge=1, description="decode nodes (D)")
    mode: Mode = Field("dual", description="basic: round robin, prefill reads, no overlap")
    trace: str = Field("64k", description="32k, 48k, 64k, or a file of trajectories")
    agents: int | None = Field(None, ge=1, description="offline: so many, all at once")
    agents_per_s: float | None = Field(None, gt=0, description="online: Poisson arrivals")
    duration_s: float = Field(3600.0, gt=0, description="online: agents come for so long")
    warm_up_s: float = Field(1200.0, ge=0, description="online: turns before are not measured")
    tool_time_s: float = Field(0.0, ge=0, description="mean between an answer and the next turn")
    append_scale: float = Field(1.0, gt=0, description="factor on appended tokens")
    generated_scale: float = Field(1.0, gt=0, description="factor on generated tokens")
    seed: int = Field(0, ge=0, description="equal seeds, equal results")
    layerwise: bool | None = Field(None, description="layer-wise prefill; default: by mode")
    placement: Literal["round_robin", "fewest_tokens", "paper", "balanced"] | None = Field(
        None, description="how engines are chosen; default: by mode"
    )
    read_path: Literal["prefill", "alternate", "shorter_queue", "split", "pool"] | None = Field(
        None, description="who reads; default: by mode"
    )
    recompute: bool = Field(False, description="compute hits that would be read later")
    engine_caches: bool = Field(
        False, description="split, pool: do not read what a prefill engine holds in its HBM"
    )
    prefill_stages_all: bool = Field(
        False, description="prefill slots for whole prompts, as our movers have"
    )
    storage_scale: float = Field(1.0, gt=0, description="factor on every storage NIC's rate")
    compute_scale: float = Field(1.0, gt=0, description="factor on every engine's seconds")
    faults: tuple[Fault, ...] = Field((), description="what breaks, and when")

    @model_validator(mode="after")
    def _one_load(self) -> Self:
        if (self.agents is None) == (self.agents_per_s is None):
            raise ValueError(
                "expected either agents (--agents: all at once) or agents_per_s (--rate: Poisson)"
            )
        if self.agents_per_s is not None and self.warm_up_s >= self.duration_s:
            raise ValueError("warm_up_s must be less than duration_s: nothing would be measured")
        return self


def make_config(**choices: object) -> SimulationConfig:
    """A checked configuration. Raises ConfigError with every wrong key."""
    return parse(SimulationConfig, choices, "simulation")
