"""Transfers that go well, between two real movers over UCX."""
from __future__ import annotations
import pytest
from vllm_dualpath.messages import Committed, Ended, Ready, SegmentDone, Stored
from tests.mover.scripted import *

@pytest.fixture
def pair(tmp_path):
    store = tmp_path/"store"; store.mkdir()
    r = ScriptedRouter()
    p = MoverProcess(tmp_path, "p0", "prefill", r.endpoint, store)
    d = MoverProcess(tmp_path, "d0", "decode", r.endpoint, store)
    r.join(p); r.join(d)
    yield r,p,d,store
    print(p.log.read_text()); print(d.log.read_text())
    p.close(); d.close(); r.close()

@pytest.mark.parametrize("split", [3,0,1,None])
def test_good(pair, split):
    r,p,d,store = pair
    prompt = Prompt(37)
    hits = 3
    if split is None: hits=split=0
    prompt.store(store, hits)
    t = Transfer(r,p,d,prompt)
    t.reserve(); t.stage(split,hits)
    if split: assert r.expect(p, SegmentDone, t.key).good_until == split
    if split<hits: assert r.expect(d, SegmentDone, t.key).good_until == hits
    assert r.expect(p, Ready, t.key).num_hit_blocks == hits
    c = p.engine.claim(t.key)
    t.assert_staged(c, p, hits)
    p.engine.save_pages(c, prompt)
    r.expect(d, Committed, t.key)
    cd = d.engine.claim(t.key)
    expected = prompt.expected_blocks()
    for b in range(4): assert d.engine.slot(cd.slots[b]) == expected[b]
    t.end(p, True)
    p.engine.release(t.key)
    r.expect(p, Ended, t.key)
    d.engine.release(t.key)
    r.expect(d, Ended, t.key)
    t.end(d, True)
    r.expect(d, Ended, t.key)
