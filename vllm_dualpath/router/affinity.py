"""Which engines computed and decoded which prompts last: what their own caches may still hold.

Whether a prefill engine holds a prompt is said by the model of its cache (``Engine.prefix_cache``);
of a decode engine it is a belief, which decides between nearly equal ones and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dualpath.router.engine import Engine

_MAX_PROMPTS = 1 << 16
_MAX_NEW_BLOCKS = 1024
"""A longer turn is not found again: it costs a look for each of its blocks."""
_ENDS = 2
"""A prompt is found by so many of its last blocks: what a chat template puts at its very end may
be another text in the next turn.
"""


@dataclass(frozen=True, slots=True)
class EarlierPrompt:
    """A prompt that shares leading blocks with another one."""

    key: int
    """Of its stay in its prefill engine, in ``Engine.prefix_cache``."""
    prefill: Engine
    decode: Engine
    num_blocks: int
    """The blocks that both have."""


class PrefixMemory:
    """Prompts by the hashes of their last full blocks, the least recently used forgotten first."""

    def __init__(self, max_prompts: int = _MAX_PROMPTS) -> None:
        self._max_ends = _ENDS * max_prompts
        self._found: OrderedDict[bytes, tuple[int, Engine, Engine]] = OrderedDict()

    def remember(
        self, block_hashes: Sequence[bytes], key: int, prefill: Engine, decode: Engine
    ) -> None:
        """These engines have a prompt in their caches."""
        for block_hash in block_hashes[-_ENDS:]:
            self._found[block_hash] = key, prefill, decode
            self._found.move_to_end(block_hash)
        while len(self._found) > self._max_ends:
            self._found.popitem(last=False)

    def find(self, block_hashes: Sequence[bytes]) -> EarlierPrompt | None:
        """The latest turn before a prompt."""
        end = len(block_hashes)
        for index in range(end - 1, max(-1, end - 2 - _MAX_NEW_BLOCKS), -1):
            found = self._found.get(block_hashes[index])
            if found is not None:
                return EarlierPrompt(*found, index + 1)
        return None
