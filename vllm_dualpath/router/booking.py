"""A placed request's weight on engines and storage NICs. Every part is taken off once."""

from __future__ import annotations

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


class CacheStay:
    """A prompt in its prefill engine, for the model of that engine's prefix cache. Ends once."""

    def __init__(self, engine: Engine, prompt: Prompt, earlier: EarlierPrompt | None) -> None:
        self._model = engine.prefix_cache
        self._key = prompt.key
        if self._model is not None:
            page = engine.hello.geometry.page_tokens
            # Whole pages; and one that the next turn leaves behind, half full.
            num_tokens = (prompt.num_tokens // page + 2) * page
            self._model.begin(self._key, num_tokens, 0 if earlier is None else earlier.key)

    @property
    def is_doubtful(self) -> bool:
        """Whether what this prompt counts on may be evicted before it is there."""
        return self._model is not None and self._model.is_overcommitted

    def end(self, *, computed: bool) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.end(self._key, computed)


class Booking:
    """From the decision on: the next one must see it. ``release`` takes off what is left."""

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
        self.stay = CacheStay(prefill, prompt, earlier)
        self._engines = {each.engine_id: each for each in (prefill, decode, *donors)}
        self._reads: dict[str, int] = {}
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
