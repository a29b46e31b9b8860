"""Decides where a request runs and who reads its hit blocks: a typed layer over the C++ core."""

from __future__ import annotations

from vllm_dualpath.native import (
    NO_LIMIT,
    ClusterView,
    EngineState,
    NodeState,
    PrefixCacheModel,
    ReadRate,
    Role,
    WaitingLine,
)
from vllm_dualpath.policy.base import Decision, PlanRequest, Segment, Verdict
from vllm_dualpath.policy.core import MODES, Policy, make_policy

__all__ = [
    "MODES",
    "NO_LIMIT",
    "ClusterView",
    "Decision",
    "EngineState",
    "NodeState",
    "PlanRequest",
    "Policy",
    "PrefixCacheModel",
    "ReadRate",
    "Role",
    "Segment",
    "Verdict",
    "WaitingLine",
    "make_policy",
]
