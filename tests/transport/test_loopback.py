from __future__ import annotations

from tests.transport.contract import Pair, TransportContract
from vllm_dualpath.transport import PeerClosed, PutDone
from vllm_dualpath.transport.loopback import LoopbackTransport


class TestLoopback(TransportContract):
    kind = "loopback"
    in_child = False

    def test_pause_holds_deliveries(self, pair: Pair) -> None:
        """Nothing arrives while paused; everything does, in order, after resume."""
        assert isinstance(pair.transport, LoopbackTransport)
        pair.transport.pause()
        ids = [pair.put((0, 0, 8), notice=b"1"), pair.put((8, 8, 8), notice=b"2")]
        assert pair.events(1, 0.05) == []
        assert pair.target.read(0, 16) == bytes(16)
        pair.transport.resume()
        assert pair.events(2) == [PutDone(put_id, True, "") for put_id in ids]
        assert pair.target.read(0, 16) == pair.memory.registered[:16]
        assert [pair.notice(), pair.notice()] == [(b"1", 0), (b"2", 0)]

    def test_target_closed_while_held(self, pair: Pair) -> None:
        """Held batches fail, then the peer is closed, and its memory stays as it was."""
        assert isinstance(pair.transport, LoopbackTransport)
        pair.transport.pause()
        ids = [pair.put((0, 0, 8)) for _ in range(2)]
        pair.target.close()
        pair.transport.resume()
        events = pair.events(3)
        assert [event.put_id for event in events if isinstance(event, PutDone)] == ids
        assert not any(event.ok for event in events if isinstance(event, PutDone))
        assert isinstance(events[-1], PeerClosed)
        assert pair.target.read(0, 8) == bytes(8)
