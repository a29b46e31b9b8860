from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.policy import ClusterSnapshot, EngineLoad, PlanRequest, make_policy

from .golden_cases import GoldenCase, load_golden_cases

CASES = load_golden_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_case(case: GoldenCase) -> None:
    policy = make_policy(case.mode, case.split_fraction)
    assert policy.decide(case.snapshot, case.request) == case.expected


def test_every_mode_has_golden_cases() -> None:
    assert {case.mode for case in CASES} == {"prefill_only", "dual", "split"}
    assert all(make_policy(case.mode, 0.5).mode == case.mode for case in CASES)


def engines(role: str) -> st.SearchStrategy[tuple[EngineLoad, ...]]:
    load = st.integers(0, 3)
    engine = st.builds(
        EngineLoad,
        engine_id=st.sampled_from([f"{role}{idx}" for idx in range(5)]),
        role=st.just(role),
        num_requests=load,
        num_tokens=load,
        read_queue_tokens=load,
        capacity_tokens=st.sampled_from([10, 1000]),
    )
    unique = st.lists(engine, max_size=5, unique_by=lambda engine: engine.engine_id)
    return unique.map(tuple)


POLICIES = st.builds(
    make_policy, st.sampled_from(["prefill_only", "dual", "split"]), st.floats(0, 1)
)
REQUESTS = st.builds(
    PlanRequest,
    num_tokens=st.integers(1, 100),
    num_hit_blocks=st.integers(0, 50),
    block_tokens=st.just(64),
)


@given(
    policy=POLICIES,
    prefill=engines("prefill"),
    decode=engines("decode"),
    request_=REQUESTS,
    seed=st.integers(),
)
def test_any_decision_is_complete_repeatable_and_blind_to_order(
    policy, prefill, decode, request_, seed
) -> None:
    """Each hit block has one reader of the pair chosen; only the arguments' content matters."""
    decision = policy.decide(ClusterSnapshot(prefill, decode), request_)
    assert policy.decide(ClusterSnapshot(prefill, decode), request_) == decision
    shuffle = random.Random(seed).sample
    shuffled = ClusterSnapshot(
        tuple(shuffle(prefill, len(prefill))), tuple(shuffle(decode, len(decode)))
    )
    assert policy.decide(shuffled, request_) == decision

    def fitting(side: tuple[EngineLoad, ...]) -> set[str]:
        return {item.engine_id for item in side if item.capacity_tokens >= request_.num_tokens}

    if decision is None:
        assert not fitting(prefill) or not fitting(decode)
        return
    assert decision.prefill_engine in fitting(prefill)
    assert decision.decode_engine in fitting(decode)
    read = [
        block
        for segment in decision.plan.segments
        for block in range(segment.first_block, segment.last_block)
    ]
    assert read == list(range(request_.num_hit_blocks))
    readers = {segment.reader for segment in decision.plan.segments}
    assert readers <= {decision.prefill_engine, decision.decode_engine}


def test_a_mode_that_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected prefill_only, dual or split, found 'pool'"):
        make_policy("pool", 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="split_fraction"):
        make_policy("split", fraction)
