"""Under vLLM's MultiConnector: another connector may win the request."""

from __future__ import annotations

import pytest

from tests.connector.engine import key_of
from vllm_dualpath.messages import Release, Saved

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_zero_allocation_releases(engine, role, monkeypatch):
    """VLLM takes another child's hit and tells us 0: the claim is released, nothing is copied."""
    e = engine(role)
    e.stage(PROMPT, SLOTS, len(PROMPT))
    params = e.mover.publish(e.root, PROMPT, 2, SLOTS)
    answer = e.connector.get_num_new_matched_tokens

    def another_wins(request, num_computed):
        num_tokens, _ = answer(request, num_computed)
        assert num_tokens > 0
        return 0, False

    monkeypatch.setattr(e.connector, "get_num_new_matched_tokens", another_wins)
    e.add("r", PROMPT, 2, params)
    e.step()
    e.mover.wait_for(Release)
    e.run()
    e.check_output("r", 2)
    assert e.mover.num_claims(key_of(params)) == 1
    assert not e.mover.of(Saved)
    e.check_ended()


def test_zero_allocation_of_a_miss_keeps_the_saves(engine):
    """We had no hit ourselves: whoever loads or computes the pages, they are saved."""
    e = engine("prefill")
    params = e.mover.publish(e.root, PROMPT, 0, SLOTS)
    e.add("r", PROMPT, 1, params)
    e.run()
    assert len(e.mover.saved_pages(key_of(params))) == 22
    e.check_ended()
