"""A whole comparison: the reference, then each topology's modes in turn, repeat by repeat."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.comparison.baseline_runs import DEFAULT_BASELINE_DIR, is_baseline
from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.online import Limits, RateRange, search
from vllm_dualpath.bench.comparison.record import Comparison, TopologyResult, plan_json
from vllm_dualpath.bench.comparison.reference import run_reference
from vllm_dualpath.bench.comparison.session import Session
from vllm_dualpath.bench.comparison.settings import CompareMode, ComparisonPlan, Say, Topology
from vllm_dualpath.bench.testbed import lifecycle
from vllm_dualpath.bench.testbed.commands import check_requirements
from vllm_dualpath.bench.tiny_model import write_tiny_model
from vllm_dualpath.errors import LaunchError, RequestError

_TESTBED = "bench"
Around = Callable[[], AbstractContextManager[object]]


def check_ready(plan: ComparisonPlan) -> None:
    """Raise ``ConfigError`` for a topology that cannot be built, missing programs, or a testbed
    that is left of an earlier run.
    """
    check_requirements()
    for topology in plan.topologies:
        plan.testbed(topology, _TESTBED)
    lifecycle.check_free(_TESTBED)


def compare(
    plan: ComparisonPlan,
    log_dir: Path,
    say: Say,
    around_run: Around = nullcontext,
    baseline_dir: Path = DEFAULT_BASELINE_DIR,
) -> Comparison:
    """Run all of ``plan``. ``around_run`` is entered around every measured run.

    Raises ``ConfigError`` for what ``check_ready`` would have found, ``LaunchError`` for what does
    not work.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-dualpath-model-") as name:
        model = Path(name)
        write_tiny_model(plan.model, model)
        reference = None
        if "oracle" in plan.modes:
            say("oracle and reference: one plain vLLM")
            reference = run_reference(plan, model, log_dir)
        found = tuple(
            compare_on(plan, topology, model, log_dir, say, around_run, baseline_dir)
            for topology in plan.topologies
        )
    return Comparison(plan, reference, found)


def compare_on(
    plan: ComparisonPlan,
    topology: Topology,
    model: Path,
    log_dir: Path,
    say: Say,
    around_run: Around = nullcontext,
    baseline_dir: Path = DEFAULT_BASELINE_DIR,
) -> TopologyResult:
    """All modes on one topology, interleaved. A baseline that does not run is a failure told."""
    spec = plan.testbed(topology, _TESTBED)
    with Session(plan, topology, spec, model, log_dir, say, baseline_dir=baseline_dir) as session:
        runs: list[Run] = []
        failures: list[str] = []
        for repeat in range(plan.repeats):
            for mode in order(plan.modes, repeat):
                try:
                    with around_run():
                        run = session.run(mode, repeat)
                except (LaunchError, RequestError) as exc:
                    if not is_baseline(mode):
                        raise
                    failures.append(f"{mode}, repeat {repeat}: {exc}")
                    say(failures[-1])
                    continue
                runs.append(run)
                say(_outcome(run))
        return TopologyResult(
            topology,
            session.spec,
            tuple(sorted(runs, key=lambda run: (plan.modes.index(run.mode), run.repeat))),
            tuple(session.recompute_ttft_s),
            session.unshaped_read_bytes_per_s,
            tuple(failures),
        )


def _outcome(run: Run) -> str:
    failed = f", {run.result.num_failed} requests FAILED" if run.result.num_failed else ""
    return f"{run.topology} {run.mode}, repeat {run.repeat}: JCT {run.result.jct_s:.1f} s{failed}"


def search_rates(
    plan: ComparisonPlan, rates: RateRange, limits: Limits, log_dir: Path, say: Say
) -> dict[str, Any]:
    """The highest rate of agents within ``limits``, for each topology and mode."""
    details = {}
    with tempfile.TemporaryDirectory(prefix="vllm-dualpath-model-") as name:
        write_tiny_model(plan.model, Path(name))
        for topology in plan.topologies:
            spec = plan.testbed(topology, _TESTBED)
            with Session(plan, topology, spec, Path(name), log_dir, say) as session:
                modes = tuple(order(plan.modes, 0))
                details[str(topology)] = search(session, plan, modes, rates, limits, say)
    highest = {
        topology: {mode: found["highest_agents_per_s"] for mode, found in modes.items()}
        for topology, modes in details.items()
    }
    return {
        "highest_agents_per_s": highest,
        "limits": asdict(limits),
        "runs": details,
        "plan": plan_json(plan),
    }


def order(modes: tuple[CompareMode, ...], repeat: int) -> list[CompareMode]:
    """The modes of one repeat: forwards and backwards in turn, so that drift hits all alike."""
    cluster_modes: list[CompareMode] = [mode for mode in modes if mode != "oracle"]
    return cluster_modes if repeat % 2 == 0 else cluster_modes[::-1]
