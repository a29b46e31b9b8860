"""Numbers on their way from the sides and the mover to Prometheus."""

from __future__ import annotations

import functools

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_dualpath import metrics
from vllm_dualpath.connector.facade import DualPathConnector
from vllm_dualpath.connector.stats import DualPathStats, Recorder
from vllm_dualpath.messages import LocalStats, MoverStats

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


def test_movers_totals_become_increments():
    """Cumulative counters of the mover are reported once; a new mover counts from zero again."""
    recorder = Recorder()
    recorder.record_mover(MoverStats(storage_read_bytes=10, load_failures={"corrupt": 1}))
    recorder.record_mover(MoverStats(storage_read_bytes=25, load_failures={"corrupt": 1}))
    first = recorder.take()
    assert first.data["counter"] == {
        "vllm:dualpath_storage_read_bytes|": 25,
        "vllm:dualpath_load_failures|corrupt": 1,
    }
    assert recorder.take() is None and recorder.is_empty
    recorder.forget_mover()
    recorder.record_mover(MoverStats(storage_read_bytes=7))
    assert recorder.take().data["counter"] == {"vllm:dualpath_storage_read_bytes|": 7}


def test_aggregation_adds_and_survives_the_wire():
    """Two reports become one; the plain form passes msgpack, as vLLM sends it."""
    one, two = Recorder(), Recorder()
    for recorder, amount in ((one, 1), (two, 2)):
        recorder.count(metrics.HIT_TOKENS, amount)
        recorder.observe(metrics.LAYER_WAIT_SECONDS, [0.5] * amount)
        recorder.record_mover(MoverStats(slots_used=amount))
    total = one.take().aggregate(two.take())
    data = msgspec.msgpack.decode(msgspec.msgpack.encode(total.to_dict()))
    stats = DualPathConnector.build_kv_connector_stats(data)
    assert stats.reduce()["hit_tokens"] == 3
    assert stats.reduce()["layer_wait_seconds"] == 3
    assert stats.reduce()["staging_slots|used"] == 2
    assert not stats.is_empty() and DualPathStats().is_empty()


def test_prometheus_series(engine):
    """Every row of the table is exported under its name, with its labels and the engine's."""
    e = engine("both")
    registry = CollectorRegistry()
    types = {cls: functools.partial(cls, registry=registry) for cls in (Counter, Gauge, Histogram)}
    made = DualPathConnector.build_prom_metrics(e.config, types, ["engine"], {0: ["0"]})
    recorder = Recorder()
    recorder.count(metrics.HIT_TOKENS, 64)
    recorder.count(metrics.PUSH_BYTES, 5, "to_decode")
    recorder.observe(metrics.STAGE_SECONDS, [0.02])
    recorder.record_mover(MoverStats(slots_free=3))
    made.observe(recorder.take().to_dict(), 0)
    text = generate_latest(registry).decode()
    assert 'vllm:dualpath_hit_tokens_total{engine="0"} 64.0' in text
    assert 'vllm:dualpath_push_bytes_total{direction="to_decode",engine="0"} 5.0' in text
    assert 'vllm:dualpath_staging_slots{engine="0",state="free"} 3.0' in text
    assert 'vllm:dualpath_stage_seconds_count{engine="0"} 1.0' in text
    assert 'vllm:dualpath_corrupt_blocks_total{engine="0"} 0.0' in text


def test_engine_steps_until_the_movers_last_report(engine):
    """After activity the engine is kept stepping until the mover is idle, but not for ever."""
    e = engine("decode")
    assert not e.connector.has_pending_push_work() or not e.side.recorder.is_empty
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.add("r", PROMPT, 2, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    e.run()
    assert e.connector.has_pending_push_work()
    e.mover.send("scheduler", LocalStats(MoverStats(storage_write_bytes=9), idle=True))
    e.wait(lambda: e.side._mover.idle)
    assert e.connector.has_pending_push_work()
    e.step()
    assert not e.connector.has_pending_push_work()
    e.check_ended()


def test_silent_mover_does_not_keep_the_engine_busy(engine):
    """Without a last report the engine rests after the bound."""
    e = engine("decode")
    e.add("r", PROMPT, 2, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.run()
    assert e.connector.has_pending_push_work()
    e.wait(lambda: not e.connector.has_pending_push_work(), 4)
    e.check_ended()
