"""Where a request goes: its plan by policy, and what to try after an attempt failed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_dualpath.blocks import chain_hashes, chain_root, prompt_digest
from vllm_dualpath.plan import ReadPlan, Segment
from vllm_dualpath.policy import PlanRequest, Policy
from vllm_dualpath.router.cluster import Cluster, PairGroup
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.telemetry import Telemetry
from vllm_dualpath.router.transfer import Prompt, Transfer

MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """Two engines and a plan for one prompt."""

    prompt: Prompt
    plan: ReadPlan
    prefill: Engine
    decode: Engine


class Placer:
    """Asks the policy, and knows the order of fallbacks."""

    def __init__(self, cluster: Cluster, policy: Policy, telemetry: Telemetry) -> None:
        self._cluster = cluster
        self._policy = policy
        self._telemetry = telemetry

    def first(
        self, token_ids: Sequence[int], cache_salt: str | None, num_releases: int
    ) -> Placement | None:
        """The policy's placement in the first group of engines that can take the prompt.

        Raises ``ValueError`` for token ids that no model has.
        """
        for group in self._cluster.pair_groups():
            placement = self._in_group(group, token_ids, cache_salt, num_releases, use_hits=True)
            if placement is not None:
                return placement
        return None

    def after(
        self,
        failed: Transfer,
        attempt: int,
        token_ids: Sequence[int],
        cache_salt: str | None,
    ) -> Placement | None:
        """The other reader alone, then no hits; on other engines where one of the pair is gone.

        ``None`` when a decode engine alone is what is left.
        """
        num_hits = failed.plan.num_hit_blocks
        use_hits = attempt == 1 and num_hits > 0
        failure = failed.failure
        if failure is None or not failure.worth_another:
            return None
        if num_hits == 0 and attempt > 1:
            return None
        placement = Placement(failed.prompt, failed.plan, failed.prefill, failed.decode)
        if not (failed.prefill.usable and failed.decode.usable):
            return self._elsewhere(token_ids, cache_salt, failed.prompt.num_releases, use_hits)
        if not use_hits:
            return replace(placement, plan=ReadPlan(0, ()))
        reader = _other_reader(failed)
        return replace(placement, plan=ReadPlan(num_hits, (Segment(reader, 0, num_hits),)))

    def _elsewhere(
        self, token_ids: Sequence[int], cache_salt: str | None, num_releases: int, use_hits: bool
    ) -> Placement | None:
        for group in self._cluster.pair_groups():
            placement = self._in_group(group, token_ids, cache_salt, num_releases, use_hits)
            if placement is not None:
                return placement
        return None

    def _in_group(
        self,
        group: PairGroup,
        token_ids: Sequence[int],
        cache_salt: str | None,
        num_releases: int,
        use_hits: bool,
    ) -> Placement | None:
        snapshot = self._cluster.snapshot(group)
        if len(token_ids) > max(load.capacity_tokens for load in snapshot.prefill):
            return None  # before hashing what may be millions of tokens
        hello = self._engine(snapshot.prefill[0].engine_id).hello
        block_tokens = hello.geometry.block_tokens
        root = hello.root if cache_salt is None else chain_root(hello.root, cache_salt)
        hashes = chain_hashes(root, token_ids, block_tokens)
        num_hits = 0
        if use_hits:
            # At least one token is computed: the prefill leg has to sample something.
            usable = hashes[: (len(token_ids) - 1) // block_tokens]
            index = self._cluster.stores.state(hello).index
            num_hits = index.longest_prefix(usable, time.time())
        request = PlanRequest(len(token_ids), num_hits, block_tokens)
        with self._telemetry.decision_seconds.time():
            decision = self._policy.decide(snapshot, request)
        if decision is None:
            return None
        prompt = Prompt(
            len(token_ids), root, tuple(hashes), prompt_digest(root, token_ids), num_releases
        )
        return Placement(
            prompt,
            decision.plan,
            self._engine(decision.prefill_engine),
            self._engine(decision.decode_engine),
        )

    def _engine(self, engine_id: str) -> Engine:
        engine = self._cluster.by_id(engine_id)
        assert engine is not None, f"policy chose {engine_id}, which is not in its snapshot"
        return engine


def _other_reader(failed: Transfer) -> str:
    """The reader to try: the one that did not fail, or was not asked before."""
    readers = {segment.reader for segment in failed.plan.segments}
    pair = (failed.prefill.engine_id, failed.decode.engine_id)
    blamed = failed.failure.engine_id if failed.failure is not None else ""
    suspects = readers if len(readers) == 1 else {blamed}
    return next(engine_id for engine_id in pair if engine_id not in suspects)
