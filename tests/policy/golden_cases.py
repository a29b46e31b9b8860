"""Reads ``golden/*.json``: decisions written by hand that every user of a policy must reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dualpath.policy import (
    ClusterView,
    EngineState,
    NodeState,
    PlanRequest,
    Policy,
    Role,
    WaitingLine,
    make_policy,
)


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """One case. Without ``nodes`` each engine has a node of its own, and carries its fields."""

    name: str
    values: dict[str, Any]

    @property
    def mode(self) -> str:
        return str(self.values["mode"])

    def policy(self) -> Policy:
        return make_policy(self.mode, **self.values.get("parameters", {}))

    def view(self) -> ClusterView:
        engines = self.values["engines"]
        nodes = self.values.get("nodes")
        if nodes is None:
            nodes = [{k: v for k, v in e.items() if k in _NODE_FIELDS} for e in engines]
            engines = [
                {k: v for k, v in e.items() if k not in _NODE_FIELDS} | {"node": index}
                for index, e in enumerate(engines)
            ]
        view = ClusterView([_node(node) for node in nodes], [_engine(e) for e in engines])
        view.nominal_read_rate = self.values.get("nominal_read_rate", 0)
        view.set_prefill_curve(*self.values.get("prefill_curve", (0, 0)))
        return view

    def request(self) -> PlanRequest:
        return PlanRequest(**self.values["request"])

    def line(self) -> WaitingLine | None:
        lengths = self.values.get("line")
        if lengths is None:
            return None
        line = WaitingLine()
        for length in lengths:
            line.push(length)
        return line

    @property
    def ignore_load(self) -> bool:
        return bool(self.values.get("ignore_load", False))

    @property
    def expected(self) -> dict[str, Any]:
        """Fields of the decision; those left out are zero."""
        decision = self.values["decision"]
        if "verdict" in decision:
            return {"verdict": decision["verdict"]}
        zero = {"verdict": "placed", "num_cached_blocks": 0, "num_recompute_blocks": 0}
        segments = tuple(tuple(segment) for segment in decision["segments"])
        return {**zero, **decision, "segments": segments}


_NODE_FIELDS = (
    "read_queue_tokens",
    "push_queue_tokens",
    "recent_read_tokens",
    "read_rate",
    "push_rate",
)


def load_golden_cases() -> list[GoldenCase]:
    cases: list[GoldenCase] = []
    for path in sorted((Path(__file__).parent / "golden").glob("*.json")):
        document = json.loads(path.read_text())
        cases += [GoldenCase(f"{path.stem}: {c['name']}", c) for c in document["cases"]]
    return cases


def _node(fields: dict[str, Any]) -> NodeState:
    node = NodeState()
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _engine(fields: dict[str, Any]) -> EngineState:
    engine = EngineState()
    for name, value in fields.items():
        setattr(engine, name, Role.__members__[value.upper()] if name == "role" else value)
    return engine
