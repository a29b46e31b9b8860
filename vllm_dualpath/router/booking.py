"""A placed request's weight on engines and storage NICs. Every part is taken off once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_dualpath.plan import ReadPlan
from vllm_dualpath.router.affinity import EarlierPrompt
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.orders import Prompt


class Assignment:
    """A request's weight on one engine, taken off once however often ``release`` is called."""

    def __init__(self, engine: Engine, num_tokens: int, compute_tokens: int = 0) -> None:
        self.engine = engine
        self._num_tokens = num_tokens
        self._compute_tokens = compute_tokens
        self._kv_tokens = 0
        self._open = True
        engine.add_load(1, num_tokens, compute_tokens)

    def take_kv(self) -> None:
        """Its tokens go into the engine's KV cache now."""
        if self._open and self._kv_tokens == 0:
            self._kv_tokens = self._num_tokens
            self.engine.add_load(0, 0, 0, self._kv_tokens)

    def release(self) -> None:
        if self._open:
            self._open = False
            self.engine.add_load(-1, -self._num_tokens, -self._compute_tokens, -self._kv_tokens)


_stays = itertools.count(1)


class CacheStay:
    """A prompt's stay in its prefill engine, for the model of that engine's prefix cache."""

    def __init__(
        self, engine: Engine, num_tokens: int, earlier: EarlierPrompt | None, num_cached: int
    ) -> None:
        """``num_cached``: of the earlier prompt's tokens, those that are not read for this one."""
        self.key = next(_stays)
        self._model = engine.prefix_cache
        self._open = True
        page = engine.hello.geometry.page_tokens
        if self._model is not None:
            earlier_key = 0 if earlier is None else earlier.key
            whole_pages = -(-num_tokens // page) * page
            self._model.begin(self.key, whole_pages, earlier_key, num_cached)

    def arrive(self) -> bool:
        """The leg goes out; whether the engine still holds what the plan left to it."""
        return self._model is None or self._model.arrive(self.key)

    def missed(self) -> None:
        """It did not, though the model had it so."""
        if self._model is not None:
            self._model.missed(self.key)

    def end(self, *, computed: bool) -> None:
        if self._open and self._model is not None:
            self._model.end(self.key, computed)
        self._open = False


class Booking:
    """From the decision on: the next one must see it. ``release`` takes off what is left.

    Reads come on top with ``add_reads``.
    """

    def __init__(
        self,
        prefill: Engine,
        decode: Engine,
        donors: Sequence[Engine],
        plan: ReadPlan,
        prompt: Prompt,
        earlier: EarlierPrompt | None = None,
    ) -> None:
        num_tokens, block_tokens = prompt.num_tokens, prefill.hello.geometry.block_tokens
        hit_tokens = plan.num_hit_blocks * block_tokens
        self.prefill = Assignment(prefill, num_tokens, num_tokens - hit_tokens)
        self.decode = Assignment(decode, num_tokens)
        num_cached = plan.num_cached_blocks * block_tokens
        self.stay = CacheStay(prefill, num_tokens, earlier, num_cached)
        self._engines = {each.engine_id: each for each in (prefill, decode, *donors)}
        self._reads: dict[str, int] = {}

    def add_reads(self, plan: ReadPlan) -> None:
        """The readers are to read their parts. Once."""
        block_tokens = self.prefill.engine.hello.geometry.block_tokens
        for segment in plan.segments:
            tokens = segment.num_blocks * block_tokens
            self._reads[segment.reader] = self._reads.get(segment.reader, 0) + tokens
        for reader, tokens in self._reads.items():
            self._engines[reader].add_reads(tokens)

    @property
    def readers(self) -> tuple[str, ...]:
        """Who has not read its part yet."""
        return tuple(self._reads)

    def reads_done(self, reader: str) -> None:
        """``reader`` reads no more."""
        tokens = self._reads.pop(reader, 0)
        if tokens:
            self._engines[reader].add_reads(-tokens)

    def release(self) -> None:
        for reader in self.readers:
            self.reads_done(reader)
        self.stay.end(computed=False)
        self.prefill.release()
        self.decode.release()
