"""Which engines computed and decoded which prompts last: what their own caches may still hold.

A belief, not knowledge: engines evict without a word. It decides between engines that are nearly
equally loaded and nothing else, so an error costs nothing but the choice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_dualpath.router.engine import Engine

_MAX_PROMPTS = 1 << 16
_MAX_NEW_BLOCKS = 64
"""A longer turn is not found again: it costs a look for each of its blocks."""


class PrefixMemory:
    """Prompts by the hash of their last full block, the least recently used forgotten first."""

    def __init__(self, max_prompts: int = _MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._engines: OrderedDict[bytes, tuple[Engine, ...]] = OrderedDict()

    def remember(self, block_hashes: Sequence[bytes], engines: tuple[Engine, ...]) -> None:
        """``engines`` have, or will have, these blocks in their caches."""
        if not block_hashes:
            return
        last = block_hashes[-1]
        self._engines[last] = engines
        self._engines.move_to_end(last)
        if len(self._engines) > self._max_prompts:
            self._engines.popitem(last=False)

    def find(self, block_hashes: Sequence[bytes]) -> tuple[tuple[Engine, int], ...]:
        """Engines with the leading blocks of a prompt, and how many: the latest turn's."""
        end = len(block_hashes)
        for index in range(end - 1, max(-1, end - 2 - _MAX_NEW_BLOCKS), -1):
            engines = self._engines.get(block_hashes[index])
            if engines is not None:
                return tuple((engine, index + 1) for engine in engines)
        return ()
