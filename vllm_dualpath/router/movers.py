"""The router's conversation with the movers: registration, heartbeats, and messages both ways.

What a mover says is checked here and acted on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from vllm_dualpath.control.bus import RouterSocket
from vllm_dualpath.errors import PeerLost, ProtocolError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Dropped,
    Goodbye,
    Hello,
    Load,
    Message,
    MoverMessage,
    PeerDied,
    Ping,
    Pong,
    Refused,
    SnapshotEnd,
    Stored,
    Welcome,
    decode_mover_message,
    encode,
)
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.engine import Engine

logger = logging.getLogger(__name__)

_MISSED_HEARTBEATS = 3
_FORGET_TRANSFER_FACTOR = 20.0
"""Times ``stuck_warning_s`` after which a transfer whose movers never said ``Ended`` is let go."""


class Movers:
    """See the module's docstring."""

    def __init__(
        self, socket: RouterSocket, cluster: Cluster, heartbeat_s: float, stuck_warning_s: float
    ) -> None:
        self._socket = socket
        self._cluster = cluster
        self._heartbeat_s = heartbeat_s
        self._stuck_warning_s = stuck_warning_s
        self._boot_id = secrets.token_bytes(16)
        self._new_boot_ids: dict[bytes, bytes] = {}
        """Movers given up for silence, that lost messages, or that registered anew under their old
        boot id: to them this router is another one from then on, so they end the transfers that
        they still have.
        """
        self._replaced: dict[bytes, str] = {}
        """Boot ids whose engine id another mover has taken."""
        self._loads_changed = asyncio.Event()

    def tasks(self) -> list[asyncio.Task[None]]:
        """Start the two loops."""
        return [
            asyncio.create_task(self._socket.receive(self._hear), name="dualpath-movers-receive"),
            asyncio.create_task(self._watch(), name="dualpath-movers-watch"),
        ]

    def send(self, engine: Engine, message: Message) -> None:
        """Send one message; order is kept, to one engine and between engines."""
        engine.num_sent += not isinstance(message, Ping | Pong)
        self._post(engine.boot_id, message)

    async def fresh_loads(self, timeout_s: float) -> None:
        """Ask every mover for its ``Load`` and wait until all have answered, or ``timeout_s``."""
        asked = {engine: engine.num_loads for engine in self._cluster.engines}
        for engine in asked:
            self.send(engine, Ping())
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        while any(e.num_loads == before and not e.lost.is_set() for e, before in asked.items()):
            left_s = ends_s - loop.time()
            if left_s <= 0:
                return
            self._loads_changed.clear()
            try:
                await asyncio.wait_for(self._loads_changed.wait(), left_s)
            except TimeoutError:
                return

    # --- receiving ---

    def _hear(self, identity: bytes, payload: bytes) -> None:
        engine = self._cluster.by_boot_id(identity)
        try:
            message = decode_mover_message(payload)
            if engine is not None:
                engine.num_heard += not isinstance(message, Load)
            self._take(identity, message)
        except ProtocolError as exc:
            self._cluster.rejected_messages += 1
            if engine is not None:
                engine.num_heard += 1
            logger.warning("message from mover %s rejected: %s", identity.hex()[:12], exc)
        except Exception:
            # One message must not end the conversation with all movers.
            self._cluster.rejected_messages += 1
            logger.exception("message from mover %s failed", identity.hex()[:12])

    def _take(self, identity: bytes, message: MoverMessage) -> None:
        if isinstance(message, Hello):
            self._on_hello(identity, message)
            return
        engine = self._cluster.by_boot_id(identity)
        if engine is None:
            # Welcomed by a router before this one, or given up for silence: another router boot id
            # makes it end its transfers and say Hello again.
            if isinstance(message, Goodbye):
                return
            taken = self._name_taken(identity)
            self._post(identity, Refused(taken) if taken else Pong(self._boot_id_for(identity)))
            return
        engine.last_seen_s = asyncio.get_running_loop().time()
        if isinstance(message, Load):
            self._on_load(engine, message)
        elif isinstance(message, Goodbye):
            self._remove(engine, f"said goodbye: {message.reason}", logging.INFO)
        elif isinstance(message, Stored):
            self._on_stored(engine, message)
        elif isinstance(message, Dropped):
            self._cluster.stores.dropped(engine, message)
        elif isinstance(message, SnapshotEnd):
            self._cluster.stores.snapshot_ended(engine)
        else:
            self._cluster.deliver(engine, message.key, message)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        if identity != hello.boot_id:
            raise ProtocolError(
                f"Hello of {hello.engine_id} with another boot id than its socket's"
            )
        refusal = self._name_taken(identity) or self._cluster.refusal(hello)
        if refusal:
            logger.error("engine %s refused: %s", hello.engine_id, refusal)
            self._post(identity, Refused(refusal))
            return
        known = self._cluster.by_id(hello.engine_id)
        begins = known is None or _must_restart(known, hello)
        if known is not None and begins:
            if known.boot_id == identity:
                # Its transfers fail here and now: nobody will say End for them.
                self._new_boot_ids[identity] = secrets.token_bytes(16)
            else:
                self._replaced[known.boot_id] = hello.engine_id
            self._remove(known, "registered again", logging.INFO)
        engine = self._cluster.join(hello, asyncio.get_running_loop().time())
        engine.num_heard = hello.num_sent
        state = self._cluster.stores.state(hello)
        if begins and hello.registration:
            # What it has stored may be among what was lost.
            state.doubt()
        send_snapshot = state.needs_snapshot(engine)
        if send_snapshot:
            state.begin_snapshot(engine)
        self.send(engine, self._welcome(engine, send_snapshot))
        logger.info("engine %s (%s) at %s joined", hello.engine_id, hello.role, hello.url)

    def _on_load(self, engine: Engine, message: Load) -> None:
        if message.num_sent not in (0, engine.num_heard):
            self._start_anew(
                engine, f"{message.num_sent} messages sent and {engine.num_heard} heard"
            )
            return
        engine.heartbeat(message.stats, asyncio.get_running_loop().time())
        self._loads_changed.set()
        self.send(engine, Pong(self._boot_id_for(engine.boot_id), engine.num_sent))

    def _start_anew(self, engine: Engine, why: str) -> None:
        """Nobody knows what of its transfers has reached whom: they end here, and at the mover,
        to which this router is another one from now on.
        """
        self._new_boot_ids[engine.boot_id] = secrets.token_bytes(16)
        self._remove(engine, why, logging.WARNING, silently=True)
        self._post(engine.boot_id, Pong(self._boot_id_for(engine.boot_id)))

    def _on_stored(self, engine: Engine, message: Stored) -> None:
        self._cluster.stores.stored(engine, message)
        for order in self._cluster.stores.evictions(engine, self._cluster.is_pinned):
            self.send(engine, order)

    def _welcome(self, engine: Engine, send_snapshot: bool) -> Welcome:
        boot_id = self._boot_id_for(engine.boot_id)
        engine.num_welcomes += 1
        num_sent = engine.num_sent + 1
        return Welcome(PROTOCOL_VERSION, boot_id, self._heartbeat_s, send_snapshot, num_sent)

    def _name_taken(self, identity: bytes) -> str:
        """Why a mover that was replaced but still lives may not come back; empty if it may."""
        engine_id = self._replaced.get(identity)
        if engine_id is None:
            return ""
        other = self._cluster.by_id(engine_id)
        if other is None:
            del self._replaced[identity]
            return ""
        return (
            f"name: another engine, at {other.hello.url}, registered as {engine_id} later;"
            " give each engine a name of its own"
        )

    def _boot_id_for(self, identity: bytes) -> bytes:
        return self._new_boot_ids.get(identity, self._boot_id)

    def _remove(self, engine: Engine, why: str, level: int, *, silently: bool = False) -> None:
        logger.log(level, "engine %s is out of the cluster: %s", engine.engine_id, why)
        self._cluster.leave(engine, silently=silently)
        for other in self._cluster.engines:
            self.send(other, PeerDied(engine.engine_id, engine.boot_id))
        self._ask_for_missing_snapshots()

    def _ask_for_missing_snapshots(self) -> None:
        for engine in self._cluster.engines:
            state = self._cluster.stores.state(engine.hello)
            if state.needs_snapshot(engine) and state.snapshot_from is not engine:
                state.begin_snapshot(engine)
                self.send(engine, self._welcome(engine, True))

    # --- sending and watching ---

    def _post(self, identity: bytes, message: Message) -> None:
        try:
            self._socket.send(identity, encode(message))
        except PeerLost as exc:
            # It may be reconnecting: then it finds out by the next Pong. Otherwise its silence
            # takes it out of the cluster.
            logger.debug("message not sent: %s", exc)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = self._heartbeat_s / 2
        while True:
            started_s = loop.time()
            await asyncio.sleep(pause_s)
            # While this process stood still (stopped, or busy with a huge body) it heard nobody.
            self._cluster.excuse_silence(loop.time() - started_s - pause_s)
            limit_s = _MISSED_HEARTBEATS * self._heartbeat_s
            for engine in self._cluster.silent(loop.time(), limit_s):
                self._new_boot_ids[engine.boot_id] = secrets.token_bytes(16)
                self._remove(
                    engine, f"no heartbeat for {limit_s:.1f} s", logging.WARNING, silently=True
                )
            self._warn_of_stuck(loop.time())
            self._cluster.forget_finished()

    def _warn_of_stuck(self, now_s: float) -> None:
        for key, transfer in list(self._cluster.transfers.items()):
            age_s = now_s - transfer.opened_s
            if age_s > self._stuck_warning_s and not transfer.warned:
                transfer.warned = True
                logger.warning(
                    "transfer %s is open for %.0f s: %s, prefill %s, decode %s",
                    key,
                    age_s,
                    transfer.describe(),
                    transfer.prefill.engine_id,
                    transfer.decode.engine_id,
                )
            if transfer.ending and age_s > _FORGET_TRANSFER_FACTOR * self._stuck_warning_s:
                del self._cluster.transfers[key]


def _must_restart(engine: Engine, hello: Hello) -> bool:
    """Whether a Hello of a known engine changes what its open transfers and blocks rest on, or
    messages before it were lost.
    """
    known = engine.hello
    changed = (
        *(known.boot_id, known.root, known.address, known.region, known.store),
        known.registration,
    ) != (
        *(hello.boot_id, hello.root, hello.address, hello.region, hello.store),
        hello.registration,
    )
    missed = not hello.registered and engine.num_sent > engine.num_welcomes
    return changed or (hello.num_sent > 0 and (missed or hello.num_sent != engine.num_heard))
