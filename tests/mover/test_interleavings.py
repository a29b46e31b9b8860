"""Any order of events on two sides: no slot is freed too early, and all are free in the end.

The rules play router, engines, store and network; ``rig`` checks at every release and put that
nothing under way touches the slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.mover.material import GEOMETRY, Prompt
from tests.mover.rig import NUM_SLOTS, Pair, Side
from vllm_dualpath.control.slot_table import ClaimedTransfer
from vllm_dualpath.messages import (
    Cut,
    CutDone,
    Ended,
    Peer,
    Reserved,
    Saved,
    SegmentDone,
    TransferFailed,
    TransferKey,
)

ANY = st.integers(0, 7)
ROLES = st.sampled_from(["prefill", "decode"])
STAGE_ORDERS = (
    [("prefill", "decode")] * 3 + [("decode", "prefill")] * 3 + [("prefill",), ("decode",)]
)
MAX_SETTLE_ROUNDS = 200


@dataclass
class Attempt:
    """What router and engines know of one transfer."""

    key: TransferKey
    prompt: Prompt
    split: int
    hits: int
    asked: set[str] = field(default_factory=set)
    staged: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    slots: dict[str, tuple[int, ...]] = field(default_factory=dict)
    claims: list[tuple[str, ClaimedTransfer]] = field(default_factory=list)
    saved: int = 0
    done_sides: set[str] = field(default_factory=set)


class TwoMovers(RuleBasedStateMachine):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.attempts: list[Attempt] = []
        self.router_lost = False
        self.router_died = False
        """It says nothing more, to nobody: between two ``Stage``s, or after."""

    # --- router ----------------------------------------------------------------------------------

    @rule(
        progress=st.integers(0, 6),
        split=st.integers(0, 2),
        hits=st.integers(0, 2),
        missing=st.integers(0, 4),
    )
    def begin(self, progress: int, split: int, hits: int, missing: int) -> None:
        """A new transfer, perhaps brought along quickly: chance alone would rarely get it far."""
        if len(self.attempts) >= 3 or self.router_died:
            return
        prompt = Prompt(21, seed=len(self.attempts))
        for idx in range(hits):
            if idx != missing:
                self.pair.store.blocks[prompt.hashes[idx]] = bytes([idx]) * GEOMETRY.slot_bytes
        attempt = Attempt(self.pair.new_key(), prompt, min(split, hits), hits)
        self.attempts.append(attempt)
        attempt.asked.add("decode")
        self.pair.reserve(self.pair.decode, attempt.key, prompt, self.pair.prefill.contact)
        self.hear()
        self._bring_along(attempt, progress)

    def _bring_along(self, attempt: Attempt, progress: int) -> None:
        steps: list[Callable[[], object]] = [
            partial(self._go_on, attempt, ("prefill", "decode")),
            partial(self._go_on, attempt, ("prefill", "decode")),
            self._step,
            self._step,
            lambda: self._claim(attempt, "prefill"),
            lambda: (self._save(attempt, 3), self.pair.prefill.transport.deliver()),
        ]
        for step in steps[:progress]:
            step()
            self.pair.spin()
            self.hear()

    @rule(choice=ANY, roles=st.sampled_from(STAGE_ORDERS), dies=st.booleans())
    def go_on(self, choice: int, roles: tuple[str, ...], dies: bool) -> None:
        """The router's next step: reserve at the prefill side, then ``Stage`` to both.

        One ``Stage`` may be lost, with the router or without.
        """
        if attempt := self._pick(choice):
            self._go_on(attempt, roles, dies)

    def _go_on(self, attempt: Attempt, roles: tuple[str, ...], dies: bool = False) -> None:
        if attempt.ended or attempt.staged or "decode" not in attempt.slots or self.router_died:
            return
        if "prefill" not in attempt.asked:
            attempt.asked.add("prefill")
            peer = self._peer("decode", attempt)
            self.pair.reserve(self.pair.prefill, attempt.key, attempt.prompt, peer)
        elif "prefill" in attempt.slots:
            for role in roles:
                self._stage(role, attempt)
            self.router_died = dies and len(roles) == 1

    def _stage(self, role: str, attempt: Attempt) -> None:
        attempt.staged.add(role)
        other = "decode" if role == "prefill" else "prefill"
        self.pair.stage(
            self._side(role),
            attempt.key,
            attempt.prompt,
            attempt.split,
            attempt.hits,
            self._peer(other, attempt),
        )

    @rule(choice=ANY, role=ROLES, drain=st.booleans())
    def end(self, choice: int, role: str, drain: bool) -> None:
        attempt = self._pick(choice)
        if attempt is not None and role in attempt.asked and not self.router_died:
            attempt.ended.add(role)
            self._side(role).book.end(attempt.key, drain, staged=bool(attempt.staged))

    @rule(role=ROLES)
    @precondition(lambda self: not self.router_lost and len(self.attempts) >= 2)
    def lose_router(self, role: str) -> None:
        """One mover first; the other hears of it when everything settles."""
        self.router_lost = True
        self._side(role).book.router_lost()
        for attempt in self.attempts:
            attempt.ended.add(role)

    # --- engines ---------------------------------------------------------------------------------

    @rule(choice=ANY, role=ROLES)
    def claim(self, choice: int, role: str) -> None:
        if attempt := self._pick(choice):
            self._claim(attempt, role)

    def _claim(self, attempt: Attempt, role: str) -> None:
        if len(attempt.claims) < 3:
            claimed = self._side(role).table.claim(attempt.key)
            if claimed is not None:
                assert claimed.slots == attempt.slots[role]
                attempt.claims.append((role, claimed))
                self._side(role).claimed.update(claimed.slots)

    @rule(choice=ANY, num_layers=st.integers(1, 3))
    def save(self, choice: int, num_layers: int) -> None:
        """The next layers of all new pages, if the prefill side has claimed."""
        if attempt := self._pick(choice):
            self._save(attempt, num_layers)

    def _save(self, attempt: Attempt, num_layers: int) -> None:
        claimed = next((c for role, c in attempt.claims if role == "prefill"), None)
        if claimed is None:
            return
        first = claimed.num_hit_blocks * GEOMETRY.pages_per_block
        for layer in range(attempt.saved, min(attempt.saved + num_layers, GEOMETRY.num_layers)):
            saved = Saved(attempt.key, layer, first, attempt.prompt.num_pages)
            attempt.saved += 1
            self.pair.prefill.book.saved(saved)

    @rule(choice=ANY)
    def release(self, choice: int) -> None:
        attempt = self._pick(choice)
        if attempt is not None and attempt.claims:
            self._release(attempt)

    def _release(self, attempt: Attempt) -> None:
        role, claimed = attempt.claims.pop(0)
        side = self._side(role)
        if all(each.slots != claimed.slots for held, each in attempt.claims if held == role):
            side.claimed.difference_update(claimed.slots)
        side.book.release(attempt.key)

    # --- store and network -----------------------------------------------------------------------

    @rule(role=ROLES, choice=ANY, num_started=st.integers(0, 3), num_finished=st.integers(0, 3))
    def store_calls(self, role: str, choice: int, num_started: int, num_finished: int) -> None:
        """Threads take calls, and calls return, in any order."""
        for _ in range(num_started):
            self._side(role).storage.start_one(choice)
        for _ in range(num_finished):
            self._side(role).storage.finish_one(choice)

    @rule(role=ROLES)
    def deliver(self, role: str) -> None:
        self._side(role).transport.deliver()
        self.pair.spin()

    # --- checks ----------------------------------------------------------------------------------

    @invariant()
    def hear(self) -> None:
        """Act on what the movers said, as the router does."""
        for side in self.pair.sides:
            while side.told:
                message = side.told.pop(0)
                key = getattr(message, "key", None)
                attempt = next((each for each in self.attempts if each.key == key), None)
                if attempt is None:
                    continue
                if self.router_died and not isinstance(message, Ended):
                    continue
                if isinstance(message, Reserved):
                    attempt.slots[side.role] = message.slots
                elif isinstance(message, Ended):
                    attempt.done_sides.add(side.role)
                elif isinstance(message, SegmentDone) and message.good_until < min(
                    message.last_block, attempt.hits
                ):
                    attempt.hits = message.good_until
                    self.pair.decode.book.cut(key, attempt.hits)
                elif isinstance(message, CutDone) and side is self.pair.decode:
                    cut = Cut(message.key, message.num_hit_blocks)
                    self.pair.prefill.book.cut(cut.key, cut.num_hit_blocks)

    def teardown(self) -> None:
        """Everything ends and every claim is released: then every slot is free."""
        for role in ("prefill", "decode"):
            for attempt in self.attempts:
                if role not in attempt.ended and role in attempt.asked and not self.router_died:
                    staged = bool(attempt.staged)
                    self._side(role).book.end(attempt.key, False, staged=staged)
        if self.router_lost or self.router_died:
            for side in self.pair.sides:
                side.book.router_lost()
        for attempt in self.attempts:
            while attempt.claims:
                self._release(attempt)
        for _ in range(MAX_SETTLE_ROUNDS):
            if self._settled():
                break
            self._step()
        problem = [t.describe() for side in self.pair.sides for t in side.book.transfers]
        free = [side.pool.num_free for side in self.pair.sides]
        self.pair.close()
        assert free == [NUM_SLOTS, NUM_SLOTS], problem

    def _settled(self) -> bool:
        return all(side.pool.num_free == NUM_SLOTS for side in self.pair.sides)

    def _step(self) -> None:
        for side in self.pair.sides:
            side.storage.start_one(0)
            side.storage.finish_one(0)
            side.transport.deliver()
        self.pair.spin()
        self.hear()

    def _pick(self, choice: int) -> Attempt | None:
        return self.attempts[choice % len(self.attempts)] if self.attempts else None

    def _side(self, role: str) -> Side:
        return self.pair.prefill if role == "prefill" else self.pair.decode

    def _peer(self, role: str, attempt: Attempt) -> Peer:
        return msgspec.structs.replace(self._side(role).contact, slots=attempt.slots[role])


TwoMovers.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTwoMovers = TwoMovers.TestCase


# --- chosen interleavings, too rare to be left to chance -----------------------------------------


@pytest.fixture
def machine() -> Iterator[TwoMovers]:
    machine = TwoMovers()
    yield machine
    machine.teardown()


def staged(machine: TwoMovers, *roles: str, split: int = 0) -> Attempt:
    """A transfer whose ``Stage`` reached these movers; two hit blocks."""
    machine.begin(progress=1, split=split, hits=2, missing=4)
    machine.go_on(0, roles, dies=len(roles) == 1)
    return machine.attempts[0]


def test_own_push_open_at_the_end(machine: TwoMovers) -> None:
    """The peer has stopped, but our own push still reads our slots: they are not free."""
    staged(machine, "prefill", "decode")
    machine.store_calls("decode", 0, 2, 2)
    machine.end(0, "prefill", drain=False)
    machine.deliver("prefill")
    machine.end(0, "decode", drain=False)
    assert machine.pair.decode.pool.num_free < NUM_SLOTS
    machine.deliver("decode")
    assert machine.pair.decode.pool.num_free == NUM_SLOTS


def test_router_lost_between_two_stages(machine: TwoMovers) -> None:
    """The peer was staged, we were not: our slots wait until it answers that it has stopped."""
    staged(machine, "decode")
    machine.store_calls("decode", 0, 2, 2)
    prefill, decode = machine.pair.sides
    prefill.book.router_lost()
    assert prefill.pool.num_free < NUM_SLOTS
    machine.deliver("prefill")
    assert prefill.pool.num_free < NUM_SLOTS
    decode.book.router_lost()
    machine.deliver("decode")
    assert prefill.pool.num_free < NUM_SLOTS
    machine.deliver("decode")  # the pushes have ended, and now it says so
    assert prefill.pool.num_free == NUM_SLOTS


def test_lost_stage_of_a_router_that_lives(machine: TwoMovers) -> None:
    """Our ``Stage`` is lost, the peer's is not: ``End`` says so, and our slots wait for it."""
    machine.begin(progress=1, split=0, hits=2, missing=4)
    machine.go_on(0, ("decode",), dies=False)
    machine.store_calls("decode", 0, 2, 2)
    prefill = machine.pair.prefill
    machine.end(0, "prefill", drain=False)
    assert prefill.pool.num_free < NUM_SLOTS
    machine.end(0, "decode", drain=False)
    machine.deliver("prefill")
    machine.deliver("decode")
    machine.deliver("decode")
    assert prefill.pool.num_free == NUM_SLOTS


def test_query_about_an_unknown_transfer(machine: TwoMovers) -> None:
    """A mover that never heard of a transfer answers at once, and will never start it."""
    machine.begin(progress=0, split=0, hits=0, missing=0)
    prefill, decode = machine.pair.sides
    decode.book.router_lost()
    assert decode.pool.num_free < NUM_SLOTS
    machine.deliver("decode")
    machine.deliver("prefill")
    assert decode.pool.num_free == NUM_SLOTS
    attempt = machine.attempts[0]
    machine.pair.reserve(prefill, attempt.key, attempt.prompt, decode.contact)
    assert isinstance(prefill.told.pop(), TransferFailed)
    assert prefill.pool.num_free == NUM_SLOTS


def test_router_lost_with_a_queue_of_reservations(machine: TwoMovers) -> None:
    """Every waiting reservation is withdrawn, also one that fits as soon as another is gone."""
    decode, prefill = machine.pair.decode, machine.pair.prefill
    for num_tokens in (40, 64, 8, 8):
        prompt = Prompt(num_tokens)
        machine.pair.reserve(decode, machine.pair.new_key(), prompt, prefill.contact)
    assert decode.book.num_open == 4
    decode.book.router_lost()
    machine.deliver("decode")
    machine.deliver("prefill")
    assert decode.book.num_open == 0
    assert decode.pool.num_free == NUM_SLOTS
    assert sum(isinstance(message, Reserved) for message in decode.told) == 1


def test_ambiguous_push_is_no_proof(machine: TwoMovers) -> None:
    """A push that failed under way may still arrive: the writer never claims to have stopped."""
    staged(machine, "prefill", "decode")
    prefill, decode = machine.pair.sides
    machine.store_calls("decode", 0, 2, 2)
    (peer_id,) = decode.transport._peers
    decode.transport.disconnect(peer_id)
    machine.pair.spin()
    assert any(isinstance(message, TransferFailed) for message in decode.told)
    machine.end(0, "decode", drain=False)
    machine.end(0, "prefill", drain=False)
    deadline = time.monotonic() + 1.3  # a notice to a closed endpoint is repeated after a second
    while time.monotonic() < deadline:
        machine.deliver("prefill")
        machine.deliver("decode")
        time.sleep(0.02)
    assert decode.pool.num_free == NUM_SLOTS
    assert prefill.pool.num_free < NUM_SLOTS
    assert all(transfer.awaits_proof for transfer in prefill.book.transfers)
    for transfer in prefill.book.transfers:
        transfer.on_peer_dead()


def test_a_drained_push_is_reported_as_good(machine: TwoMovers) -> None:
    """The prefill leg is back before the hit blocks are pushed on: the segment is whole all the
    same, and the decode side gets it.
    """
    attempt = staged(machine, "prefill", "decode", split=2)
    machine.store_calls("prefill", 0, 2, 2)
    machine.end(0, "prefill", drain=True)
    machine.pair.prefill.transport.deliver()
    machine.pair.spin()
    done = [each for each in machine.pair.prefill.told if isinstance(each, SegmentDone)]
    assert [(each.good_until, each.error) for each in done] == [(2, "")]
    assert attempt.hits == 2
