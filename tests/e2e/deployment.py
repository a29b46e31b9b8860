"""One prefill and one decode engine behind a router, with what tests ask of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard
from vllm_dualpath.bench.tiny_model import TinyModel

from .client import Answer, complete, complete_all, greedy
from .counters import Counters, counters_of, scrape
from .models import COMMON_ARGS, block_file_bytes

DRAIN_S = 10.0

_START_S = 300.0
_POLL_S = 0.05
_HEARTBEAT_S = 1.0
_STAGING_BYTES = 64 << 20
_MOVER_GAUGES = ("slots_used", "slots_quarantined", "donor_slots_used", "open_transfers")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Poll ``condition``; fail with ``what`` after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(_POLL_S)


class Deployment:
    """A ``LocalCluster`` of one engine a role."""

    def __init__(
        self,
        model: TinyModel,
        model_dir: Path,
        store: Path,
        log_dir: Path,
        *,
        engine_args: Sequence[str],
        extra_config: Mapping[str, object] | None = None,
        router_args: Sequence[str] = (),
        mode: str = "split",
    ) -> None:
        self.file_bytes = block_file_bytes(model)
        self.store = store
        self.spec = ClusterSpec(
            model=model_dir,
            store=f"file://{store}",
            mode=mode,  # type: ignore[arg-type]
            engine_args=(*COMMON_ARGS, *engine_args),
            # Tests know which side reads which block; measured rates would move that.
            router_args=(
                *("--heartbeat-s", str(_HEARTBEAT_S), "--split-fraction", "0.5"),
                *("--short-prompt-tokens", "0"),
                *router_args,
            ),
            extra_config={"staging_bytes": _STAGING_BYTES, **(extra_config or {})},
            log_dir=log_dir,
            start_timeout_s=_START_S,
        )
        self.cluster = LocalCluster(self.spec)
        self._guard = ProcessGuard()

    # --- life ---

    def __enter__(self) -> Deployment:
        self.cluster.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.stop()
        self._guard.close()

    def restart_all(self, extra_config: Mapping[str, object]) -> None:
        """Stop every process and start new ones over the same store."""
        self.cluster.stop()
        merged = {**self.spec.extra_config, **extra_config}
        self.spec = replace(self.spec, extra_config=merged)
        self.cluster = LocalCluster(self.spec)
        self.cluster.__enter__()

    @property
    def control(self) -> str:
        """Where movers find the router."""
        command = self.cluster.router.command
        return command[command.index("--control") + 1]

    def replace_router(self, mode: str, *args: str) -> None:
        """SIGKILL the router, start another one on its ports, wait until both engines are in it."""
        os.kill(self.cluster.router.pid, signal.SIGKILL)
        self.cluster.router.stop()
        command = list(self.cluster.router.command)
        first = command.index("--mode")
        command[first:] = ["--mode", mode, *self.spec.router_args, *args]
        log_path = self.cluster.router.log_path
        self.cluster.router = ManagedProcess("router", command, log_path, self._guard)
        self.cluster.router.start()
        self.wait_registered()

    def wait_registered(self) -> None:
        """Wait until the router lists both engines, serving, with the whole store known."""
        wait_until(self._registered, "both engines at the router", 60.0)

    def _registered(self) -> bool:
        with suppress(OSError, ValueError):
            status = self.cluster.status()
            serving = {engine["role"] for engine in status["engines"] if engine["serving"]}
            return len(serving) == 2 and not status["index"]["snapshots_pending"]
        return False

    # --- requests ---

    @property
    def url(self) -> str:
        """The router's."""
        return self.cluster.url

    def engine_url(self, role: str) -> str:
        return next(engine.url for engine in self.cluster.engines if engine.role == role)

    def ask(self, prompt: Sequence[int], num_tokens: int, **options: object) -> Answer:
        """A greedy completion through the router."""
        return complete(self.url, greedy(prompt, num_tokens, **options))

    def ask_all(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Answer]:
        """Several at once."""
        return complete_all(self.url, [greedy(prompt, num_tokens) for prompt in prompts])

    # --- state ---

    def status(self, role: str) -> dict[str, Any]:
        """The router's view of one engine."""
        engines = self.cluster.status()["engines"]
        return next(engine for engine in engines if engine["role"] == role)

    def transfers(self) -> list[str]:
        """The states of the open transfers."""
        return [str(transfer["state"]) for transfer in self.cluster.status()["transfers"]]

    def mover_pid(self, role: str) -> int:
        return int(self.status(role)["pid"])

    def wait_mover_replaced(self, role: str, old_pid: int) -> None:
        """Wait until the router knows another mover of this role than ``old_pid``."""

        def replaced() -> bool:
            engines = self.cluster.status()["engines"]
            return any(each["role"] == role and each["pid"] != old_pid for each in engines)

        wait_until(replaced, f"a new {role} mover", 30.0)
        self.wait_registered()

    def counters(self, role: str) -> Counters:
        """What one engine has counted, once nothing is open."""
        return counters_of(
            scrape(self.engine_url(role)), self.status(role)["stats"], self.file_bytes
        )

    def drained(self) -> tuple[Counters, Counters]:
        """Wait until all is clean; returns the counters of the prefill and the decode engine."""
        self.expect_clean()
        return self.counters("prefill"), self.counters("decode")

    def expect_clean(self) -> None:
        """Fail unless all slots, blocks and requests are free within ``DRAIN_S``."""
        deadline_s = time.monotonic() + DRAIN_S
        while leaks := self._leaks():
            assert time.monotonic() < deadline_s, f"in use {DRAIN_S:.0f} s after: {leaks}"
            time.sleep(_POLL_S)

    def _leaks(self) -> dict[str, object]:
        status = self.cluster.status()
        found: dict[str, object] = {"router.transfers": status["transfers"]}
        for engine in status["engines"]:
            for name in _MOVER_GAUGES:
                found[f"{engine['engine_id']}.{name}"] = engine["stats"][name]
        for role in ("prefill", "decode"):
            samples = scrape(self.engine_url(role))
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                found[f"{role}.{name}"] = samples.value(f"vllm:{name}")
        found["engines missing"] = max(0, 2 - len(status["engines"]))
        return {name: value for name, value in found.items() if value}

    # --- the store ---

    def block_files(self) -> set[Path]:
        """Every stored block."""
        return {path for path in self.store.glob("*/??/??/*") if path.is_file()}
