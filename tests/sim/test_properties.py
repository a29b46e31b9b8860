"""What holds for every workload, mode and fault."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dualpath.sim.assumptions import paper_assumptions
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.run import simulate_agents
from vllm_dualpath.workload import AgentSet, TrajectorySet

TURN = st.tuples(st.integers(1, 20_000), st.integers(1, 300))
TRAJECTORIES = st.lists(st.lists(TURN, min_size=1, max_size=6), min_size=1, max_size=5)
FAULT = st.fixed_dictionaries(
    {
        "kind": st.just("storage_slows"),
        "node": st.integers(0, 3),
        "at_s": st.floats(0, 20),
        "factor": st.floats(0.05, 1.0),
        "until_s": st.floats(21, 60),
    }
) | st.fixed_dictionaries(
    # One prefill node and one decode node stay: there is always somebody to go on.
    {"kind": st.just("node_dies"), "node": st.sampled_from([0, 3]), "at_s": st.floats(0, 30)}
)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[TrajectorySet, AgentSet]:
    """A few agents with turns of all sizes, some at once, some with a first turn of their own."""
    trajectories = TrajectorySet.from_turns(draw(TRAJECTORIES))
    count = draw(st.integers(1, 25))
    seed = draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    agents = AgentSet(
        random.integers(0, trajectories.num_trajectories, count).astype(np.int32),
        random.integers(0, 3, count).astype(np.int32) * 40,
        np.sort(random.random(count)) * draw(st.sampled_from([0.0, 5.0])),
    )
    return trajectories, agents


@given(
    workload=workloads(),
    mode=st.sampled_from(["basic", "prefill_only", "dual", "split", "pool"]),
    stage_all=st.booleans(),
    tool_time_s=st.sampled_from([0.0, 0.5]),
    faults=st.lists(FAULT, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_every_turn_is_served_once_and_no_token_is_lost(
    workload: tuple[TrajectorySet, AgentSet],
    mode: str,
    stage_all: bool,
    tool_time_s: float,
    faults: list[dict[str, object]],
) -> None:
    """All agents end; hits are read and the rest computed once, more only where a node died."""
    trajectories, agents = workload
    config = make_config(
        model="ds-27b",
        prefill_nodes=2,
        decode_nodes=2,
        mode=mode,
        agents=1,
        prefill_stages_all=stage_all,
        tool_time_s=tool_time_s,
        faults=faults,
    )
    result = simulate_agents(config, paper_assumptions(), trajectories, agents)
    expected = _expected(trajectories, agents)
    counts = result.counts
    assert counts["finished_agents"] == agents.num_agents
    for name in ("turns", "generated_tokens", "persisted_tokens"):
        assert counts[name] == expected[name], name
    for name in ("read_tokens", "computed_tokens"):
        lost = counts[name] - expected[name]
        assert lost == 0 or (lost > 0 and counts["repeated_turns"] > 0), name
    assert np.all(result.first_token_s > 0)


def _expected(trajectories: TrajectorySet, agents: AgentSet) -> dict[str, int]:
    total = dict.fromkeys(
        ("turns", "generated_tokens", "persisted_tokens", "read_tokens", "computed_tokens"), 0
    )
    for trajectory, first in zip(agents.trajectory, agents.first_tokens, strict=True):
        turns = trajectories.turns(int(trajectory))
        context = 0
        for appended, generated in ([(int(first), 1)] if first else []) + turns:
            hit = context // 64 * 64
            total["turns"] += 1
            total["generated_tokens"] += generated
            total["read_tokens"] += hit
            total["computed_tokens"] += context + appended - hit
            context += appended + generated
        total["persisted_tokens"] += context // 64 * 64
    return total
