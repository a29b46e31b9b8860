"""The capacity planner: every split of N nodes into prefill and decode, every mode, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import Assumptions
from vllm_dualpath.sim.bounds import Bound, bottleneck_free_ratios, throughput_bounds
from vllm_dualpath.sim.config import SimulationConfig
from vllm_dualpath.sim.results import SimulationResult, Summary
from vllm_dualpath.sim.run import run_simulation, scaled_trace

MODES = ("prefill_only", "dual", "split", "pool")


@dataclass(frozen=True, slots=True)
class Cell:
    """One split of the nodes in one mode."""

    prefill_nodes: int
    decode_nodes: int
    mode: str
    result: SimulationResult
    bounds: tuple[Bound, ...]
    """The tightest first."""
    is_ratio_free: bool
    """Whether compute NICs and memory can carry all that the storage NICs read."""

    @property
    def turns_per_s(self) -> float:
        """Turns a second that were served."""
        return self.result.counts["turns"] / self.result.end_s if self.result.end_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """As one of ``cells`` in the JSON file."""
        return {
            "prefill_nodes": self.prefill_nodes,
            "decode_nodes": self.decode_nodes,
            "mode": self.mode,
            "job_s": self.result.job_s,
            "turns_per_s": self.turns_per_s,
            "ttft_s": Summary.of(self.result.first_token_s).to_json(),
            "tpot_s": Summary.of(self.result.per_token_s).to_json(),
            "bounds": {bound.resource: bound.turns_per_s for bound in self.bounds},
            "binds": self.bounds[0].resource,
            "bottleneck_free_ratio": self.is_ratio_free,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of N nodes, and the ratios between which no compute NIC or memory limits."""

    config: SimulationConfig
    num_nodes: int
    ratios: tuple[float, float]
    cells: tuple[Cell, ...]

    def best(self, mode: str) -> Cell:
        """The mode's best split: offline by JCT, online by mean TTFT among what kept up."""
        return min((cell for cell in self.cells if cell.mode == mode), key=self._merit)

    @property
    def best_of_all(self) -> Cell:
        """The best split in the best mode."""
        return min(self.cells, key=self._merit)

    def _merit(self, cell: Cell) -> tuple[float, float]:
        if self.config.agents is not None:
            return cell.result.job_s, 0.0
        # A cluster that cannot keep up serves fewer turns; equal ones differ by chance.
        mean = Summary.of(cell.result.first_token_s)
        return (mean.mean if mean.count else float("inf")), -cell.turns_per_s

    def to_json(self) -> dict[str, Any]:
        """The whole plan."""
        return {
            "config": self.config.model_dump(mode="json"),
            "nodes": self.num_nodes,
            "bottleneck_free_ratios": list(self.ratios),
            "cells": [cell.to_json() for cell in self.cells],
            "best": {
                mode: {"prefill_nodes": best.prefill_nodes, "decode_nodes": best.decode_nodes}
                for mode in dict.fromkeys(cell.mode for cell in self.cells)
                for best in [self.best(mode)]
            },
        }


def make_plan(
    config: SimulationConfig,
    num_nodes: int,
    assumptions: Assumptions,
    modes: tuple[str, ...] = MODES,
    started: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Simulate every split of ``num_nodes`` under ``config``'s load; its nodes are not looked at.

    Raises ConfigError when the model's groups leave no split.
    """
    cells = []
    for prefill, decode in _splits(config, num_nodes, assumptions):
        for mode in modes:
            started(f"{prefill}P{decode}D {mode}")
            cells.append(_cell(config, (prefill, decode), mode, assumptions))
    if not cells:
        raise ConfigError(
            f"plan: nodes: expected at least 2 that divide into whole groups of {config.model}, "
            f"found {num_nodes}"
        )
    return Plan(config, num_nodes, bottleneck_free_ratios(assumptions.hardware), tuple(cells))


def _splits(
    config: SimulationConfig, num_nodes: int, assumptions: Assumptions
) -> Iterator[tuple[int, int]]:
    """Splits in which each side is whole groups, or one smaller group."""
    shape = assumptions.model(config.model)
    for prefill in range(1, num_nodes):
        decode = num_nodes - prefill
        prefill_group = min(prefill, shape.prefill_group_nodes)
        decode_group = min(decode, shape.decode_group_nodes)
        if prefill % prefill_group == 0 and decode % decode_group == 0:
            yield prefill, decode


def _cell(
    config: SimulationConfig, nodes: tuple[int, int], mode: str, assumptions: Assumptions
) -> Cell:
    changed = {"prefill_nodes": nodes[0], "decode_nodes": nodes[1], "mode": mode}
    run = config.model_copy(update=changed)
    shape, trace = assumptions.model(config.model), scaled_trace(config, assumptions)
    both = mode not in ("basic", "prefill_only")
    bounds = throughput_bounds(assumptions, shape, trace, nodes, both, config.agents)
    least, most = bottleneck_free_ratios(assumptions.hardware)
    is_free = least <= nodes[0] / nodes[1] <= most
    return Cell(*nodes, mode, run_simulation(run, assumptions), tuple(bounds), is_free)
