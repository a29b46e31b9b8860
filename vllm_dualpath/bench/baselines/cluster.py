"""A baseline's processes on a testbed, from start to stop."""

from __future__ import annotations

import time

from vllm_dualpath.bench.baselines.programs import (
    BaselineSpec,
    Program,
    engine_programs,
    router_program,
    tier_programs,
)
from vllm_dualpath.bench.baselines.spinning import give_way
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard, stop_all
from vllm_dualpath.bench.servers import START_TIMEOUT_S, answers, pause, require_alive
from vllm_dualpath.errors import LaunchError


class BaselineCluster:
    """Starts on entry, is ready inside, stops after. One thread; children die with this process."""

    def __init__(self, spec: BaselineSpec) -> None:
        self.spec = spec
        self.url = spec.router_url
        self._guard = ProcessGuard()
        self._started: list[ManagedProcess] = []
        self.num_spinning = 0
        """Threads that use the CPU although nobody asks anything; see ``spinning``."""

    def __enter__(self) -> BaselineCluster:
        self.spec.scratch.mkdir(parents=True, exist_ok=True)
        self.spec.files_seen_here.mkdir(parents=True, exist_ok=True)
        try:
            # In this order: engines register with the tier, and the router asks the engines.
            for group in (tier_programs, engine_programs):
                self._start(group(self.spec))
            self._start([router_program(self.spec)])
            self.num_spinning = give_way(process.pid for process in self._started)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop all, the router first. May be repeated."""
        stop_all(reversed(self._started))
        self._guard.close()

    def _start(self, programs: list[Program]) -> None:
        processes = [
            ManagedProcess(
                program.name,
                program.command,
                self.spec.scratch / f"{program.name}.log",
                self._guard,
                program.env,
            )
            for program in programs
        ]
        for process in processes:
            process.start()
            self._started.append(process)
        for program, process in zip(programs, processes, strict=True):
            self._wait_ready(program, process)

    def _wait_ready(self, program: Program, process: ManagedProcess) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not answers(program.health_url):
            require_alive(process)
            if time.monotonic() > deadline_s:
                raise LaunchError(
                    f"{self.spec.name}: {program.name} is not ready after {START_TIMEOUT_S:.0f} s;"
                    f" the end of {process.log_path}:\n{process.log_tail()}"
                )
            pause(None)
