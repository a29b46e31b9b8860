"""One attempt of one transfer, seen from the router: docs/protocol.md as a state machine.

Fed with movers' messages, talks through ``send``. No sockets, no HTTP, no other transfers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vllm_dualpath.config import Deadlines
from vllm_dualpath.messages import (
    Committed,
    Cut,
    CutDone,
    End,
    Ended,
    Message,
    NotCached,
    Peer,
    Ready,
    Reserve,
    Reserved,
    SegmentDone,
    TransferFailed,
    TransferKey,
)
from vllm_dualpath.plan import ReadPlan
from vllm_dualpath.router.booking import Booking
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.failure import PEER_LOST, Failure, State
from vllm_dualpath.router.orders import Orders, Prompt, peer_of

logger = logging.getLogger(__name__)

_STALLED = "stalled while"
_SHUN_S = 60.0
"""A donor that may have failed a request is asked for nothing so long: its heartbeats can be good
while its reads or pushes are not, and each request would lose an attempt by it.
"""

Send = Callable[[Engine, Message], None]

_COMMIT_AFTER_END_S = 1.0
"""A commit may be on its way when the prefill side's end arrives."""
_IDLE_FACTOR = 2.0
"""Movers watch the same deadlines more closely; the router steps in only where a mover did not."""
_TOTAL_FACTOR = 10.0
"""Progress of a mover may be another transfer's: after this many deadlines it counts no more."""


class Transfer:
    """See the module's docstring. Everything runs in the event loop's thread."""

    def __init__(
        self,
        key: TransferKey,
        prompt: Prompt,
        plan: ReadPlan,
        prefill: Engine,
        decode: Engine,
        donors: tuple[Engine, ...],
        booking: Booking,
        divide_reads: Callable[[], ReadPlan],
        send: Send,
        deadlines: Deadlines,
    ) -> None:
        """``divide_reads`` is asked when both sides have slots: who reads may have changed."""
        loop = asyncio.get_running_loop()
        self.key = key
        self.prompt = prompt
        self.plan = plan
        self.prefill = prefill
        self.decode = decode
        self.donors = donors
        self.booking = booking
        self.state = State.RESERVING_DECODE
        self.failure: Failure | None = None
        self.num_hit_blocks = plan.num_hit_blocks
        self.opened_s = loop.time()
        self.warned = False
        self.leg_sent = False
        """Whether an engine may know of this attempt."""
        self._divide_reads = divide_reads
        self._send = send
        self._deadlines = deadlines
        self._shortest_idle_s = _IDLE_FACTOR * min(deadlines.reserve_s, deadlines.stage_s)
        self._clock = loop.time
        self._state_since_s = self.opened_s
        self._last_message_s = self.opened_s
        self._decode_slots: tuple[int, ...] = ()
        self._staged = False
        self._cache_missed = False
        self._waiter: asyncio.Future[None] | None = None
        self._on_failure: Callable[[], object] | None = None
        self._cut_by: set[bytes] = set()
        """Boot ids of those who have to confirm a cut before the prefill side hears of it."""
        self._open_parts = {each.boot_id: each for each in self.movers}
        """Those who were not told to end."""
        self._unended = dict(self._open_parts)

    # --- the router's side ---

    def start(self) -> None:
        """Ask the decode mover for slots."""
        for mover in self.movers:
            # Its request may have waited since it was placed.
            if mover.lost.is_set():
                self.engine_lost(mover)
        if self.failure is not None:
            return
        self._reserve(self.decode, "decode", peer_of(self.prefill))

    async def wait_ready(self) -> bool:
        """Wait until the prefill side has published its hits; False when the attempt failed."""
        while self.state in _BEFORE_READY:
            idle_s = self._idle_left_s()
            if idle_s <= 0:
                self.fail(f"{_STALLED} {self.state.value}", self._suspect())
                break
            # Not longer: another state may have begun meanwhile, of a shorter deadline.
            await self._wait_for_change(min(idle_s, self._shortest_idle_s))
        return self.failure is None

    async def wait_committed(self) -> bool:
        """Wait for the decode side's commit, at most ``commit_s``; False when it does not come.

        The prefill side has been told to end: once it has, every page it will ever push has
        arrived, and the commit comes at once or never.
        """
        ends_s = self._clock() + self._deadlines.commit_s
        while self.state is State.READY:
            if self.prefill.boot_id not in self._unended:
                ends_s = min(ends_s, self._clock() + _COMMIT_AFTER_END_S)
            left_s = ends_s - self._clock()
            if left_s <= 0:
                self.fail("no commit in time")
                break
            await self._wait_for_change(left_s)
        return self.state is State.COMMITTED

    def when_failed(self, call: Callable[[], object] | None) -> None:
        """Call this once, when the attempt has failed; ``None``: nothing any more."""
        self._on_failure = call
        if call is not None and self.failure is not None:
            call()

    def fail(self, reason: str, engine_id: str = "") -> None:
        """The attempt is over; whoever waits wakes up. The caller of ``start`` ends it."""
        if self.failure is not None:
            return
        self.failure = Failure(reason, engine_id, self.state)
        for donor in self._blamed(reason, engine_id):
            donor.shun(self._clock() + _SHUN_S)
        logger.info("transfer %s: failed while %s: %s", self.key, self.state.value, reason)
        self._enter(State.FAILED)
        if self._on_failure is not None:
            self._on_failure()

    def end_prefill(self, *, drain: bool, reason: str) -> None:
        self._end(self.prefill, drain, reason)

    def end(self, *, drain: bool, reason: str) -> None:
        """End whatever is not ended yet at every mover. Idempotent."""
        if self.failure is None and self.state is not State.COMMITTED:
            self.fail(reason)
        self._end(self.prefill, drain, reason)
        self._end(self.decode, drain, reason)
        for donor in self.donors:
            self._end(donor, drain, reason)
        for reader in self.booking.readers:
            self.booking.reads_done(reader)

    @property
    def movers(self) -> tuple[Engine, ...]:
        """All that take part."""
        return (self.prefill, self.decode, *self.donors)

    @property
    def finished(self) -> bool:
        """Every mover has reported, or lost, all slots."""
        return not self._open_parts and not self._unended

    @property
    def ending(self) -> bool:
        """Nothing is asked of the movers any more but to report their ends."""
        return not self._open_parts

    @property
    def num_loaded_tokens(self) -> int:
        """Prompt tokens that were not computed, as far as the plan tells."""
        num_blocks = 0 if self._cache_missed else self.num_hit_blocks
        return num_blocks * self.decode.hello.geometry.block_tokens

    def describe(self) -> str:
        """State, for a log line."""
        waiting = ", ".join(engine.engine_id for engine in self._unended.values())
        return f"waiting for the end at {waiting}" if self.ending else self.state.value

    # --- the movers' side ---

    def on_message(self, sender: Engine, message: Message) -> None:
        """Take in a message about this key from one of its movers."""
        self._last_message_s = self._clock()
        if isinstance(message, Ended):
            self._on_ended(sender)
        elif isinstance(message, TransferFailed):
            if sender not in self.donors or self._needs(sender):
                self.fail(message.reason, sender.engine_id)
        elif isinstance(message, NotCached):
            self._cache_missed = True
            self.booking.stay.missed()
        elif self.failure is None:
            self._advance(sender, message)

    def engine_lost(self, engine: Engine) -> None:
        """The mover is gone: nothing can be asked of it, and its slots with it."""
        if engine.boot_id not in self._unended:
            return
        self._unended.pop(engine.boot_id)
        self._open_parts.pop(engine.boot_id, None)
        if self._needs(engine):
            self.fail(PEER_LOST, engine.engine_id)
        self._wake()

    def _advance(self, sender: Engine, message: Message) -> None:
        from_decode, from_prefill = sender is self.decode, sender is self.prefill
        if isinstance(message, Reserved) and (from_decode or from_prefill):
            self._on_reserved(from_decode, message)
        elif isinstance(message, SegmentDone):
            self._on_segment_done(sender, message)
        elif isinstance(message, CutDone) and message.num_hit_blocks == self.num_hit_blocks:
            self._cut_confirmed(sender)
        elif isinstance(message, Ready) and from_prefill and self.state is State.STAGING:
            self.num_hit_blocks = min(self.num_hit_blocks, message.num_hit_blocks)
            self._enter(State.READY)
        elif isinstance(message, Committed) and from_decode and self.state is State.READY:
            self._enter(State.COMMITTED)
        else:
            logger.debug("transfer %s: %s ignored", self.key, type(message).__name__)

    def _on_reserved(self, from_decode: bool, message: Reserved) -> None:
        # Always decode first: nothing that holds a prefill slot ever waits for a decode slot.
        if from_decode and self.state is State.RESERVING_DECODE:
            self._decode_slots = message.slots
            self._enter(State.RESERVING_PREFILL)
            self._reserve(self.prefill, "prefill", peer_of(self.decode, message.slots))
        elif not from_decode and self.state is State.RESERVING_PREFILL:
            self._enter(State.STAGING)
            self._staged = True
            decode = peer_of(self.decode, self._decode_slots)
            prefill = peer_of(self.prefill, message.slots)
            self.plan = self._divide_reads()
            orders = Orders(self.key, self.prompt, self.plan)
            self._send(self.prefill, orders.stage("prefill", decode))
            self._send(self.decode, orders.stage("decode", prefill))
            for donor in self.donors:
                self._send(donor, orders.donate(donor, prefill, decode))

    def _on_segment_done(self, sender: Engine, message: SegmentDone) -> None:
        self.booking.reads_done(sender.engine_id)
        if message.good_until >= min(message.last_block, self.num_hit_blocks):
            return
        if self.state is not State.STAGING:
            self.fail(f"late bad block: {message.error}", sender.engine_id)
            return
        self.num_hit_blocks = message.good_until
        # From here on only the prefill side writes beyond: it must not begin before all have ended.
        writers = [self.decode, *(each for each in self.donors if each.boot_id in self._unended)]
        self._cut_by = {writer.boot_id for writer in writers}
        for writer in writers:
            self._send(writer, Cut(self.key, self.num_hit_blocks))

    def _cut_confirmed(self, sender: Engine) -> None:
        if sender.boot_id not in self._cut_by:
            return
        self._cut_by.discard(sender.boot_id)
        if not self._cut_by and self.failure is None:
            self._send(self.prefill, Cut(self.key, self.num_hit_blocks))

    def _on_ended(self, sender: Engine) -> None:
        self._unended.pop(sender.boot_id, None)
        self._wake()
        if sender.boot_id not in self._open_parts:
            return
        if sender in self.donors:
            # It is over as soon as its part is done: there is nothing to tell it.
            del self._open_parts[sender.boot_id]
            self._cut_confirmed(sender)
        # After the commit the decode side ends early, when its engine has taken everything.
        if self.state is not State.COMMITTED and self._needs(sender):
            self.fail("ended by its mover", sender.engine_id)

    def _needs(self, engine: Engine) -> bool:
        """Whether the attempt cannot go on without this mover."""
        if engine is self.decode:
            return True
        # Once every page has been committed nobody else is needed.
        if self.state is State.COMMITTED:
            return False
        at_work = engine.engine_id in self.booking.readers or engine.boot_id in self._cut_by
        return engine is self.prefill or at_work

    def _blamed(self, reason: str, engine_id: str) -> list[Engine]:
        """Donors that may be why it failed."""
        if any(donor.engine_id == engine_id for donor in self.donors):
            return [donor for donor in self.donors if donor.engine_id == engine_id]
        sides_lost = self.prefill.lost.is_set() or self.decode.lost.is_set()
        if sides_lost or not (reason == PEER_LOST or reason.startswith(_STALLED)):
            return []
        # A side that misses somebody does not say whom: those who have not read their part.
        return [donor for donor in self.donors if donor.engine_id in self.booking.readers]

    # --- inner parts ---

    def _reserve(self, engine: Engine, pool: str, peer: Peer) -> None:
        donors = tuple(peer_of(donor) for donor in self.donors)
        self._send(engine, Reserve(self.key, pool, self.prompt.num_tokens, peer, donors))

    def _end(self, engine: Engine, drain: bool, reason: str) -> None:
        if self._open_parts.pop(engine.boot_id, None) is None:
            return
        reached = self.state_reached_prefill if engine is self.prefill else self._staged
        if engine is not self.decode and not reached:
            self._unended.pop(engine.boot_id, None)
            return
        self._send(engine, End(self.key, drain, reason, self._staged))

    @property
    def state_reached_prefill(self) -> bool:
        """Whether the prefill mover has heard of this transfer."""
        return bool(self._decode_slots)

    def _enter(self, state: State) -> None:
        self.state = state
        self._state_since_s = self._clock()
        if state not in _BEFORE_READY:
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait_for_change(self, timeout_s: float) -> None:
        """Until something that a waiter looks for may have happened; one waits at a time."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()

    def _idle_left_s(self) -> float:
        """Seconds until this attempt counts as stalled; progress of its readers puts it off."""
        staging = self.state is State.STAGING
        deadline_s = self._deadlines.stage_s if staging else self._deadlines.reserve_s
        since_s = max(self._last_message_s, self._state_since_s)
        if staging:
            since_s = max(since_s, *(mover.last_moved_s for mover in self.movers))
        ends_s = min(
            since_s + _IDLE_FACTOR * deadline_s, self._state_since_s + _TOTAL_FACTOR * deadline_s
        )
        return ends_s - self._clock()

    def _suspect(self) -> str:
        """Who let the attempt stall: the one reader that has not finished, or whom it waits for."""
        if self.state is State.STAGING:
            return next(iter(self.booking.readers), self.prefill.engine_id)
        waits_for_decode = self.state is State.RESERVING_DECODE
        return (self.decode if waits_for_decode else self.prefill).engine_id


_BEFORE_READY = (State.RESERVING_DECODE, State.RESERVING_PREFILL, State.STAGING)
