"""The policies by name, over the C++ core."""

from __future__ import annotations

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.native import ClusterView, PolicyCore, PolicyParameters, WaitingLine
from vllm_dualpath.policy.base import Decision, PlanRequest, Segment, Verdict

MODES = ("prefill_only", "dual", "split", "pool")

Parameter = float | int | bool | None


class Policy:
    """One policy with its parameters. Used by one thread at a time: it keeps scratch memory."""

    def __init__(self, mode: str, parameters: PolicyParameters) -> None:
        self.mode = mode
        self._core = PolicyCore(parameters)

    def decide(
        self,
        view: ClusterView,
        request: PlanRequest,
        line: WaitingLine | None = None,
        *,
        ignore_load: bool = False,
    ) -> Decision:
        """Place ``request``, the head of ``line`` if others wait.

        With ``ignore_load`` neither beta nor room counts: it has waited long enough.
        """
        verdict, prefill, decode, cached, recompute, segments, read_s = self._core.decide(
            view,
            request.num_tokens,
            request.num_hit_blocks,
            request.block_tokens,
            request.reserve_tokens,
            line,
            ignore_load,
            request.turn,
            request.cached,
        )
        return Decision(Verdict(verdict), prefill, decode, cached, recompute, segments, read_s)

    @property
    def divides_late(self) -> bool:
        """Whether reads are divided, and weigh on the view, when a placed request has its slots:
        what a busy node is planned to read says little of when it will.
        """
        return self._core.divides_late

    def divide(
        self,
        view: ClusterView,
        prefill: int,
        decode: int,
        first_block: int,
        last_block: int,
        block_tokens: int,
    ) -> tuple[Segment, ...]:
        """Who is best to read blocks ``[first_block, last_block)`` now, for a pair of ``view``.

        None of these reads is on the view.
        """
        return self._core.divide(view, prefill, decode, first_block, last_block, block_tokens)


def make_policy(mode: str, **parameters: Parameter) -> Policy:
    """The policy that ``mode`` names, with some of ``PolicyParameters`` changed.

    ``None`` leaves a parameter alone. Raises ``ConfigError`` for a mode or value that is none.
    """
    try:
        chosen = PolicyParameters(mode)
        for name, value in parameters.items():
            if value is not None:
                setattr(chosen, name, value)
        return Policy(mode, chosen)
    except (AttributeError, TypeError, ValueError) as exc:
        raise ConfigError(f"policy: {exc}") from exc
