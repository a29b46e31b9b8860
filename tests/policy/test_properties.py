"""What every decision keeps to, through the API that the router calls."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_dualpath.policy import (
    MODES,
    NO_LIMIT,
    ClusterView,
    EngineState,
    NodeState,
    PlanRequest,
    Role,
    Verdict,
    WaitingLine,
    make_policy,
)

Engines = list[dict[str, Any]]

ENGINES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from([Role.PREFILL, Role.DECODE]),
            "usable": st.booleans() | st.just(True),
            "donates": st.booleans(),
            "group": st.integers(0, 1),
            "num_requests": st.integers(0, 3),
            "num_tokens": st.integers(0, 3).map(lambda n: n * 500),
            "free_kv_tokens": st.sampled_from([500, NO_LIMIT]),
            "max_request_tokens": st.sampled_from([50, 5000]),
            "read_queue_tokens": st.integers(0, 3).map(lambda n: n * 64),
            "recent_read_tokens": st.sampled_from([0.0, 100.0, 1e6]),
            "read_rate": st.sampled_from([0.0, 10.0, 1000.0]),
        }
    ),
    min_size=1,
    max_size=8,
)
REQUESTS = st.integers(1, 1000).flatmap(
    lambda num_tokens: st.builds(
        PlanRequest,
        num_tokens=st.just(num_tokens),
        num_hit_blocks=st.integers(0, (num_tokens - 1) // 8),
        block_tokens=st.just(8),
        turn=st.integers(0, 100),
    )
)
PARAMETERS = st.fixed_dictionaries(
    {
        "alpha_s": st.sampled_from([0.1, float("inf")]),
        "beta_tokens": st.sampled_from([0, 500, NO_LIMIT]),
        "min_segment_blocks": st.integers(1, 10),
        "max_readers": st.integers(1, 16),
        "recompute": st.booleans(),
    }
)


def view_of(engines: Engines) -> ClusterView:
    """Every engine on a node of its own."""
    nodes, states = [], []
    for index, fields in enumerate(engines):
        node, state = NodeState(), EngineState()
        for name, value in fields.items():
            setattr(node if "read_" in name else state, name, value)
        state.node = index
        nodes.append(node)
        states.append(state)
    view = ClusterView(nodes, states)
    view.nominal_read_rate = 1000.0
    view.set_prefill_curve(500.0, 0.0)
    return view


# How long drawing takes says more of the machine than of the test.
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(MODES), PARAMETERS, ENGINES, REQUESTS, st.booleans())
def test_decisions_are_complete_within_limits_and_repeatable(
    mode: str,
    parameters: dict[str, Any],
    engines: Engines,
    request_: PlanRequest,
    ignore_load: bool,
) -> None:
    """Each hit block has one reader or is computed; beta and room hold; only arguments matter."""
    policy, view = make_policy(mode, **parameters), view_of(engines)
    decision = policy.decide(view, request_, ignore_load=ignore_load)
    assert policy.decide(view, request_, ignore_load=ignore_load) == decision
    again = make_policy(mode, **parameters)
    assert again.decide(view_of(engines), request_, ignore_load=ignore_load) == decision

    def could(role: Role) -> set[int]:
        return {
            index
            for index, engine in enumerate(engines)
            if engine["usable"]
            and engine["role"] == role
            and engine["max_request_tokens"] >= request_.num_tokens
        }

    possible = bool(could(Role.PREFILL)) and bool(could(Role.DECODE))
    assert (decision.verdict is not Verdict.IMPOSSIBLE) == possible
    assert not ignore_load or decision.verdict in (Verdict.PLACED, Verdict.IMPOSSIBLE)
    if decision.verdict is not Verdict.PLACED:
        return
    assert decision.prefill in could(Role.PREFILL)
    assert decision.decode in could(Role.DECODE)
    if not ignore_load:
        assert engines[decision.decode]["free_kv_tokens"] >= request_.num_tokens
        if mode != "prefill_only":
            assert engines[decision.prefill]["num_tokens"] <= parameters["beta_tokens"]
    blocks = [block for _, first, last in decision.segments for block in range(first, last)]
    assert blocks == list(range(request_.num_hit_blocks - decision.num_recompute_blocks))
    readers = [reader for reader, _, _ in decision.segments]
    assert len(set(readers)) == len(readers) <= (parameters["max_readers"] if mode == "pool" else 2)
    assert all(engines[reader]["usable"] for reader in readers)
    sides = (decision.prefill, decision.decode)
    assert all(engines[reader]["donates"] for reader in readers if reader not in sides)
    if len(readers) > 1:
        shares = [last - first for _, first, last in decision.segments]
        assert min(shares) >= parameters["min_segment_blocks"]


@given(ENGINES, REQUESTS)
def test_a_split_hardly_ends_later_than_one_reader(engines: Engines, request_: PlanRequest) -> None:
    """For the same pair of engines, reading on both sides is at least as good as on one, but for
    the wait that both have.
    """
    view = view_of(engines)
    split = make_policy("split").decide(view, request_)
    if split.verdict is not Verdict.PLACED:
        return
    nodes = [view.node(side) for side in (split.prefill, split.decode)]
    rates = [node.read_rate or view.nominal_read_rate for node in nodes]
    waits_s = [node.read_queue_tokens / rate for node, rate in zip(nodes, rates, strict=True)]
    for wait_s, rate in zip(waits_s, rates, strict=True):
        alone_s = wait_s + 8 * request_.num_hit_blocks / rate
        assert request_.num_hit_blocks == 0 or split.read_s <= alone_s + min(waits_s) + 1e-9


@given(st.lists(st.integers(0, 50)), st.integers(0, 200), st.data())
def test_a_line_answers_as_a_list_does(lengths: list[int], room: int, data: st.DataObject) -> None:
    """Also after some of those in it have left."""
    line = WaitingLine()
    tickets = [line.push(length) for length in lengths]
    left = data.draw(st.sets(st.sampled_from(tickets)) if tickets else st.just(set()))
    assert all(line.cancel(ticket) for ticket in left)
    waiting = [
        length for ticket, length in zip(tickets, lengths, strict=True) if ticket not in left
    ]
    assert (len(line), line.num_tokens) == (len(waiting), sum(waiting))
    fitting = 0
    for length in waiting:
        if fitting + length > room:
            break
        fitting += length
    assert line.tokens_fitting(room) == fitting
