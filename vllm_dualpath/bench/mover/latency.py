"""How soon something that happened is noticed: a peer's put, a finished read."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vllm_dualpath.bench.mover.channel import Child
from vllm_dualpath.bench.mover.puts import LINKS
from vllm_dualpath.bench.mover.shapes import PROBE
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.bench.statistics import percentile

_GAP_S = 0.002
_WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Latency:
    """In microseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, microseconds: list[float]) -> Latency:
        """Of a sample that is not empty."""
        ordered = sorted(microseconds)
        return cls(percentile(ordered, 0.50), percentile(ordered, 0.99))


def measure_notices(count: int, logs: Path, guard: ProcessGuard) -> dict[str, Latency]:
    """From a tiny put's submission to its notice in the peer's poll, both sides asleep before.

    Not pinned, as movers are not: each side has two threads that wake each other.
    """
    result = {}
    children: dict[tuple[str, str], Child] = {}
    with ExitStack() as stack:
        for link, transports in LINKS.items():
            for side in ("initiator", "target"):
                log = logs / f"notices-{link}-{side}.log"
                child = Child(f"ours-{side}", log, guard, None, {"UCX_TLS": transports})
                stack.callback(child.close)
                children[link, side] = child
        for link in LINKS:
            initiator, target = children[link, "initiator"], children[link, "target"]
            initiator.call("connect", target.call("hello"), link == "shm")
            target.send("collect", _WARM_UP + count)
            initiator.call("ping", _WARM_UP + count, _GAP_S)
            result[link] = Latency.of(target.receive()[_WARM_UP:])
    return result


def measure_callbacks(
    count: int, directory: Path, logs: Path, guard: ProcessGuard
) -> tuple[Latency, Latency]:
    """One page-sized block at a time: to its callback, and a plain read of the file."""
    directory.mkdir()
    child = Child("storage", logs / "callbacks.log", guard)
    try:
        child.call("open", str(directory), PROBE.name, 2, 2)
        to_callback, to_return = child.call("latencies", _WARM_UP + count)
        return Latency.of(to_callback[_WARM_UP:]), Latency.of(to_return[_WARM_UP:])
    finally:
        child.close()
        shutil.rmtree(directory, ignore_errors=True)
