"""What an engine's storage NIC read lately, as the router keeps it for the policy."""

from __future__ import annotations

import math

import pytest

from vllm_dualpath.messages import MoverStats
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.roster import EngineSpeed, Roster

from .cluster import hello_of


def engine(role: str) -> Engine:
    """An engine that serves."""
    hello = hello_of(role, role, "http://127.0.0.1:1")
    return Engine(hello, last_seen_s=0.0, serving=True)


def recent(roster: Roster, role: str) -> float:
    """What the policy sees."""
    view = roster.views[0]
    index = next(i for i, member in enumerate(view.engines) if member.role == role)
    return view.view.node(index).recent_read_tokens


def test_reads_of_lately_outlive_a_change_of_members_and_fade_with_heartbeats() -> None:
    """Planned reads count although they are staged; a new roster keeps them; ten seconds take
    them to a third.
    """
    engines = [engine("prefill"), engine("decode")]
    first = Roster(engines, EngineSpeed())
    engines[0].add_reads(640)
    engines[0].add_reads(-640)
    assert (recent(first, "prefill"), recent(first, "decode")) == (640, 0)
    second = Roster(engines, EngineSpeed())
    assert (recent(second, "prefill"), recent(second, "decode")) == (640, 0)
    for now_s in (100.0, 105.0, 110.0):
        engines[0].heartbeat(MoverStats(), now_s)
    assert recent(second, "prefill") == pytest.approx(640 / math.e)
