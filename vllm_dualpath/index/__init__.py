"""Which blocks are stored: the owner's ``HitIndex``, and a set that other processes can read."""

from vllm_dualpath.index.hits import HitIndex
from vllm_dualpath.index.shared import SharedIndex, SharedIndexReader, SharedIndexWriter

__all__ = ["HitIndex", "SharedIndex", "SharedIndexReader", "SharedIndexWriter"]
