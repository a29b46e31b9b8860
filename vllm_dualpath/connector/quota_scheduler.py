"""vLLM's schedulers with a quota of predicted attention time a step, for prefill engines.

``--scheduler-cls vllm_dualpath.connector.quota_scheduler.AsyncQuotaScheduler``, or
``QuotaScheduler`` where vLLM does not schedule asynchronously. Without a ``profile`` in
``kv_connector_extra_config`` they schedule exactly as vLLM does.

The seam is ``_reserve_prefill_lookahead``: vLLM calls it for every running and every waiting
request with the final number of tokens it is about to give it, local and external hits known, and
lets it take tokens away; none means "not in this step". So nothing of vLLM's scheduling is repeated
here. A token budget worked out before a step would need a second look-up of every prefix, and be
wrong whenever vLLM passes over a request.
"""

from __future__ import annotations

import dis
import inspect
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dualpath.config import EngineConfig, parse_engine_config
from vllm_dualpath.connector.plugin import CONNECTOR_NAME
from vllm_dualpath.connector.quota import StepQuota
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.dualpath.quota")

_SEAM = "_reserve_prefill_lookahead"
_PARAMETERS = ["self", "request", "num_computed_tokens", "num_new_tokens"]
_NUM_CALLS = 2
"""For running and for waiting requests."""


class QuotaScheduler(Scheduler):
    """See the module's docstring. Raises ``ConfigError`` at start."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_mode(type(self), vllm_config)
        config = _engine_config(vllm_config)
        if config is not None and config.profile is not None:
            check_seam(Scheduler)
            check_chunking(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._quota = None if config is None else _make_quota(config, self.block_size)
        if self._quota is None:
            logger.warning("no profile: requests are scheduled as vLLM does, without a quota")

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._quota is not None:
            self._quota.begin()
        return super().schedule(*args, **kwargs)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        allowed = int(
            super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        )
        quota = self._quota
        if quota is None or allowed == 0:
            return allowed
        # A decode, perhaps with drafts, is not cut: vLLM sizes its graphs by whole ones. Nor are
        # prompts with images: their encoder was given room for this chunk.
        is_decode = request.num_tokens - num_computed_tokens <= 1
        if is_decode or request.has_encoder_inputs:
            quota.add(num_computed_tokens, allowed)
            return allowed
        chunk = quota.chunk(num_computed_tokens, allowed)
        if chunk == allowed:
            return allowed
        # The shorter chunk has to keep its distance from the prompt's end too.
        return int(super()._reserve_prefill_lookahead(request, num_computed_tokens, chunk))


class AsyncQuotaScheduler(QuotaScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def check_mode(scheduler: type[Scheduler], vllm_config: VllmConfig) -> None:
    """Refuse a scheduler of the wrong kind: vLLM takes any, and its engine counts on its own."""
    is_async = bool(vllm_config.scheduler_config.async_scheduling)
    if issubclass(scheduler, AsyncScheduler) != is_async:
        name = (AsyncQuotaScheduler if is_async else QuotaScheduler).__name__
        raise ConfigError(
            f"--scheduler-cls: vLLM schedules {'' if is_async else 'not '}asynchronously here:"
            f" expected {__name__}.{name}, found {scheduler.__qualname__}"
        )


def check_seam(scheduler: type[Scheduler]) -> None:
    """Refuse a vLLM that does not ask ``_reserve_prefill_lookahead`` for each request."""
    method = getattr(scheduler, _SEAM, None)
    parameters = [] if method is None else list(inspect.signature(method).parameters)
    calls = [each for each in dis.get_instructions(scheduler.schedule) if each.argval == _SEAM]
    if parameters != _PARAMETERS or len(calls) != _NUM_CALLS:
        raise ConfigError(
            f"--scheduler-cls: this vLLM's scheduler has no place for a quota: expected"
            f" {_SEAM}({', '.join(_PARAMETERS)}) called {_NUM_CALLS} times by schedule(), found"
            f" ({', '.join(parameters)}) called {len(calls)} times; use vLLM 0.32, or leave out"
            " --scheduler-cls and kv_connector_extra_config.profile"
        )


def check_chunking(vllm_config: VllmConfig) -> None:
    """Refuse to cut prompts where vLLM was told not to."""
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ConfigError(
            "kv_connector_extra_config.profile: a quota needs chunked prefill, found"
            " --no-enable-chunked-prefill; turn it on or leave out the profile"
        )


def check_quota_is_used(vllm_config: VllmConfig) -> None:
    """Refuse a ``profile`` that no scheduler of ours would read."""
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    if not issubclass(scheduler, QuotaScheduler):
        is_async = bool(vllm_config.scheduler_config.async_scheduling)
        name = (AsyncQuotaScheduler if is_async else QuotaScheduler).__name__
        raise ConfigError(
            "kv_connector_extra_config.profile: only a quota scheduler reads it: expected"
            f" --scheduler-cls {__name__}.{name}, found {scheduler.__qualname__}"
        )


def _engine_config(vllm_config: VllmConfig) -> EngineConfig | None:
    """Our connector's configuration, also where it is one of several."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return None
    extra = transfer.kv_connector_extra_config
    if transfer.kv_connector == CONNECTOR_NAME:
        return parse_engine_config(extra)
    for child in extra.get("connectors", ()):
        if child.get("kv_connector") == CONNECTOR_NAME:
            return parse_engine_config(child.get("kv_connector_extra_config", {}))
    return None


def _make_quota(config: EngineConfig, block_tokens: int) -> StepQuota | None:
    if config.profile is None:
        return None
    attention = load_profile(config.profile).attention
    logger.info(
        "a step is filled up to %.0f ms of attention, as %s predicts it",
        1e3 * config.quota_s,
        config.profile,
    )
    return StepQuota(attention, config.quota_s, block_tokens)
