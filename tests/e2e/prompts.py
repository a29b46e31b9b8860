"""Prompts that no other test has: the store of a cluster is shared by all its tests."""

from __future__ import annotations

import random

_NUM_BYTE_TOKENS = 256


def token_ids(name: str, num_tokens: int) -> list[int]:
    """The same ids for the same name; a longer prompt of one name begins with the shorter one."""
    generator = random.Random(name)
    return [generator.randrange(_NUM_BYTE_TOKENS) for _ in range(num_tokens)]
