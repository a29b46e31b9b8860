"""The replay's agent loop, against a server with real sockets."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from vllm_dualpath.bench.replay import (
    ReplayPlan,
    ReplayResult,
    TokenRange,
    count_exact,
    replay,
)
from vllm_dualpath.errors import ConfigError, RequestError

from .vllm_double import VllmDouble, answer

PLAN = ReplayPlan(agents=3, turns=4, append=TokenRange(5, 9), first=TokenRange(20, 20), generate=6)


def run(server: VllmDouble, plan: ReplayPlan = PLAN) -> ReplayResult:
    async def inside() -> ReplayResult:
        async with server.serve() as url:
            return await replay(url, plan)

    return asyncio.run(inside())


def test_each_turn_repeats_the_conversation_and_appends() -> None:
    """Turn i+1's prompt is turn i's prompt, its answer, and the next append of the plan."""
    result = run(VllmDouble())
    assert len(result.records) == 12
    assert result.num_failed == 0
    by_turn = {(record.agent, record.turn): record for record in result.records}
    for agent in range(PLAN.agents):
        prompt: tuple[int, ...] = ()
        for turn, append in enumerate(PLAN.appends(agent)):
            record = by_turn[agent, turn]
            assert record.prompt == prompt + tuple(append)
            assert record.completion is not None
            assert list(record.completion.token_ids) == answer(list(record.prompt), 6)
            prompt = record.prompt + record.completion.token_ids


def test_generation_is_forced_greedy_and_returns_ids() -> None:
    """The body forces the length and asks for greedy sampling, a stream and token ids."""
    server = VllmDouble()
    run(server)
    body = server.bodies[0]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (6, 6, True)
    assert (body["temperature"], body["stream"], body["return_token_ids"]) == (0, True, True)
    assert body["model"] == "tiny"


def test_agents_run_at_once_and_turns_one_after_the_other() -> None:
    """With slow answers there are as many requests open as agents, never more."""
    server = VllmDouble(delay_s=0.01)
    run(server)
    assert server.most_in_flight == PLAN.agents


def test_in_lockstep_a_turn_starts_when_all_have_finished_the_last() -> None:
    """Turns never overlap, also when an agent drops out."""
    plan = dataclasses.replace(PLAN, lockstep=True)
    result = run(VllmDouble(delay_s=0.003, refuse_from=5), plan)
    for turn in range(1, PLAN.turns):
        before = [r for r in result.records if r.turn == turn - 1 and r.completion is not None]
        now = [r.start_s for r in result.records if r.turn == turn]
        assert all(min(now) >= r.start_s + r.completion.arrival_s[-1] for r in before if now)  # type: ignore[union-attr]


def test_appends_depend_on_the_seed_and_the_agent_alone() -> None:
    """The same seed gives the same appends, whatever else the plan says."""
    other = ReplayPlan(agents=9, turns=4, append=PLAN.append, first=PLAN.first, generate=1)
    assert other.appends(2) == PLAN.appends(2)
    assert PLAN.appends(0) != PLAN.appends(1)
    reseeded = ReplayPlan(turns=4, append=PLAN.append, first=PLAN.first, seed=1)
    assert reseeded.appends(0) != PLAN.appends(0)
    lengths = [len(append) for append in PLAN.appends(0)]
    assert lengths[0] == 20
    assert all(5 <= length <= 9 for length in lengths[1:])


def test_a_refused_request_ends_its_agent_and_is_reported() -> None:
    """HTTP 500 is a failed record with the server's words; other turns are not made up."""
    result = run(VllmDouble(refuse_from=3))
    assert result.num_failed == 3
    assert len(result.records) == 6
    errors = [record.error for record in result.records if record.completion is None]
    assert all("HTTP 500" in error and "engine dead" in error for error in errors)


@pytest.mark.parametrize("server", [VllmDouble(drop_tokens=1), VllmDouble(broken=True)])
def test_short_and_broken_answers_are_failures(server: VllmDouble) -> None:
    """An answer with too few tokens counts as failed, whether the stream ended well or not."""
    result = run(server)
    assert result.num_failed == PLAN.agents
    assert len(result.completions) == 0


def test_report_has_latencies_totals_and_every_request() -> None:
    """The JSON carries summaries of all three latencies and each turn's tokens."""
    report = run(VllmDouble(delay_s=0.002)).to_json()
    for name in ("ttft_s", "ttst_s", "tpot_s"):
        summary = report[name]
        assert isinstance(summary, dict)
        assert 0 < summary["p50"] <= summary["p99"]
    requests = report["requests"]
    assert isinstance(requests, list)
    assert len(requests) == report["num_requests"] == 12
    assert requests[0]["prompt_tokens"] == 20
    assert requests[0]["cached_tokens"] == 3
    assert len(requests[0]["token_ids"]) == 6
    assert report["jct_s"] >= max(request["latency_s"] for request in requests)  # type: ignore[operator]


def test_exact_answers_are_counted_token_by_token() -> None:
    """Against the same server all answers agree; one changed prompt is one fewer."""

    async def inside() -> tuple[int, int]:
        async with VllmDouble().serve() as url:
            result = await replay(url, PLAN)
            first = result.records[0]
            other = type(first)(first.agent, first.turn, (*first.prompt, 1), 0.0, first.completion)
            changed = ReplayResult(result.jct_s, (other, *result.records[1:]))
            return await count_exact(url, result), await count_exact(url, changed)

    assert asyncio.run(inside()) == (12, 11)


def test_a_server_that_names_no_model_is_an_error() -> None:
    """Nobody listens: one RequestError, not one a request."""
    with pytest.raises(RequestError, match="v1/models"):
        asyncio.run(replay("http://127.0.0.1:9", PLAN))


@pytest.mark.parametrize("text", ["0", "9-5", "x", "5-", "-5", ""])
def test_impossible_ranges_are_refused(text: str) -> None:
    """Lengths are positive and ordered."""
    with pytest.raises(ConfigError, match="append"):
        TokenRange.parse(text)
