"""The simulator against what can be worked out without it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dualpath.sim.assumptions import Assumptions, paper_assumptions
from vllm_dualpath.sim.config import SimulationConfig, make_config
from vllm_dualpath.sim.costs import engine_costs, model_work
from vllm_dualpath.sim.results import SimulationResult
from vllm_dualpath.sim.run import run_simulation, simulate_agents
from vllm_dualpath.workload import AgentSet, TrajectorySet

NO_COMPUTE = 1e-6
HIT_TOKENS = 64_000


def run(**choices: object) -> SimulationResult:
    """A short run of DS 27B, 1P1D unless said otherwise."""
    defaults = {"model": "ds-27b", "prefill_nodes": 1, "decode_nodes": 1, "trace": "32k"}
    return run_simulation(make_config(**{**defaults, **choices}))


def two_turn_agents(
    arrival_s: np.ndarray, config: SimulationConfig, assumptions: Assumptions
) -> SimulationResult:
    """Agents whose second turn reads ``HIT_TOKENS`` right after the first stored them."""
    trajectories = TrajectorySet.from_turns([[(HIT_TOKENS - 1, 1), (10, 1)]])
    count = len(arrival_s)
    zeros = np.zeros(count, dtype=np.int32)
    agents = AgentSet(zeros, zeros, arrival_s)
    return simulate_agents(config, assumptions, trajectories, agents)


def read_s(assumptions: Assumptions, model: str, tokens: int) -> float:
    """One storage NIC's seconds for so many tokens."""
    kv_bytes = model_work(assumptions.model(model)).kv_bytes_per_token
    return tokens * kv_bytes / (assumptions.hardware.storage_gbytes_per_s * 1e9)


@pytest.mark.parametrize(("mode", "share"), [("prefill_only", 1.0), ("dual", 1.0), ("split", 0.5)])
def test_one_hit_on_an_idle_cluster(mode: str, share: float) -> None:
    """It is staged in the time that its readers take, and TTFT adds one prefill step."""
    config = make_config(
        model="ds-27b", prefill_nodes=1, decode_nodes=1, mode=mode, trace="32k", agents=1
    )
    known = paper_assumptions()
    result = two_turn_agents(np.zeros(1), config, known)
    expected = share * read_s(known, "ds-27b", HIT_TOKENS)
    assert result.staged_s[1] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(result.staged_s[0])
    shape = known.model("ds-27b")
    costs, work = engine_costs(known, shape), model_work(shape)
    copy_s = HIT_TOKENS * work.kv_bytes_per_token / (known.hardware.compute_gbytes_per_s * 1e9)
    pairs = 10 * HIT_TOKENS + 55
    compute_s = (
        costs.prefill_step_s
        + 10 / 8 * costs.prefill_token_s
        + pairs * costs.prefill_pair_s
        + 10 * shape.top_k * costs.prefill_selected_pair_s
    )
    # What the prefill side read goes on to the decode side, beside the ten new tokens.
    sent_s = copy_s * (share * HIT_TOKENS + 10) / HIT_TOKENS
    longest = max(compute_s, copy_s, sent_s)
    assert result.first_token_s[1] == pytest.approx(expected + longest, rel=1e-3)


def test_storage_queue_is_m_d_1() -> None:
    """Poisson reads of one length wait as Pollaczek and Khinchine say."""
    known = paper_assumptions()
    # Nothing else may take time: steps of a group would let its requests go in batches.
    fast = known.hardware.model_copy(update={"compute_gbytes_per_s": 1e9})
    service_s = read_s(known, "ds-27b", HIT_TOKENS)
    random, load = np.random.default_rng(1), 0.7
    arrival_s = np.cumsum(random.exponential(service_s / load, 60_000))
    config = make_config(
        model="ds-27b",
        prefill_nodes=1,
        decode_nodes=1,
        mode="prefill_only",
        placement="round_robin",
        trace="32k",
        agents=1,
        compute_scale=NO_COMPUTE,
    )
    result = two_turn_agents(arrival_s, config, known.model_copy(update={"hardware": fast}))
    staged = result.staged_s[~np.isnan(result.staged_s)]
    expected = service_s * (1 + load / (2 * (1 - load)))
    assert len(staged) == 60_000
    assert float(np.mean(staged)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("nodes", [(2, 1), (1, 2)])
def test_split_evens_out_unlike_sides(nodes: tuple[int, int]) -> None:
    """The one node of a side reads a third of all bytes, though halves would be read soonest."""
    load = {"agents_per_s": 1.0, "duration_s": 240, "warm_up_s": 60}
    result = run(mode="split", prefill_nodes=nodes[0], decode_nodes=nodes[1], **load)
    assert result.storage_balance(10.0, 60.0) < 1.05


def test_split_evens_out_reads_that_wait_for_memory() -> None:
    """The paper measured 1.53 with round robin and 1.18 with its policy at this load."""
    load = {"model": "ds-660b", "prefill_nodes": 2, "decode_nodes": 4, "trace": "64k"}
    result = run(mode="split", agents=2000, **load)
    assert result.storage_balance(10.0) < 1.05


def test_storage_bound_load_doubles_with_two_paths() -> None:
    """1P1D with compute that costs nothing: (P + D) / P."""
    one, two = (
        run(mode=mode, agents=100, compute_scale=NO_COMPUTE).job_s
        for mode in ("prefill_only", "split")
    )
    assert one / two == pytest.approx(2.0, rel=0.02)


def test_tokens_are_conserved_over_a_trace() -> None:
    """Read and computed tokens are the prompts' tokens; generated ones the trace's."""
    result = run(mode="split", agents=50)
    counts = result.counts
    assert counts["finished_agents"] == 50
    reread = sum(node.read_bytes for node in result.nodes) / result.kv_bytes_per_token
    assert reread == pytest.approx(counts["read_tokens"], rel=1e-6)
    oracle = run(mode="oracle", agents=50).counts
    assert oracle["computed_tokens"] == counts["computed_tokens"]
    assert oracle["generated_tokens"] == counts["generated_tokens"]
    assert oracle["read_tokens"] == 0


@pytest.mark.parametrize("mode", ["basic", "dual", "pool"])
def test_equal_seeds_give_equal_results(mode: str) -> None:
    """Every measured time is the same twice, and another seed's is not."""
    first, again, other = (run(mode=mode, agents=40, seed=s, tool_time_s=1.0) for s in (1, 1, 2))
    assert np.array_equal(first.first_token_s, again.first_token_s)
    assert np.array_equal(first.per_token_s, again.per_token_s, equal_nan=True)
    assert first.job_s == again.job_s
    assert first.job_s != other.job_s


def test_tool_time_passes_between_turns() -> None:
    """Agents take longer by about so many pauses of the mean length as they have turns."""
    without, with_pauses = (run(mode="dual", agents=60, tool_time_s=s) for s in (0.0, 5.0))
    longer = float(with_pauses.agent_s.sum() - without.agent_s.sum())
    pauses = without.counts["turns"] - without.counts["finished_agents"]
    assert longer / pauses == pytest.approx(5.0, rel=0.1)


def test_a_slow_nic_gets_less_to_read_and_recovers() -> None:
    """While one of two readers is slow `split` reads elsewhere; afterwards evenly again."""
    fault = {"kind": "storage_slows", "node": 0, "at_s": 0.0, "factor": 0.25, "until_s": 60.0}
    result = run(mode="split", agents=300, trace="64k", faults=[fault])
    prefill, decode = (node.window_bytes for node in result.nodes)
    during = slice(15, 60)
    after = slice(120, 240)
    assert decode[during].sum() > 2.5 * prefill[during].sum()
    assert prefill[after].sum() == pytest.approx(decode[after].sum(), rel=0.15)


def test_a_dead_node_costs_time_and_no_turn() -> None:
    """All agents end; the turns that it took part in were repeated."""
    shape = {"prefill_nodes": 2, "decode_nodes": 2, "agents": 100, "mode": "dual"}
    whole = run(**shape)
    hurt = run(**shape, faults=[{"kind": "node_dies", "node": 3, "at_s": 20.0}])
    assert hurt.counts["repeated_turns"] > 0
    assert hurt.counts["turns"] == whole.counts["turns"]
    assert hurt.counts["finished_agents"] == 100
    assert hurt.job_s > whole.job_s
    dead = hurt.nodes[3].window_bytes
    assert dead[21:].sum() == 0


def test_online_turns_are_measured_after_the_warm_up() -> None:
    """The run ends at its duration; only turns that began after the warm-up count."""
    result = run(mode="dual", agents_per_s=0.2, duration_s=600, warm_up_s=300)
    assert result.end_s == pytest.approx(600, abs=1.5)
    assert 0 < len(result.first_token_s) < result.counts["turns"]


def test_layerwise_prefill_never_costs_time() -> None:
    """Copies beside the compute are not slower than before and after it."""
    overlapped, serial = (run(mode="dual", agents=100, layerwise=on) for on in (True, False))
    assert overlapped.first_token_s.mean() < serial.first_token_s.mean()
