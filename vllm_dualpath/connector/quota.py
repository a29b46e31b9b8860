"""What one step may still compute: requests in their order up to a quota of predicted seconds.

Source: the paper's section 6, intra-engine. Knows tokens and seconds, not vLLM.
"""

from __future__ import annotations

from bisect import bisect_right

from vllm_dualpath.profile import FittedCurve

LEAST_CHUNK_TOKENS = 64
"""A shorter piece of a prompt is not worth the weights that a step reads."""


class StepQuota:
    """One step after the other; used by the scheduler's thread only.

    ``block_tokens``: a chunk that does not end its prompt ends at a multiple of it.
    """

    def __init__(self, fitted: FittedCurve, quota_s: float, block_tokens: int) -> None:
        self._curve = fitted.curve
        self._step_quota_s = quota_s - fitted.step_s
        self._block_tokens = block_tokens
        # At least a block, so that rounding down leaves something.
        self._least_tokens = max(LEAST_CHUNK_TOKENS, block_tokens)
        self._left_s = self._step_quota_s
        self._has_chunk = False
        self._is_full = False

    def begin(self) -> None:
        """A new step."""
        self._left_s = self._step_quota_s
        self._has_chunk = self._is_full = False

    def add(self, cached_tokens: int, new_tokens: int) -> None:
        """Count what is computed in any case."""
        self._left_s -= self._curve.seconds(cached_tokens, new_tokens)

    def chunk(self, cached_tokens: int, new_tokens: int) -> int:
        """How many of the next prompt's ``new_tokens`` the step computes; counts them.

        Once a prompt was cut the step takes no other one, so that none overtakes another. The first
        prompt of a step gets a least chunk whatever it costs: the engine never stands still.
        """
        if self._is_full:
            return 0
        fitting = self._fitting(cached_tokens, new_tokens)
        if fitting < new_tokens:
            self._is_full = True
            fitting = self._aligned(cached_tokens, fitting)
            if fitting < self._least_tokens:
                if self._has_chunk:
                    return 0
                fitting = min(new_tokens, self._aligned(cached_tokens, self._least_tokens))
        self._has_chunk = True
        self.add(cached_tokens, fitting)
        return fitting

    def _fitting(self, cached_tokens: int, new_tokens: int) -> int:
        """The most of ``new_tokens`` that the rest of the quota covers, by binary search."""
        counts = range(new_tokens + 1)
        found = bisect_right(
            counts, self._left_s, key=lambda count: self._curve.seconds(cached_tokens, count)
        )
        return max(0, found - 1)

    def _aligned(self, cached_tokens: int, new_tokens: int) -> int:
        """The chunk that ends at the last block boundary before its end."""
        end = (cached_tokens + new_tokens) // self._block_tokens * self._block_tokens
        return max(0, end - cached_tokens)
