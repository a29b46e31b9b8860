"""Pure functions that decide where a request runs and who reads its hit blocks."""

from __future__ import annotations

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.policy.base import ClusterSnapshot, Decision, EngineLoad, PlanRequest, Policy
from vllm_dualpath.policy.dual import Dual
from vllm_dualpath.policy.prefill_only import PrefillOnly
from vllm_dualpath.policy.split import Split

__all__ = [
    "ClusterSnapshot",
    "Decision",
    "Dual",
    "EngineLoad",
    "PlanRequest",
    "Policy",
    "PrefillOnly",
    "Split",
    "make_policy",
]


def make_policy(mode: str, split_fraction: float) -> Policy:
    """The policy that the router's ``mode`` names; only ``split`` looks at ``split_fraction``."""
    if mode == "prefill_only":
        return PrefillOnly()
    if mode == "dual":
        return Dual()
    if mode == "split":
        return Split(split_fraction)
    raise ConfigError(f"mode: expected prefill_only, dual or split, found {mode!r}")
