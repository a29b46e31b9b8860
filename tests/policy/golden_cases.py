"""Reads ``golden/*.json``: decisions written by hand that every user of a policy must reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dualpath.plan import ReadPlan, Segment
from vllm_dualpath.policy import ClusterSnapshot, Decision, EngineLoad, PlanRequest


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """``expected`` None: no pair of engines can take the request."""

    name: str
    mode: str
    split_fraction: float
    snapshot: ClusterSnapshot
    request: PlanRequest
    expected: Decision | None


def load_golden_cases() -> list[GoldenCase]:
    cases: list[GoldenCase] = []
    for path in sorted((Path(__file__).parent / "golden").glob("*.json")):
        document = json.loads(path.read_text())
        cases += [_case(path.stem, document, values) for values in document["cases"]]
    return cases


def _case(stem: str, document: dict[str, Any], values: dict[str, Any]) -> GoldenCase:
    request = PlanRequest(**values["request"])
    return GoldenCase(
        name=f"{stem}: {values['name']}",
        mode=document["mode"],
        split_fraction=document["split_fraction"],
        snapshot=ClusterSnapshot(
            prefill=tuple(EngineLoad(**engine) for engine in values["snapshot"]["prefill"]),
            decode=tuple(EngineLoad(**engine) for engine in values["snapshot"]["decode"]),
        ),
        request=request,
        expected=_decision(values["decision"], request.num_hit_blocks),
    )


def _decision(values: dict[str, Any] | None, num_hit_blocks: int) -> Decision | None:
    if values is None:
        return None
    plan = ReadPlan(num_hit_blocks, tuple(Segment(*segment) for segment in values["segments"]))
    return Decision(values["prefill_engine"], values["decode_engine"], plan)
