"""``assumptions.toml`` as typed values: the only place where it is read."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_dualpath.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hardware(_Section):
    """One node. Rates in each direction."""

    gpus_per_node: int
    storage_gbytes_per_s: float
    compute_gbytes_per_s: float
    dram_gbytes_per_s: float
    hbm_gbytes: float
    hbm_gbytes_per_s: float
    tflops_fp8: float
    tflops_bf16: float


class Efficiency(_Section):
    """What parts of the peak are reached, and what a layer takes however little it does."""

    linear_fp8: float
    linear_bf16: float
    decode_linear: float
    attention: float
    indexer: float
    hbm: float
    prefill_layer_moe_s: float
    prefill_layer_dense_s: float
    decode_layer_moe_s: float
    decode_layer_dense_s: float
    hbm_reserve_gbytes: float


class Scheduling(_Section):
    """Constants of the policies and of prefill batches."""

    quota_s: float
    alpha_s: float
    beta_s: float
    block_tokens: int
    max_readers: int
    min_segment_blocks: int
    report_every_s: float


class TraceAssumptions(_Section):
    """What Table 2 leaves open of the traces."""

    num_trajectories: int
    max_first_tokens: int


class Balance(_Section):
    """Over what max/mean is taken."""

    window_s: float


class ModelShape(_Section):
    """A model and how the paper's engines divide it. ``kv_rank`` > 0: latent attention."""

    layers: int
    hidden: int
    dense_layers: int
    dense_ffn: int
    heads: int
    vocabulary: int
    weight_bytes: int
    kv_bytes_per_token_layer: int
    gpus_per_engine: int
    prefill_group_nodes: int
    decode_group_nodes: int
    staging_gbytes: float
    experts: int = 0
    active_experts: int = 0
    shared_experts: int = 0
    expert_ffn: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    indexer_heads: int = 0
    indexer_dim: int = 0
    top_k: int = 0


class Assumptions(_Section):
    """The whole file."""

    hardware: Hardware
    efficiency: Efficiency
    scheduling: Scheduling
    trace: TraceAssumptions
    balance: Balance
    models: dict[str, ModelShape]

    def model(self, name: str) -> ModelShape:
        """The shape of a model by its name here."""
        if name not in self.models:
            known = ", ".join(sorted(self.models))
            raise ConfigError(f"model: expected one of {known}, found {name!r}")
        return self.models[name]


@lru_cache(maxsize=1)
def paper_assumptions() -> Assumptions:
    """The committed assumptions."""
    text = resources.files("vllm_dualpath.sim").joinpath("assumptions.toml").read_text("utf-8")
    return _parse("the package's assumptions.toml", text)


def load_assumptions(path: Path | None) -> Assumptions:
    """Another file of the same form; None: the committed one."""
    if path is None:
        return paper_assumptions()
    try:
        return _parse(str(path), path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"assumptions {path}: cannot be read ({exc})") from exc


def _parse(where: str, text: str) -> Assumptions:
    try:
        return Assumptions.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as exc:
        raise ConfigError(f"assumptions in {where}: {exc}") from exc
