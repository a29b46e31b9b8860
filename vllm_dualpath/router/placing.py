"""Where a request goes: its place by policy, and what to try after an attempt failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_dualpath.blocks import chain_root, hash_prompt
from vllm_dualpath.config import RouterConfig
from vllm_dualpath.plan import ReadPlan, Segment
from vllm_dualpath.policy import PlanRequest, Policy, Verdict, WaitingLine
from vllm_dualpath.policy import Segment as PolicySegment
from vllm_dualpath.router.affinity import EarlierPrompt, PrefixMemory
from vllm_dualpath.router.booking import Booking
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.failure import EVICTED
from vllm_dualpath.router.orders import Prompt
from vllm_dualpath.router.roster import GroupView, PairGroup
from vllm_dualpath.router.telemetry import Telemetry
from vllm_dualpath.router.transfer import Transfer
from vllm_dualpath.router.waiting import Line, NotNow

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """Two engines, further readers and a plan for one prompt, booked on them."""

    prompt: Prompt
    plan: ReadPlan
    prefill: Engine
    decode: Engine
    donors: tuple[Engine, ...]
    booking: Booking
    is_retry: bool
    """Another reader is tried: who reads is fixed."""


class Placer:
    """Asks the policy, lets requests wait for it, and knows the order of fallbacks."""

    def __init__(
        self, cluster: Cluster, policy: Policy, telemetry: Telemetry, config: RouterConfig
    ) -> None:
        self._cluster = cluster
        self._policy = policy
        self._telemetry = telemetry
        self._config = config
        self._lines: dict[PairGroup, Line[Placement]] = {}
        self._memory = PrefixMemory()
        cluster.on_room = self._wake
        telemetry.num_waiting = lambda: sum(len(line) for line in self._lines.values())

    async def first(
        self, token_ids: Sequence[int], cache_salt: str | None, num_releases: int
    ) -> Placement | None:
        """The policy's placement in the first group of engines that can ever take the prompt.

        Waits in that group's line while none takes it now, at most ``queue_wait_s``; after that
        load counts no more. Raises ``ValueError`` for token ids that no model has.
        """
        for view in self._cluster.roster.views:
            if len(token_ids) > view.max_request_tokens:
                continue  # before hashing what may be millions of tokens
            prompt = _prompt_for(view, token_ids, cache_salt, num_releases)
            placement = await self._in_line(view.group, prompt)
            if placement is not None:
                return placement
        return None

    def divide_reads(self, placement: Placement) -> ReadPlan:
        """Who reads what, now that both sides have slots; from here on it weighs on the readers."""
        if not self._policy.divides_late:
            return placement.plan
        plan = placement.plan if placement.is_retry else self._divided(placement)
        placement.booking.add_reads(plan)
        return plan

    def _divided(self, placement: Placement) -> ReadPlan:
        plan = placement.plan
        for view in self._cluster.roster.views:
            prefill = placement.prefill.index_in(view.view)
            decode = placement.decode.index_in(view.view)
            if prefill is None or decode is None:
                continue
            first, last = plan.num_cached_blocks, plan.num_hit_blocks
            block_tokens = view.hello.geometry.block_tokens
            with self._telemetry.decision_seconds.time():
                parts = self._policy.divide(view.view, prefill, decode, first, last, block_tokens)
            return ReadPlan(last, _segments(view, parts), first)
        return plan  # one of the two serves no more

    def computed(self, transfer: Transfer) -> None:
        """The prefill leg has returned: both engines have the prompt, or will have it."""
        stay = transfer.booking.stay
        stay.end(computed=True)
        if transfer.prefill.lost.is_set():
            return
        hashes = transfer.prompt.block_hashes
        self._memory.remember(hashes, stay.key, transfer.prefill, transfer.decode)

    def after(
        self,
        failed: Transfer,
        attempt: int,
        token_ids: Sequence[int],
        cache_salt: str | None,
    ) -> Placement | None:
        """The other reader alone, then no hits; decided anew where one of the pair is gone, or does
        not hold any more what nobody read.

        ``None`` when a decode engine alone is what is left.
        """
        num_hits = failed.plan.num_hit_blocks
        use_hits = attempt == 1 and num_hits > 0
        failure = failed.failure
        if failure is None or not failure.worth_another:
            return None
        if num_hits == 0 and attempt > 1:
            return None
        evicted = failure.reason == EVICTED
        if evicted or not (failed.prefill.usable and failed.decode.usable):
            return self._elsewhere(token_ids, cache_salt, failed.prompt.num_releases, use_hits)
        plan = ReadPlan(0, ())
        if use_hits:
            plan = ReadPlan(num_hits, (Segment(_other_reader(failed), 0, num_hits),))
        booking = Booking(failed.prefill, failed.decode, (), plan, failed.prompt)
        return self._placed(failed.prompt, plan, booking, (), is_retry=True)

    def _elsewhere(
        self, token_ids: Sequence[int], cache_salt: str | None, num_releases: int, use_hits: bool
    ) -> Placement | None:
        # It has waited in a line once.
        for view in self._cluster.roster.views:
            if len(token_ids) <= view.max_request_tokens:
                prompt = _prompt_for(view, token_ids, cache_salt, num_releases)
                placement = self._decide(view, prompt, use_hits=use_hits, ignore_load=True)
                if isinstance(placement, Placement):
                    return placement
        return None

    # --- waiting ---

    async def _in_line(self, group: PairGroup, prompt: Prompt) -> Placement | None:
        line = self._lines.get(group)
        if line is None:
            line = self._lines[group] = Line()
        started_s = time.monotonic()
        try:
            return await line.place(
                prompt.num_tokens,
                lambda waiting: self._attempt(group, prompt, waiting),
                lambda placement: placement.booking.release(),
                self._config.queue_wait_s,
            )
        except TimeoutError:
            logger.info(
                "a request waited for %.1f s: load counts no more for it", _since(started_s)
            )
            forced = self._attempt(group, prompt, None)
            return None if isinstance(forced, NotNow) else forced
        finally:
            self._telemetry.wait_seconds.observe(_since(started_s))
            # Another line may have taken its place meanwhile.
            if not line and self._lines.get(group) is line:
                del self._lines[group]

    def _attempt(
        self, group: PairGroup, prompt: Prompt, line: WaitingLine | None
    ) -> Placement | NotNow | None:
        view = self._cluster.roster.view_of.get(group)
        if view is None:
            return None
        return self._decide(view, prompt, line=line, ignore_load=line is None)

    def _wake(self) -> None:
        for line in self._lines.values():
            line.wake()

    # --- deciding ---

    def _decide(
        self,
        view: GroupView,
        prompt: Prompt,
        *,
        use_hits: bool = True,
        line: WaitingLine | None = None,
        ignore_load: bool = False,
    ) -> Placement | NotNow | None:
        block_tokens = view.hello.geometry.block_tokens
        num_hits = self._num_hits(view, prompt, block_tokens) if use_hits else 0
        earlier = self._memory.find(prompt.block_hashes)
        cached = [] if earlier is None else _cached(view, earlier, prompt.num_tokens)
        request = PlanRequest(prompt.num_tokens, num_hits, block_tokens, cached=cached)
        with self._telemetry.decision_seconds.time():
            decision = self._policy.decide(view.view, request, line, ignore_load=ignore_load)
        if decision.verdict is Verdict.IMPOSSIBLE:
            return None
        if decision.verdict is not Verdict.PLACED:
            return NotNow.NOT_NOW
        prefill, decode = view.engines[decision.prefill], view.engines[decision.decode]
        readers = (view.engines[reader] for reader, _, _ in decision.segments)
        donors = tuple(reader for reader in readers if reader not in (prefill, decode))
        num_read_until = num_hits - decision.num_recompute_blocks
        segments = _segments(view, decision.segments)
        plan = ReadPlan(num_read_until, segments, decision.num_cached_blocks)
        booking = Booking(prefill, decode, donors, plan, prompt, earlier)
        return self._placed(prompt, plan, booking, donors, is_retry=False)

    def _placed(
        self,
        prompt: Prompt,
        plan: ReadPlan,
        booking: Booking,
        donors: tuple[Engine, ...],
        *,
        is_retry: bool,
    ) -> Placement:
        if not self._policy.divides_late:
            booking.add_reads(plan)
        prefill, decode = booking.prefill.engine, booking.decode.engine
        return Placement(prompt, plan, prefill, decode, donors, booking, is_retry)

    def _num_hits(self, view: GroupView, prompt: Prompt, block_tokens: int) -> int:
        """Asked anew at each attempt: while a request waited, blocks came and went."""
        # At least one token is computed: the prefill leg has to sample something.
        usable = prompt.block_hashes[: (prompt.num_tokens - 1) // block_tokens]
        index = self._cluster.stores.state(view.hello).index
        return index.longest_prefix(usable, time.time())


def _since(started_s: float) -> float:
    return time.monotonic() - started_s


def _prompt_for(
    view: GroupView, token_ids: Sequence[int], cache_salt: str | None, num_releases: int
) -> Prompt:
    hello = view.hello
    root = hello.root if cache_salt is None else chain_root(hello.root, cache_salt)
    hashes, digest = hash_prompt(root, token_ids, hello.geometry.block_tokens)
    return Prompt(len(token_ids), root, tuple(hashes), digest, num_releases)


def _cached(view: GroupView, earlier: EarlierPrompt, num_tokens: int) -> list[tuple[int, int]]:
    """Engines of ``view`` with leading blocks of a prompt; a prefill engine only if it is sure."""
    sure = [earlier.decode]
    model = earlier.prefill.prefix_cache
    shared_tokens = earlier.num_blocks * view.hello.geometry.block_tokens
    if model is not None and model.holds(earlier.key, shared_tokens, num_tokens):
        sure.append(earlier.prefill)
    places = (engine.index_in(view.view) for engine in sure)
    return [(index, earlier.num_blocks) for index in places if index is not None]


def _segments(view: GroupView, parts: Iterable[PolicySegment]) -> tuple[Segment, ...]:
    return tuple(
        Segment(view.engines[reader].engine_id, first, last) for reader, first, last in parts
    )


def _other_reader(failed: Transfer) -> str:
    """The reader to try: the one that did not fail, or was not asked before."""
    readers = {segment.reader for segment in failed.plan.segments}
    pair = (failed.prefill.engine_id, failed.decode.engine_id)
    blamed = failed.failure.engine_id if failed.failure is not None else ""
    suspects = readers if len(readers) == 1 else {blamed}
    return next(engine_id for engine_id in pair if engine_id not in suspects)
