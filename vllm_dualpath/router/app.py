"""The router as a whole: parts put together, started, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
from collections.abc import Sequence
from typing import Any

import uvloop
from aiohttp import web

from vllm_dualpath.config import RouterConfig
from vllm_dualpath.control.bus import RouterSocket
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.policy import Policy, make_policy
from vllm_dualpath.profile import Profile, load_profile
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.flow import Core
from vllm_dualpath.router.http import Handlers
from vllm_dualpath.router.movers import Movers
from vllm_dualpath.router.placing import Placer
from vllm_dualpath.router.roster import EngineSpeed
from vllm_dualpath.router.telemetry import Telemetry
from vllm_dualpath.router.tokenize import ModelNames, Tokenizer
from vllm_dualpath.router.upstream import Upstream

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 2.0
_GC_ALLOCATIONS = 50_000
_LINGER_MS = 200
"""For the last ``End`` to movers."""


class Router:
    """One router process's parts. ``start``, then ``stop``; both in the same event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._profile = None if config.profile is None else load_profile(config.profile)
        self.cluster = Cluster(_speed_of(config, self._profile))
        self._exit = contextlib.AsyncExitStack()
        self._failed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Listen on both addresses. Raises ``ConfigError`` when one of them is taken."""
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise

    async def stop(self) -> None:
        """Take no more requests, end open transfers, and let go of both addresses."""
        await self._exit.aclose()

    async def run(self) -> None:
        """Serve until cancelled. Raises what ended one of the router's own tasks."""
        assert self._failed is not None, "start the router first"
        await self._failed

    async def _start(self) -> None:
        config = self.config
        self._failed = asyncio.get_running_loop().create_future()
        socket = RouterSocket(config.control, config.keys)
        self._exit.callback(socket.close, _LINGER_MS)
        movers = Movers(socket, self.cluster, config.heartbeat_s, config.deadlines.stuck_warning_s)
        upstream = Upstream(self.cluster)
        self._exit.callback(upstream.close)
        telemetry = Telemetry(self.cluster)
        placer = Placer(self.cluster, _policy_of(config, self._profile), telemetry, config)
        names, tokenizer = ModelNames(upstream), Tokenizer(upstream)
        core = Core(config, self.cluster, movers, upstream, placer, names, tokenizer, telemetry)
        tasks = [*movers.tasks(), asyncio.create_task(upstream.probe_forever())]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        self._exit.push_async_callback(_cancel, tasks)
        await self._listen(Handlers(core).server())
        logger.info(
            "router (%s) serves http://%s, movers at %s", config.mode, config.listen, config.control
        )

    async def _listen(self, server: web.Server) -> None:
        runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        self._exit.push_async_callback(runner.cleanup)
        host, port = _host_and_port(self.config.listen)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as exc:
            taken = exc.errno == errno.EADDRINUSE
            advice = "another process listens there; choose another port" if taken else str(exc)
            raise ConfigError(f"listen {self.config.listen}: cannot listen: {advice}") from exc

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        failed = self._failed
        if task.cancelled() or failed is None or failed.done():
            return
        failed.set_exception(task.exception() or RuntimeError(f"{task.get_name()} ended"))


def run_router(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``ConfigError`` when the router cannot start."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: RouterConfig) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    router = Router(config)
    await router.start()
    # Requests leave few cycles behind; what is there now stays, and need not be searched again.
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS)
    running = asyncio.create_task(router.run())
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        logger.info("router stops")
    finally:
        await _cancel([running, stopping])
        await router.stop()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _speed_of(config: RouterConfig, profile: Profile | None) -> EngineSpeed:
    """A rate that was given wins over the profile's curve: it is a curve of its own."""
    read_rate = 0.0 if profile is None else profile.read_tokens_per_s
    if config.prefill_tokens_per_s is not None or profile is None or not profile.step.token_s:
        return EngineSpeed(_prefill_rate(config, profile) or 0.0, 0.0, read_rate)
    return EngineSpeed(1 / profile.step.token_s, profile.step.token_pair_s, read_rate)


def _prefill_rate(config: RouterConfig, profile: Profile | None) -> float | None:
    if config.prefill_tokens_per_s is not None or profile is None:
        return config.prefill_tokens_per_s
    return profile.prefill_tokens_per_s


def _policy_of(config: RouterConfig, profile: Profile | None) -> Policy:
    rate = _prefill_rate(config, profile)
    return make_policy(
        config.mode,
        alpha_s=config.alpha_s,
        beta_tokens=None if rate is None else round(config.beta_s * rate),
        split_fraction=config.split_fraction,
        min_segment_blocks=config.min_segment_blocks,
        max_readers=config.max_readers,
        recompute=config.recompute,
        read_past_cache=config.read_past_cache,
    )


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"listen: expected host:port, found {address!r}")
    return host.strip("[]"), int(port)
