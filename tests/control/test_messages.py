"""What messages can carry."""

from __future__ import annotations

from vllm_dualpath.messages import Load, MoverStats, decode_mover_message, encode


def test_a_heartbeat_of_a_mover_that_moved_petabytes() -> None:
    """Its counters grow as long as it runs, and one that cannot be sent would end the engine."""
    moved = 1 << 60
    stats = MoverStats(
        storage_read_bytes=moved,
        donated_bytes=moved,
        storage_write_bytes=moved,
        push_to_prefill_bytes=moved,
        push_to_decode_bytes=moved,
    )
    assert decode_mover_message(encode(Load(stats, 7))) == Load(stats, 7)
