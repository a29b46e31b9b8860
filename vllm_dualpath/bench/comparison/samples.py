"""NIC counters and CPU time of a run, sampled by a thread."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from vllm_dualpath.bench.mover.machine import cpu_times
from vllm_dualpath.bench.testbed.counters import Nic, NicBytes, NicCounters
from vllm_dualpath.errors import LaunchError

PERIOD_S = 0.2

_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_JOIN_S = 5.0
# Of ``cpu_times``; what follows these, time of guests, is in the others too.
_IDLE, _IOWAIT, _STEAL = 3, 4, 7
_NUM_STATES = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at one moment; all of them only grow."""

    at_s: float
    """On ``time.perf_counter``'s clock."""
    nics: dict[Nic, NicBytes]
    cpu_busy_s: float
    """Of all cores together, without what the hypervisor gave to others."""
    cpu_steal_s: float


class Sampler:
    """Samples from entry to exit; ``samples`` may be read after. One thread of its own."""

    def __init__(self, counters: NicCounters, period_s: float = PERIOD_S) -> None:
        self.samples: list[Sample] = []
        self._counters = counters
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dualpath-sampler")

    def __enter__(self) -> Sampler:
        self.samples.append(self._sample())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise LaunchError(f"the sampling thread did not end within {_JOIN_S:.0f} s")
        self.samples.append(self._sample())

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        busy_s, steal_s = _cpu()
        return Sample(time.perf_counter(), self._counters.read(), busy_s, steal_s)


def _cpu() -> tuple[float, float]:
    """Seconds in which a core was busy, and was taken away, since boot."""
    ticks = cpu_times()[:_NUM_STATES]
    busy = sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT] - ticks[_STEAL]
    return busy * _TICKS_S, ticks[_STEAL] * _TICKS_S


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a run on the sampler's clock."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


class Timeline:
    """The samples of one run as functions of time."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self._times = [sample.at_s for sample in samples]

    def growth(self, window: Window, value: Callable[[Sample], float]) -> float:
        """How much a counter grew in a window; between samples it is taken as linear."""
        return self._at(window.end_s, value) - self._at(window.start_s, value)

    def received(self, window: Window, nic: Nic) -> float:
        """Bytes that a NIC received."""
        return self.growth(window, lambda sample: sample.nics[nic].received)

    def sent(self, window: Window, nic: Nic) -> float:
        """Bytes that a NIC sent."""
        return self.growth(window, lambda sample: sample.nics[nic].sent)

    def _at(self, at_s: float, value: Callable[[Sample], float]) -> float:
        idx = min(max(bisect_left(self._times, at_s), 1), len(self._times) - 1)
        before, after = self.samples[idx - 1], self.samples[idx]
        share = (at_s - before.at_s) / max(after.at_s - before.at_s, 1e-9)
        low, high = value(before), value(after)
        return low + min(max(share, 0.0), 1.0) * (high - low)
