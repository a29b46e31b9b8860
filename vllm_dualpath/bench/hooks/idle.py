"""What a server with the connector loses against plain vLLM when there is nothing to load or store.

Both servers run all the time, bound to the same core, and get the same batches of requests in turn:
only one of them has work at any time. No prompt repeats, and the one with the connector has no
slots to store anything from, so nothing is loaded and nothing is moved.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from vllm_dualpath.bench.completion import complete, open_session
from vllm_dualpath.bench.mover.pairing import Ratio, in_turn, paired_ratio
from vllm_dualpath.bench.servers import PlainServer, SingleEngine
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model

MODEL = TinyModel(layers=8, hidden=256, heads=8, kv_heads=4, head_dim=32, dtype="bfloat16")
_MODEL_NAME = "tiny"
_ENGINE_ARGS = (
    *("--served-model-name", _MODEL_NAME),
    *("--max-model-len", "1024"),
    *("--max-num-seqs", "16"),
    "--disable-uvicorn-access-log",
)
_EXTRA_CONFIG = {"persist_slots": 0, "staging_bytes": 64 << 20}
_NUM_WARM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: requests that run together, with prompts nobody saw before."""

    num_requests: int = 8
    prompt_tokens: int = 96
    output_tokens: int = 24


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What one batch took, and what CPU time of all threads of the server."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class IdleOverhead:
    """Batches of both servers, round by round."""

    plain: tuple[BatchCost, ...]
    connector: tuple[BatchCost, ...]

    @property
    def ratio(self) -> Ratio:
        """The time of a batch with the connector by that without it."""
        return paired_ratio([b.seconds for b in self.connector], [b.seconds for b in self.plain])

    @property
    def cpu_ratio(self) -> Ratio:
        """As ``ratio``, of CPU time: what others do on the machine is not in it."""
        return paired_ratio([b.cpu_s for b in self.connector], [b.cpu_s for b in self.plain])


@dataclass(frozen=True, slots=True)
class _Served:
    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time of all threads that the server has now."""
        ran_ns = 0
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            ran_ns += int((thread / "schedstat").read_text("ascii").split()[0])
        return ran_ns / 1e9


def measure_idle(
    num_rounds: int, advance: Callable[[], None] = lambda: None, load: Load | None = None
) -> IdleOverhead:
    """Start both servers, run ``num_rounds`` batches on each. Raises ``LaunchError``.

    ``advance`` is called after each round. The servers run on the first core this process may use,
    the client on the last.
    """
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="dualpath-idle-") as name:
        directory = Path(name)
        (directory / "store").mkdir()
        model = directory / "model"
        write_tiny_model(MODEL, model)
        options = {"engine_args": _ENGINE_ARGS}
        plain = PlainServer(model, log_dir=directory / "plain", **options)
        ours = SingleEngine(
            model,
            f"file://{directory}/store",
            _EXTRA_CONFIG,
            log_dir=directory / "ours",
            **options,
        )
        try:
            plain.launch()
            ours.launch()
            plain.wait_ready()
            ours.wait_ready()
            servers = [_Served(each.url, each.server.process.pid) for each in (plain, ours)]
            for server in servers:
                _bind(server.pid, cores[:1])
            os.sched_setaffinity(0, cores[-1:])
            return asyncio.run(_alternate(servers, num_rounds, load or Load(), advance))
        finally:
            os.sched_setaffinity(0, cores)
            ours.stop()
            plain.stop()


def _bind(pid: int, cores: list[int]) -> None:
    """Bind every thread of a running server; the mover beside it is another process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


async def _alternate(
    servers: Sequence[_Served], num_rounds: int, load: Load, advance: Callable[[], None]
) -> IdleOverhead:
    costs: dict[str, list[BatchCost]] = {server.url: [] for server in servers}
    async with open_session() as session:
        for round_idx in range(_NUM_WARM_ROUNDS + num_rounds):
            # Other prompts each round: none is in a prefix cache. The same for both servers.
            prompts = _prompts(load, round_idx)
            for server in in_turn(servers, round_idx):
                cost = await _batch(session, server, prompts, load.output_tokens)
                if round_idx >= _NUM_WARM_ROUNDS:
                    costs[server.url].append(cost)
            if round_idx >= _NUM_WARM_ROUNDS:
                advance()
    plain, ours = (tuple(costs[server.url]) for server in servers)
    return IdleOverhead(plain, ours)


async def _batch(
    session: aiohttp.ClientSession, server: _Served, prompts: list[list[int]], num_tokens: int
) -> BatchCost:
    started_s, cpu_s = time.perf_counter(), server.cpu_s()
    await asyncio.gather(
        *(complete(session, server.url, _MODEL_NAME, prompt, num_tokens) for prompt in prompts)
    )
    return BatchCost(time.perf_counter() - started_s, server.cpu_s() - cpu_s)


def _prompts(load: Load, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, MODEL.vocab) for _ in range(load.prompt_tokens)]
        for _ in range(load.num_requests)
    ]
