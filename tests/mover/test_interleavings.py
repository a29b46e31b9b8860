"""Any order of events on two sides and a donor: no slot is freed too early, all are in the end.

The rules play router, engines, store and network; ``rig`` checks at every release and put that
nothing under way touches the slots, and that nobody writes to what an engine has claimed.
"""

from __future__ import annotations

import itertools
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
from tests.mover.rig import NUM_SLOTS, Side, Trio
from vllm_dualpath.control.slot_table import ClaimedTransfer
from vllm_dualpath.messages import (
    CutDone,
    Ended,
    Peer,
    Reserved,
    Saved,
    SegmentDone,
    SegmentSpec,
    TransferFailed,
    TransferKey,
    WriterStopped,
    decode_notice,
)
from vllm_dualpath.storage.base import ReadBlock

ANY = st.integers(0, 7)
SIDES = ("prefill", "decode")
EVERYBODY = (*SIDES, "donor")
ROLES = st.sampled_from(SIDES)
ALL_ROLES = st.sampled_from(EVERYBODY)
STAGE_ORDERS = [
    *itertools.permutations(EVERYBODY),
    *itertools.permutations(EVERYBODY, 2),
    *itertools.permutations(EVERYBODY, 1),
]
MAX_SETTLE_ROUNDS = 200


@dataclass
class Attempt:
    """What router and engines know of one transfer."""

    key: TransferKey
    prompt: Prompt
    splits: tuple[int, int]
    """Where the decode side's part and the donor's begin."""
    hits: int
    planned: int
    """Hits before any cut."""
    asked: set[str] = field(default_factory=set)
    staged: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    slots: dict[str, tuple[int, ...]] = field(default_factory=dict)
    claims: list[tuple[str, ClaimedTransfer]] = field(default_factory=list)
    cut_by: set[str] = field(default_factory=set)
    """Who has to confirm a cut before the prefill side hears of it."""
    saved: int = 0
    done_sides: set[str] = field(default_factory=set)

    @property
    def segments(self) -> tuple[SegmentSpec, ...]:
        bounds = (0, *self.splits, self.planned)
        parts = zip(EVERYBODY, itertools.pairwise(bounds), strict=True)
        return tuple(SegmentSpec(role, *blocks) for role, blocks in parts if blocks[0] < blocks[1])

    @property
    def donated(self) -> SegmentSpec | None:
        return next((each for each in self.segments if each.reader == "donor"), None)


class ThreeMovers(RuleBasedStateMachine):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.trio = Trio()
        self.attempts: list[Attempt] = []
        self.router_lost = False
        self.router_died = False
        """It says nothing more, to nobody: between two ``Stage``s, or after."""

    # --- router ----------------------------------------------------------------------------------

    @rule(
        progress=st.integers(0, 6),
        splits=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        hits=st.integers(0, 3),
        missing=st.integers(0, 6),
    )
    def begin(self, progress: int, splits: tuple[int, int], hits: int, missing: int) -> None:
        """A new transfer, perhaps brought along quickly: chance alone would rarely get it far."""
        if len(self.attempts) >= 3 or self.router_died:
            return
        prompt = Prompt(29, seed=len(self.attempts))
        for idx in range(hits):
            if idx != missing:
                self.trio.store.blocks[prompt.hashes[idx]] = bytes([idx]) * GEOMETRY.slot_bytes
        first, second = sorted(min(split, hits) for split in splits)
        attempt = Attempt(self.trio.new_key(), prompt, (first, second), hits, hits)
        self.attempts.append(attempt)
        self._reserve("decode", attempt, self.trio.prefill.contact)
        self.hear()
        self._bring_along(attempt, progress)

    def _bring_along(self, attempt: Attempt, progress: int) -> None:
        steps: list[Callable[[], object]] = [
            partial(self._go_on, attempt, EVERYBODY),
            partial(self._go_on, attempt, EVERYBODY),
            self._step,
            lambda: [self._step() for _ in range(4)],
            lambda: self._claim(attempt, "prefill"),
            lambda: (self._save(attempt, 3), self.trio.prefill.transport.deliver()),
        ]
        for step in steps[:progress]:
            step()
            self.trio.spin()
            self.hear()

    @rule(choice=ANY, roles=st.sampled_from(STAGE_ORDERS), dies=st.booleans())
    def go_on(self, choice: int, roles: tuple[str, ...], dies: bool) -> None:
        """The router's next step: reserve at the prefill side, then ``Stage`` and ``Donate``.

        Some of these may be lost, with the router or without.
        """
        if attempt := self._pick(choice):
            self._go_on(attempt, roles, dies)

    def _go_on(self, attempt: Attempt, roles: tuple[str, ...], dies: bool = False) -> None:
        if attempt.ended or attempt.staged or "decode" not in attempt.slots or self.router_died:
            return
        if "prefill" not in attempt.asked:
            self._reserve("prefill", attempt, self._peer("decode", attempt))
        elif "prefill" in attempt.slots:
            for role in roles:
                self._stage(role, attempt)
            self.router_died = dies and len(roles) < len(EVERYBODY)

    def _reserve(self, role: str, attempt: Attempt, peer: Peer) -> None:
        attempt.asked.add(role)
        donated = attempt.donated is not None
        side = self._side(role)
        self.trio.reserve(side, attempt.key, attempt.prompt, peer, donated=donated)

    def _stage(self, role: str, attempt: Attempt) -> None:
        donated = attempt.donated
        if role != "donor":
            attempt.staged.add(role)
            peer = self._peer("decode" if role == "prefill" else "prefill", attempt)
            side = self._side(role)
            self.trio.stage(side, attempt.key, attempt.prompt, attempt.segments, peer)
        elif donated is not None:
            attempt.asked.add(role)
            attempt.staged.add(role)
            peers = [self._peer(side, attempt) for side in SIDES]
            self.trio.donate(attempt.key, attempt.prompt, donated, *peers)

    @rule(choice=ANY, role=ALL_ROLES, drain=st.booleans())
    def end(self, choice: int, role: str, drain: bool) -> None:
        attempt = self._pick(choice)
        if attempt is not None and role in attempt.asked and not self.router_died:
            attempt.ended.add(role)
            self._side(role).book.end(attempt.key, drain, staged=bool(attempt.staged))

    @rule(role=ALL_ROLES)
    @precondition(lambda self: not self.router_lost and len(self.attempts) >= 2)
    def lose_router(self, role: str) -> None:
        """One mover first; the others hear of it when everything settles."""
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
                for slot in claimed.slots:
                    self._side(role).check_unwritten(slot)

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
            self.trio.prefill.book.saved(saved)

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

    @rule(role=ALL_ROLES, choice=ANY, num_started=st.integers(0, 3), num_finished=st.integers(0, 3))
    def store_calls(self, role: str, choice: int, num_started: int, num_finished: int) -> None:
        """Threads take calls, and calls return, in any order."""
        for _ in range(num_started):
            self._side(role).storage.start_one(choice)
        for _ in range(num_finished):
            self._side(role).storage.finish_one(choice)

    @rule(role=ALL_ROLES)
    def deliver(self, role: str) -> None:
        self._side(role).transport.deliver()
        self.trio.spin()

    @rule(role=ALL_ROLES, slow=ROLES)
    def deliver_to_others(self, role: str, slow: str) -> None:
        """What one side put arrives, but for what it put to ``slow``."""
        side, target = self._side(role), self._side(slow).contact
        connection = side.ports.peers._current.get(target.boot_id)
        if connection is not None:
            side.transport.deliver_all_but(connection.peer_id)
            self.trio.spin()

    # --- checks ----------------------------------------------------------------------------------

    @invariant()
    def hear(self) -> None:
        """Act on what the movers said, as the router does."""
        for side in self.trio.sides:
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
                    self._cut_confirmed(side.role, attempt)
                elif isinstance(message, SegmentDone) and message.good_until < min(
                    message.last_block, attempt.hits
                ):
                    self._cut(attempt, message.good_until)
                elif isinstance(message, CutDone) and message.num_hit_blocks == attempt.hits:
                    self._cut_confirmed(side.role, attempt)

    def _cut(self, attempt: Attempt, num_hit_blocks: int) -> None:
        attempt.hits = num_hit_blocks
        writing = attempt.donated is not None and "donor" not in attempt.done_sides
        attempt.cut_by = {"decode", "donor"} if writing else {"decode"}
        for role in attempt.cut_by:
            self._side(role).book.cut(attempt.key, num_hit_blocks)

    def _cut_confirmed(self, role: str, attempt: Attempt) -> None:
        if role in attempt.cut_by:
            attempt.cut_by.discard(role)
            if not attempt.cut_by:
                self.trio.prefill.book.cut(attempt.key, attempt.hits)

    def teardown(self) -> None:
        """Everything ends and every claim is released: then every slot is free."""
        for role in EVERYBODY:
            for attempt in self.attempts:
                if role not in attempt.ended and role in attempt.asked and not self.router_died:
                    staged = bool(attempt.staged)
                    self._side(role).book.end(attempt.key, False, staged=staged)
        if self.router_lost or self.router_died:
            for side in self.trio.sides:
                side.book.router_lost()
        for attempt in self.attempts:
            while attempt.claims:
                self._release(attempt)
        for _ in range(MAX_SETTLE_ROUNDS):
            if self._settled():
                break
            self._step()
        problem = [part.describe() for side in self.trio.sides for part in side.book.parts]
        settled = self._settled()
        self.trio.close()
        assert settled, problem

    def _settled(self) -> bool:
        return all(side.all_free and not side.book.num_open for side in self.trio.sides)

    def _step(self) -> None:
        for side in self.trio.sides:
            side.storage.start_one(0)
            side.storage.finish_one(0)
            side.transport.deliver()
        self.trio.spin()
        self.hear()

    def _pick(self, choice: int) -> Attempt | None:
        return self.attempts[choice % len(self.attempts)] if self.attempts else None

    def _side(self, role: str) -> Side:
        return next(side for side in self.trio.sides if side.role == role)

    def _peer(self, role: str, attempt: Attempt) -> Peer:
        return msgspec.structs.replace(self._side(role).contact, slots=attempt.slots[role])


ThreeMovers.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestThreeMovers = ThreeMovers.TestCase


# --- chosen interleavings, too rare to be left to chance -----------------------------------------


@pytest.fixture
def machine() -> Iterator[ThreeMovers]:
    machine = ThreeMovers()
    yield machine
    machine.teardown()


def staged(
    machine: ThreeMovers,
    *roles: str,
    splits: tuple[int, int] = (0, 2),
    missing: int = 6,
    dies: bool = False,
) -> Attempt:
    """A transfer whose ``Stage`` or ``Donate`` reached these movers; two hit blocks."""
    machine.begin(progress=1, splits=splits, hits=2, missing=missing)
    machine.go_on(0, roles, dies=dies)
    return machine.attempts[0]


def test_own_push_open_at_the_end(machine: ThreeMovers) -> None:
    """The peer has stopped, but our own push still reads our slots: they are not free."""
    staged(machine, "prefill", "decode")
    machine.store_calls("decode", 0, 2, 2)
    machine.end(0, "prefill", drain=False)
    machine.deliver("prefill")
    machine.end(0, "decode", drain=False)
    assert machine.trio.decode.pool.num_free < NUM_SLOTS
    machine.deliver("decode")
    assert machine.trio.decode.pool.num_free == NUM_SLOTS


def test_router_lost_between_two_stages(machine: ThreeMovers) -> None:
    """The peer was staged, we were not: our slots wait until it answers that it has stopped."""
    staged(machine, "decode", dies=True)
    machine.store_calls("decode", 0, 2, 2)
    prefill, decode = machine.trio.prefill, machine.trio.decode
    prefill.book.router_lost()
    assert prefill.pool.num_free < NUM_SLOTS
    machine.deliver("prefill")
    assert prefill.pool.num_free < NUM_SLOTS
    decode.book.router_lost()
    machine.deliver("decode")
    assert prefill.pool.num_free < NUM_SLOTS
    machine.deliver("decode")  # the pushes have ended, and now it says so
    assert prefill.pool.num_free == NUM_SLOTS


def test_lost_stage_of_a_router_that_lives(machine: ThreeMovers) -> None:
    """Our ``Stage`` is lost, the peer's is not: ``End`` says so, and our slots wait for it."""
    staged(machine, "decode")
    machine.store_calls("decode", 0, 2, 2)
    prefill = machine.trio.prefill
    machine.end(0, "prefill", drain=False)
    assert prefill.pool.num_free < NUM_SLOTS
    machine.end(0, "decode", drain=False)
    machine.deliver("prefill")
    machine.deliver("decode")
    machine.deliver("decode")
    assert prefill.pool.num_free == NUM_SLOTS


def test_query_about_an_unknown_transfer(machine: ThreeMovers) -> None:
    """A mover that never heard of a transfer answers at once, and will never start it."""
    machine.begin(progress=0, splits=(0, 0), hits=0, missing=0)
    prefill, decode = machine.trio.prefill, machine.trio.decode
    decode.book.router_lost()
    assert decode.pool.num_free < NUM_SLOTS
    machine.deliver("decode")
    machine.deliver("prefill")
    assert decode.pool.num_free == NUM_SLOTS
    attempt = machine.attempts[0]
    machine.trio.reserve(prefill, attempt.key, attempt.prompt, decode.contact)
    assert isinstance(prefill.told.pop(), TransferFailed)
    assert prefill.pool.num_free == NUM_SLOTS


def test_router_lost_with_a_queue_of_reservations(machine: ThreeMovers) -> None:
    """Every waiting reservation is withdrawn, also one that fits as soon as another is gone."""
    decode, prefill = machine.trio.decode, machine.trio.prefill
    for num_tokens in (40, 64, 8, 8):
        prompt = Prompt(num_tokens)
        machine.trio.reserve(decode, machine.trio.new_key(), prompt, prefill.contact)
    assert decode.book.num_open == 4
    decode.book.router_lost()
    machine.deliver("decode")
    machine.deliver("prefill")
    assert decode.book.num_open == 0
    assert decode.pool.num_free == NUM_SLOTS
    assert sum(isinstance(message, Reserved) for message in decode.told) == 1


def test_ambiguous_push_is_no_proof(machine: ThreeMovers) -> None:
    """A push that failed under way may still arrive: the writer never claims to have stopped."""
    staged(machine, "prefill", "decode")
    prefill, decode = machine.trio.prefill, machine.trio.decode
    machine.store_calls("decode", 0, 2, 2)
    (peer_id,) = decode.transport._peers
    decode.transport.disconnect(peer_id)
    machine.trio.spin()
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
        transfer.on_peer_dead(decode.contact.boot_id)


def test_a_drained_push_is_reported_as_good(machine: ThreeMovers) -> None:
    """The prefill leg is back before the hit blocks are pushed on: the segment is whole all the
    same, and the decode side gets it.
    """
    attempt = staged(machine, *SIDES, splits=(2, 2))
    machine.store_calls("prefill", 0, 2, 2)
    machine.end(0, "prefill", drain=True)
    machine.deliver("prefill")
    done = [each for each in machine.trio.prefill.told if isinstance(each, SegmentDone)]
    assert [(each.good_until, each.error) for each in done] == [(2, "")]
    assert attempt.hits == 2


# --- donors --------------------------------------------------------------------------------------

DONOR_READS = (0, 0)


def test_a_donor_slot_is_held_until_both_pushes_have_ended(machine: ThreeMovers) -> None:
    """One window slot, two blocks: the second is read once the first is at both sides."""
    staged(machine, *EVERYBODY, splits=DONOR_READS)
    donor = machine.trio.donor
    machine.store_calls("donor", 0, 2, 2)
    assert not donor.storage.open_tasks
    assert donor.donor_pool.num_free == 0
    machine.deliver("donor")
    assert len(donor.storage.open_tasks) == 1
    machine.store_calls("donor", 0, 1, 1)
    machine.deliver("donor")
    assert donor.all_free
    assert donor.book.num_open == 0
    machine.hear()
    assert machine.attempts[0].done_sides == {"donor"}
    assert donor.ports.counters.donated_bytes == 2 * GEOMETRY.slot_bytes


def test_a_side_that_has_everything_does_not_wait_for_the_other(machine: ThreeMovers) -> None:
    """A donor tells each side as soon as nothing more comes to it: one that hangs holds up none."""
    staged(machine, *EVERYBODY, splits=(1, 1))
    prefill, donor = machine.trio.prefill, machine.trio.donor
    machine.store_calls("donor", 0, 1, 1)
    for _ in range(2):
        machine.deliver_to_others("donor", "decode")
    (transfer,) = prefill.book.transfers
    assert transfer._open_writers() == []
    assert donor.donor_pool.num_free == 0


def test_a_drained_side_asks_a_donor_beyond_the_cut(machine: ThreeMovers) -> None:
    """Its ``Donate`` was lost and its blocks are cut off: nothing but asking gives the proof."""
    staged(machine, *SIDES, splits=(1, 1), missing=0)
    machine.store_calls("prefill", 0, 1, 1)
    machine.hear()
    machine.trio.donor.book.cut(machine.attempts[0].key, 0)
    machine.hear()
    machine.claim(0, "prefill")
    assert machine.attempts[0].claims
    machine.end(0, "prefill", drain=True)
    machine.release(0)
    machine.deliver("prefill")
    machine.deliver("donor")
    assert machine.trio.prefill.all_free


def test_committed_slots_that_a_donor_may_still_write_beyond_the_cut(machine: ThreeMovers) -> None:
    """The prefill side announced those pages, which says nothing of a donor's push in doubt."""
    attempt = staged(machine, *EVERYBODY, splits=(1, 1), missing=0)
    prefill, decode, donor = machine.trio.sides
    machine.store_calls("donor", 0, 1, 1)
    donor.transport.disconnect(donor.ports.peers._current[decode.contact.boot_id].peer_id)
    machine.trio.spin()
    donor.book.cut(attempt.key, 0)
    machine.deliver("donor")
    assert not any(isinstance(message, CutDone) for message in donor.told)
    assert [type(each) for each in donor.told[-2:]] == [TransferFailed, Ended]
    machine.hear()
    machine.store_calls("prefill", 0, 1, 1)
    machine.hear()
    machine.claim(0, "prefill")
    machine.save(0, GEOMETRY.num_layers)
    machine.deliver("prefill")
    machine.claim(0, "decode")
    assert [role for role, _ in attempt.claims] == list(SIDES)
    for role in SIDES:
        machine.release(0)
        machine.end(0, role, drain=True)
    for _ in range(3):
        for role in EVERYBODY:
            machine.store_calls(role, 0, 9, 9)
            machine.deliver(role)
    assert prefill.all_free
    assert not decode.all_free
    donor.book.cut(attempt.key, 0)
    assert isinstance(donor.told[-1], TransferFailed), "of what is in doubt no cut is confirmed"
    for transfer in decode.book.transfers:
        transfer.on_peer_dead(donor.contact.boot_id)


def test_a_cut_beyond_a_donors_part(machine: ThreeMovers) -> None:
    """It is confirmed as it was asked for: it is of the whole hit."""
    attempt = staged(machine, splits=(0, 0))
    attempt.asked.add("donor")
    attempt.staged.add("donor")
    donor = machine.trio.donor
    peers = [machine._peer(role, attempt) for role in SIDES]
    machine.trio.donate(attempt.key, attempt.prompt, SegmentSpec("donor", 0, 1), *peers)
    donor.book.cut(attempt.key, 2)
    assert CutDone(attempt.key, 2) in donor.told


def test_a_drained_side_lets_the_donor_go_on(machine: ThreeMovers) -> None:
    """The prefill side has all and is told to end: what the decode side lacks still comes."""
    staged(machine, *EVERYBODY, splits=(1, 1))
    machine.store_calls("donor", 0, 1, 1)
    machine.deliver_to_others("donor", "decode")
    machine.store_calls("prefill", 0, 1, 1)
    machine.claim(0, "prefill")
    machine.save(0, GEOMETRY.num_layers)
    machine.end(0, "prefill", drain=True)
    machine.release(0)
    machine.deliver("prefill")
    machine.deliver("donor")
    machine.claim(0, "decode")
    assert machine.attempts[0].claims, "the decode side has committed"


def test_transfers_take_turns_in_a_donor_window(machine: ThreeMovers) -> None:
    """Each waits for one slot at a time: a second transfer does not wait for all of the first."""
    for choice in range(2):
        machine.begin(progress=1, splits=DONOR_READS, hits=3, missing=6)
        machine.go_on(choice, EVERYBODY, dies=False)
    donor, (first, _) = machine.trio.donor, machine.attempts
    order = []
    while donor.storage.open_tasks:
        (task,) = donor.storage.open_tasks
        assert isinstance(task.work, ReadBlock)
        order.append("first" if task.work.hash in first.prompt.hashes else "second")
        machine.store_calls("donor", 0, 1, 1)
        machine.deliver("donor")
    assert order == ["first", "first", "second", "first", "second", "second"]


def test_a_side_that_ends_waits_for_its_donor(machine: ThreeMovers) -> None:
    """Slots that a donor's push is on its way to are kept; asked, the donor reads no more."""
    staged(machine, *EVERYBODY, splits=DONOR_READS)
    prefill, donor = machine.trio.prefill, machine.trio.donor
    machine.store_calls("donor", 0, 1, 1)
    for role in SIDES:
        machine.end(0, role, drain=False)
        machine.deliver(role)
    assert prefill.pool.num_free < NUM_SLOTS
    assert all(transfer.awaits_proof for transfer in prefill.book.transfers)
    machine.deliver("donor")
    machine.deliver("donor")
    assert all(side.all_free for side in machine.trio.sides)
    assert donor.ports.counters.donated_bytes == GEOMETRY.slot_bytes


@pytest.mark.parametrize("dies", [False, True], ids=["router lives", "router lost"])
@pytest.mark.parametrize("roles", [("donor",), SIDES, ("prefill", "donor"), ("decode", "donor")])
def test_lost_messages(machine: ThreeMovers, roles: tuple[str, ...], dies: bool) -> None:
    """Whoever was told to start and whoever was not: asked, a donor that knows nothing says so."""
    staged(machine, *roles, splits=DONOR_READS, dies=dies)
    machine.store_calls("donor", 0, 1, 1)
    for role in SIDES:
        if dies:
            machine._side(role).book.router_lost()
        else:
            machine.end(0, role, drain=False)
    if "donor" in roles:
        assert machine.trio.decode.pool.num_free < NUM_SLOTS
    for _ in range(3):
        for role in EVERYBODY:
            machine.deliver(role)
    assert all(side.all_free for side in machine.trio.sides)


def test_a_donor_ends_with_its_router(machine: ThreeMovers) -> None:
    """Without a router nobody asks it to stop: it stops by itself and tells both sides."""
    staged(machine, *EVERYBODY, splits=DONOR_READS)
    machine.trio.donor.book.router_lost()
    machine.deliver("donor")
    machine.trio.donor.storage.finish_one(0)
    machine.deliver("donor")
    assert machine.trio.donor.all_free
    boot_id = machine.trio.donor.contact.boot_id
    for role in SIDES:
        (transfer,) = machine._side(role).book.transfers
        assert boot_id not in [peer.boot_id for peer in transfer._open_writers()]


def test_a_cut_waits_for_the_donor(machine: ThreeMovers) -> None:
    """The prefill side publishes a shorter hit only when the donor writes nothing beyond it."""
    attempt = staged(machine, *EVERYBODY, splits=(1, 1), missing=0)
    machine.store_calls("donor", 0, 1, 1)  # good, and being pushed
    machine.store_calls("prefill", 0, 1, 1)  # missing: the hit is nothing
    machine.hear()
    assert attempt.hits == 0
    assert attempt.cut_by == {"donor"}
    assert machine.trio.prefill.table.claim(attempt.key) is None
    machine.deliver("donor")
    machine.hear()
    assert machine.trio.prefill.table.claim(attempt.key) is not None
    machine.trio.prefill.book.release(attempt.key)


def test_a_donor_push_of_unknown_outcome_is_no_proof(machine: ThreeMovers) -> None:
    """The side it went to keeps its slots, also after asking; the other one gets its proof."""
    staged(machine, *EVERYBODY, splits=(1, 1))
    prefill, decode, donor = machine.trio.sides
    machine.store_calls("donor", 0, 1, 1)
    notices = [decode_notice(batch.notice) for batch in donor.transport._held]
    assert not any(isinstance(notice, WriterStopped) for notice in notices), "too early"
    connections = donor.ports.peers._current
    donor.transport.disconnect(connections[prefill.contact.boot_id].peer_id)
    machine.trio.spin()
    assert any(isinstance(message, TransferFailed) for message in donor.told)
    machine.end(0, "donor", drain=False)
    machine.deliver("donor")
    assert donor.book.num_open == 0
    for role in SIDES:
        machine.end(0, role, drain=False)
    for _ in range(3):
        for role in EVERYBODY:
            machine._side(role).storage.finish_one(0)
            machine.deliver(role)
    assert donor.all_free
    assert decode.all_free
    assert not prefill.all_free
    for transfer in prefill.book.transfers:
        transfer.on_peer_dead(donor.contact.boot_id)


def test_a_stuck_window_fails_those_who_wait_for_it(machine: ThreeMovers) -> None:
    """All donor slots wait for a dead disk or peer: another transfer does not wait behind them."""
    for choice in range(2):
        machine.begin(progress=1, splits=DONOR_READS, hits=2, missing=6)
        machine.go_on(choice, EVERYBODY, dies=False)
    donor = machine.trio.donor
    donor.book.check_progress()
    assert not donor.book.donor_slots_stuck
    donor.storage.start_one(0)
    donor.storage.stalled = list(donor.storage.open_tasks)
    donor.book.check_progress()
    assert donor.book.donor_slots_stuck
    failed = [message.key for message in donor.told if isinstance(message, TransferFailed)]
    assert sorted(failed) == sorted(attempt.key for attempt in machine.attempts)
    donor.storage.stalled = []
    donor.book.check_progress()
    assert not donor.book.donor_slots_stuck
