"""How long the worker's hooks keep vLLM's thread, measured: ``python -m`` this, JSON comes out.

Drives the hooks as vLLM's model runner does, around caches of its own and a real mover, with steps
that load a given number of pages in every layer, and save what they compute. Each step is run
twice. *Hidden*: between two hooks the thread computes until every copy has come to its end, as in a
long forward pass; this is what the hooks themselves take. *Bare*: with nothing between the hooks,
which wait for copies and share the machine with them. Run by ``vllm-dualpath bench hooks``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import parse_engine_config
from vllm_dualpath.connector.guard import GuardedWorker
from vllm_dualpath.connector.identity import ModelIdentity
from vllm_dualpath.connector.metadata import Claim, DualPathMetadata, PageCopy
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.worker import WorkerSide
from vllm_dualpath.control.runtime_dir import mover_socket_path
from vllm_dualpath.messages import TransferKey

NUM_LAYERS = 32
PAGE_BYTES = 2048
PAGES_PER_BLOCK = 4
MAX_SAVED_PAGES = 512
"""A step saves what it computes: at most 8192 tokens, vLLM's default ``max_num_batched_tokens``,
in pages of 16. What it loads has no such bound.
"""
PAGES_PER_REQUEST = 256
"""A step of more pages has several requests, as a batch of long prompts would."""
_NUM_WARM_STEPS = 5
_COMPUTED_BYTES = 1 << 20
"""What the stand-in of a forward pass works on: half of a core's own cache."""

Times = dict[str, list[tuple[int, int]]]
"""Of each hook, in each call: (CPU, wall) nanoseconds."""


class HookRig:
    """A worker side with its mover, and steps to run through its hooks."""

    def __init__(self, directory: Path, max_pages: int) -> None:
        self.names = [f"layers.{idx}" for idx in range(NUM_LAYERS)]
        geometry = Geometry(PAGES_PER_BLOCK, 1, (PAGE_BYTES,) * NUM_LAYERS, "LBHNC", 1, "bytes")
        # Loads and saves use pages of their own.
        self.num_blocks = 2 * max_pages
        self.num_slots = 2 * (max_pages // PAGES_PER_BLOCK + max_pages // PAGES_PER_REQUEST + 2)
        self.worker = GuardedWorker(WorkerSide(self._setup(directory, geometry)))
        cache = torch.zeros(NUM_LAYERS, self.num_blocks, PAGE_BYTES, dtype=torch.uint8)
        self.worker.side.register(dict(zip(self.names, cache, strict=True)))
        boot_id = self.worker.side._mover.connection.boot_id
        assert boot_id is not None
        self._claim = Claim(TransferKey(bytes(16), 0), boot_id)
        self._num_steps = 0
        self._computed = np.ones(_COMPUTED_BYTES // 4, np.float32)

    def _setup(self, directory: Path, geometry: Geometry) -> EngineSetup:
        (directory / "store").mkdir()
        settings = {
            "role": "both",
            "store": f"file://{directory}/store",
            "staging_bytes": self.num_slots * geometry.slot_bytes,
            "runtime_dir": str(directory),
        }
        return EngineSetup(
            config=parse_engine_config(settings),
            identity=ModelIdentity(geometry, tuple(self.names), bytes(32)),
            engine_id="hook-timing",
            url="",
            model="hook-timing",
            max_model_len=PAGES_PER_BLOCK,
            prefix_caching=False,
            num_cache_blocks=self.num_blocks,
            async_scheduling=False,
            socket_path=mover_socket_path(directory, "hook-timing"),
        )

    def step(self, num_pages: int, *, hidden: bool) -> Times:
        """One step; how long each hook took.

        Loads ``num_pages`` in every layer, and saves as many, but no more than it can compute.

        ``hidden``: copies come to their end between the hooks, as in a long forward pass.
        """
        times: Times = {}
        self._num_steps += 1
        orders = DualPathMetadata(scheduler_boot=self._claim.boot_id)
        orders.sync_loads = self._copies(num_pages, 0)
        orders.saves = self._copies(min(num_pages, MAX_SAVED_PAGES), 1)
        finished = {copy.request_id for copy in orders.sync_loads}
        worker = self.worker
        _time(times, "handle_preemptions", worker.fence)
        _time(times, "bind_connector_metadata", lambda: worker.bind(orders))
        _time(times, "start_load_kv", worker.start_loads)
        for name in self.names:
            if hidden:
                self.settle()
            _time(times, "wait_for_layer_load", partial(worker.wait_for_layer, name))
            _time(times, "save_kv_layer", partial(worker.save_layer, name))
        if hidden:
            self.settle()
        _time(times, "wait_for_save", worker.finish_saves)
        _time(times, "get_transfer_results", lambda: worker.results(finished))
        _time(times, "get_block_ids_with_load_errors", worker.take_invalid_blocks)
        _time(times, "get_kv_connector_stats", worker.take_stats)
        self.settle()
        return times

    def settle(self) -> None:
        """Compute until all copies and what follows them have come to their end.

        A thread that slept instead would find another program's data in its core's caches.
        """
        ended = threading.Event()
        self.worker.side._reports.after_all(lambda _done: ended.set())
        while not ended.is_set():
            np.multiply(self._computed, 1.0, out=self._computed)

    def close(self) -> None:
        """End the mover."""
        self.worker.shutdown()

    def _copies(self, num_pages: int, half: int) -> list[PageCopy]:
        """``num_pages`` in one half of the caches and of the slots."""
        copies = []
        first_block = half * self.num_blocks // 2
        slot = half * self.num_slots // 2
        for start in range(0, num_pages, PAGES_PER_REQUEST):
            count = min(PAGES_PER_REQUEST, num_pages - start)
            blocks = tuple(range(first_block + start, first_block + start + count))
            slots = tuple(range(slot, slot - (-count // PAGES_PER_BLOCK)))
            slot += len(slots)
            request_id = f"{self._num_steps}-{start}"
            copies.append(PageCopy(request_id, self._claim, 0, blocks, slots))
        return copies


def measure(rig: HookRig, page_counts: Sequence[int], num_steps: int) -> dict[str, object]:
    """Run all sizes in turn, ``num_steps`` times, after a warm-up."""
    hidden: dict[int, list[Times]] = {count: [] for count in page_counts}
    bare: dict[int, list[Times]] = {count: [] for count in page_counts}
    for round_idx in range(_NUM_WARM_STEPS + num_steps):
        for count in page_counts:
            steps = rig.step(count, hidden=True), rig.step(count, hidden=False)
            if round_idx >= _NUM_WARM_STEPS:
                hidden[count].append(steps[0])
                bare[count].append(steps[1])
    return {str(count): _summary(hidden[count], bare[count]) for count in page_counts}


def _time(times: Times, hook: str, call: Callable[[], object]) -> None:
    time.thread_time_ns()  # the clock's own cold caches are not the hook's
    wall = time.perf_counter_ns()
    cpu = time.thread_time_ns()
    call()
    cpu = time.thread_time_ns() - cpu
    times.setdefault(hook, []).append((cpu, time.perf_counter_ns() - wall))


def _summary(hidden: Sequence[Times], bare: Sequence[Times]) -> dict[str, object]:
    """Medians of each hook's calls, and of what all hooks of a step took for each layer."""
    hooks = {
        hook: {
            "cpu_us": _median_us([cpu for step in hidden for cpu, _ in step[hook]]),
            "wall_us": _median_us([wall for step in hidden for _, wall in step[hook]]),
        }
        for hook in hidden[0]
    }
    cpu = [_a_layer(step, lambda cpu, _: cpu) for step in hidden]
    return {
        "hooks": hooks,
        "cpu_us_a_layer": _median_us(cpu),
        "bare_cpu_us_a_layer": _median_us([_a_layer(step, lambda cpu, _: cpu) for step in bare]),
        "waited_us_a_layer": _median_us(
            [_a_layer(step, lambda c, wall: wall - c) for step in bare]
        ),
    }


def _a_layer(step: Times, part: Callable[[int, int], int]) -> float:
    """A layer's share of one step, in nanoseconds."""
    return sum(part(cpu, wall) for calls in step.values() for cpu, wall in calls) / NUM_LAYERS


def _median_us(nanoseconds: Sequence[float]) -> float:
    return statistics.median(nanoseconds) / 1e3


def main() -> None:
    """Print the measurements as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    # As vLLM binds a forward pass on a CPU; our own threads keep off its core if there is another.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="dualpath-hooks-") as name:
        rig = HookRig(Path(name), max(arguments.pages))
        try:
            result = measure(rig, arguments.pages, arguments.steps)
        finally:
            rig.close()
    sys.stdout.write(json.dumps({"num_layers": NUM_LAYERS, "pages": result}) + "\n")


if __name__ == "__main__":
    main()
