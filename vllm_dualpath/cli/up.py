"""``vllm-dualpath up``: a whole cluster on this host, until it is told to stop."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.vllm_command import HOST
from vllm_dualpath.cli.checks.host import check_port
from vllm_dualpath.cli.engine_flags import (
    BlockTokens,
    ConfigJson,
    StagingBytes,
    check_model,
    extra_config,
)
from vllm_dualpath.config import parse_router_config
from vllm_dualpath.errors import ConfigError

_LOOK_S = 0.5


def up(
    model: Annotated[str, typer.Option(help="Model directory or name, as vLLM takes it.")],
    store: Annotated[str, typer.Option(help="Where Full Blocks live: file:///absolute/path.")],
    prefill: Annotated[int, typer.Option(help="Number of prefill engines.")] = 1,
    decode: Annotated[int, typer.Option(help="Number of decode engines.")] = 1,
    mode: Annotated[
        str, typer.Option(help="Who reads: prefill_only, dual, split or pool.")
    ] = "dual",
    port: Annotated[int, typer.Option(help="Port of the router, where clients go.")] = 9000,
    status_json: Annotated[
        Path | None, typer.Option(help="When ready, write addresses and process ids here.")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where each process's log goes; default: a new directory.")
    ] = None,
    staging_bytes: StagingBytes = None,
    block_tokens: BlockTokens = None,
    config_json: ConfigJson = None,
    router_arg: Annotated[
        list[str] | None, typer.Option(help="A further flag of the router: --router-arg=--FLAG=X.")
    ] = None,
    start_timeout: Annotated[float, typer.Option(help="Seconds to become ready.")] = 300.0,
    engine_args: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments of every vLLM server.")
    ] = None,
) -> None:
    """Start a router and engines on this host; stop them on Ctrl-C or SIGTERM.

    Engines share no GPU where there are enough; on a host without, vLLM's CPU backend is used.
    """
    checked_mode = parse_router_config({"mode": mode}).mode
    check_model(model)
    require_port(port)
    spec = ClusterSpec(
        model,
        store,
        num_prefill=prefill,
        num_decode=decode,
        mode=checked_mode,
        port=port,
        engine_args=tuple(engine_args or ()),
        router_args=tuple(router_arg or ()),
        extra_config=extra_config(staging_bytes, block_tokens, config_json),
        log_dir=log_dir,
        start_timeout_s=start_timeout,
    )
    raise typer.Exit(run_cluster(LocalCluster(spec), status_json, stop_event()))


def require_port(port: int) -> None:
    """Raise ``ConfigError`` if the router could not listen on this port of loopback."""
    found = check_port(port)
    if found.level != "ok":
        raise ConfigError(
            f"--port: expected a port of {HOST} that is free, found {port}: {found.found};"
            f" {found.advice}"
        )


def stop_event() -> threading.Event:
    """Set by SIGTERM and Ctrl-C. A flag, no exception: starting and stopping are not cut short."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def run_cluster(cluster: LocalCluster, status_json: Path | None, stop: threading.Event) -> int:
    """Run ``cluster`` until ``stop``; the exit code is 1 if a process ended on its own."""
    typer.echo(f"starting; logs in {cluster.log_dir}", err=True)
    try:
        cluster.launch()
        cluster.wait_ready(stop)
        if status_json is not None:
            cluster.write_description(status_json)
        _announce(cluster)
        return _watch(cluster, stop)
    finally:
        cluster.stop()


def _announce(cluster: LocalCluster) -> None:
    spec = cluster.spec
    typer.echo(
        f"ready: {cluster.url} ({spec.num_prefill} prefill, {spec.num_decode} decode,"
        f" mode {spec.mode})"
    )


def _watch(cluster: LocalCluster, stop: threading.Event) -> int:
    """Warn once of each process that ends; returns when told to stop or when nothing is left."""
    reported: set[str] = set()
    while not stop.wait(_LOOK_S) and len(reported) < len(cluster.processes):
        for process in cluster.dead():
            if process.name not in reported:
                reported.add(process.name)
                typer.echo(
                    f"WARNING: {process.name} (pid {process.pid}) ended on its own, exit code"
                    f" {process.exit_code}; up does not start it again: see {process.log_path},"
                    " then end up with Ctrl-C and start it anew",
                    err=True,
                )
    return 1 if reported else 0
