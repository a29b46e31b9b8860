"""A tiny cluster on this host, each answer compared with plain vLLM's.

Makes a tiny random model, starts plain vLLM and, mode by mode, a router with one prefill and one
decode engine over an empty store. Agents talk to the cluster for some turns; then plain vLLM gets
the very same prompts. vLLM's own prefix cache is off, so that every hit comes from the store.

Run it with ``examples/quickstart.sh``, which installs what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.replay import ReplayPlan, TokenRange, count_exact, replay
from vllm_dualpath.bench.servers import PlainServer
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model
from vllm_dualpath.config import Mode
from vllm_dualpath.errors import DualPathError

MODES: tuple[Mode, ...] = ("prefill_only", "dual")
PLAN = ReplayPlan(
    agents=4,
    turns=4,
    first=TokenRange(380, 420),
    append=TokenRange(60, 100),
    generate=8,
    think_time_s=0.3,
    # Several reads are asked for at once, so that one side's queue is longer than the other's.
    lockstep=True,
)
ENGINE_ARGS = (
    # Only float32 gives the same tokens whatever the batch: see bench/tiny_model.py.
    *("--dtype", "float32"),
    "--no-enable-prefix-caching",
    "--enable-prompt-tokens-details",
)
EXTRA_CONFIG = {"staging_bytes": 64 << 20}


@dataclass(frozen=True, slots=True)
class ModeResult:
    """What one mode did."""

    requests: int
    exact: int
    jct_s: float
    hit_tokens: int
    read_bytes: dict[str, int]
    push_bytes: dict[str, int]

    def to_json(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "exact": self.exact,
            "jct_s": self.jct_s,
            "hit_tokens": self.hit_tokens,
            "read_bytes": self.read_bytes,
            "push_bytes": self.push_bytes,
        }


def run_mode(mode: Mode, model: Path, plain: PlainServer, directory: Path) -> ModeResult:
    """Replay against a fresh cluster over an empty store, then compare with ``plain``."""
    store = directory / mode / "store"
    store.mkdir(parents=True)
    spec = ClusterSpec(
        model,
        f"file://{store}",
        mode=mode,
        engine_args=ENGINE_ARGS,
        extra_config=EXTRA_CONFIG,
        log_dir=directory / mode,
    )
    with LocalCluster(spec) as cluster:
        result = asyncio.run(replay(cluster.url, PLAN))
        engines: list[dict[str, Any]] = cluster.status()["engines"]
    for record in result.records:
        if record.completion is None:
            raise DualPathError(f"{mode}: agent {record.agent}, turn {record.turn}: {record.error}")
    # The cluster is gone: the comparison has both cores, and starts when it answers.
    plain.wait_ready()
    return ModeResult(
        requests=len(result.records),
        exact=asyncio.run(count_exact(plain.url, result)),
        jct_s=result.jct_s,
        hit_tokens=sum(completion.cached_tokens or 0 for completion in result.completions),
        read_bytes={
            role: total(engines, "storage_read_bytes", role) for role in ("prefill", "decode")
        },
        push_bytes={
            side: total(engines, f"push_{side}_bytes") for side in ("to_prefill", "to_decode")
        },
    )


def total(engines: list[dict[str, Any]], counter: str, role: str | None = None) -> int:
    """The sum of a mover's counter over engines."""
    return sum(
        int(engine["stats"].get(counter, 0)) for engine in engines if role in (None, engine["role"])
    )


def problems(results: dict[str, ModeResult]) -> list[str]:
    """Why this run proves nothing, or proves that something is wrong."""
    found = []
    for mode, result in results.items():
        if result.exact != result.requests:
            found.append(f"{mode}: {result.requests - result.exact} answers differ from plain vLLM")
        if result.hit_tokens == 0:
            found.append(f"{mode}: nothing was loaded from the store")
    if results["prefill_only"].read_bytes["decode"]:
        found.append("prefill_only: the decode side read from the store")
    if not results["dual"].read_bytes["decode"]:
        found.append("dual: the decode side read nothing")
    return found


def table(results: dict[str, ModeResult]) -> Table:
    """One column a mode."""
    shown = Table(title="Every answer compared with plain vLLM, token by token")
    shown.add_column("mode")
    for mode in results:
        shown.add_column(mode, justify="right")
    rows: tuple[tuple[str, Callable[[ModeResult], str]], ...] = (
        ("requests", lambda result: str(result.requests)),
        ("exact", lambda result: str(result.exact)),
        ("job completion time, s", lambda result: f"{result.jct_s:.2f}"),
        ("hit tokens", lambda result: f"{result.hit_tokens:,}"),
        ("read by the prefill side, KiB", lambda result: kib(result.read_bytes["prefill"])),
        ("read by the decode side, KiB", lambda result: kib(result.read_bytes["decode"])),
        ("pushed to the prefill side, KiB", lambda result: kib(result.push_bytes["to_prefill"])),
        ("pushed to the decode side, KiB", lambda result: kib(result.push_bytes["to_decode"])),
    )
    for name, show in rows:
        shown.add_row(name, *map(show, results.values()))
    return shown


def kib(num_bytes: int) -> str:
    """Bytes as the table shows them."""
    return f"{num_bytes / 1024:,.0f}"


def run(directory: Path, console: Console) -> dict[str, ModeResult]:
    """All modes, one after the other; plain vLLM starts beside the first."""
    model = directory / "model"
    write_tiny_model(TinyModel(arch="llama", layers=4), model)
    plain = PlainServer(model, engine_args=ENGINE_ARGS, log_dir=directory / "plain")
    plain.launch()
    try:
        results: dict[str, ModeResult] = {}
        for mode in MODES:
            console.print(f"{mode}: starting a router, a prefill engine and a decode engine")
            results[mode] = run_mode(mode, model, plain, directory)
        return results
    finally:
        plain.stop()


def main() -> int:
    """The exit code: 0 only if all answers agree and both sides did what their mode says."""
    parser = argparse.ArgumentParser(description="A tiny cluster, compared with plain vLLM.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--dir", type=Path, help="models, stores and logs; default: a new one")
    arguments = parser.parse_args()
    console = Console()
    directory = arguments.dir or Path(tempfile.mkdtemp(prefix="vllm-dualpath-quickstart-"))
    console.print(f"models, stores and logs are in {directory}")
    try:
        results = run(directory, console)
    except DualPathError as exc:
        console.print(f"FAILED: {exc}", markup=False)
        return 1
    if arguments.json is not None:
        report = {"modes": {mode: result.to_json() for mode, result in results.items()}}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(table(results))
    found = problems(results)
    for problem in found:
        console.print(f"- {problem}")
    console.print("FAILED" if found else "PASSED: all answers are plain vLLM's")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
