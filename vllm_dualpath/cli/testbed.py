"""``vllm-dualpath testbed``: nodes, shaped NICs and a network file system on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.testbed import lifecycle, network, state
from vllm_dualpath.bench.testbed.commands import check_requirements, in_namespace
from vllm_dualpath.bench.testbed.counters import NicCounters
from vllm_dualpath.bench.testbed.layout import (
    TestbedSpec,
    check_name,
    directory,
    parse_rate,
    rate_text,
)
from vllm_dualpath.bench.testbed.namespaces import entered
from vllm_dualpath.bench.testbed.places import (
    node_prefix,
    places,
    router_args,
    store_path,
    store_uri,
)
from vllm_dualpath.cli.engine_flags import (
    BlockTokens,
    ConfigJson,
    StagingBytes,
    check_model,
    extra_config,
)
from vllm_dualpath.cli.interrupts import end_like_ctrl_c
from vllm_dualpath.cli.up import run_cluster, stop_event
from vllm_dualpath.config import parse_router_config

app = typer.Typer(
    help="A cluster's network on this machine: needs root, iproute2 and GlusterFS.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Option(help="Which testbed, where there are several.")]
StorageNic = Annotated[
    str, typer.Option(help="Rate of each node's storage NIC, e.g. 400mbit, or unlimited.")
]
ComputeNic = Annotated[str, typer.Option(help="The same of its compute NIC.")]


@app.command()
def up(
    prefill: Annotated[int, typer.Option(help="Number of prefill nodes.")] = 1,
    decode: Annotated[int, typer.Option(help="Number of decode nodes.")] = 1,
    storage_nic: StorageNic = "400mbit",
    compute_nic: ComputeNic = "1600mbit",
    name: Name = "testbed",
    model: Annotated[
        str | None,
        typer.Option(help="Also start engines and router there, until Ctrl-C or SIGTERM."),
    ] = None,
    mode: Annotated[str, typer.Option(help="With --model: who reads.")] = "dual",
    status_json: Annotated[
        Path | None, typer.Option(help="With --model: when ready, write addresses here.")
    ] = None,
    staging_bytes: StagingBytes = None,
    block_tokens: BlockTokens = None,
    config_json: ConfigJson = None,
    start_timeout: Annotated[float, typer.Option(help="Seconds to become ready.")] = 300.0,
    engine_args: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments of every vLLM server.")
    ] = None,
) -> None:
    """Make nodes, networks and the store; `down` removes them, whatever happened meanwhile."""
    checked_mode = parse_router_config({"mode": mode}).mode
    if model is not None:
        check_model(model)
    extra = extra_config(staging_bytes, block_tokens, config_json)
    spec = TestbedSpec(
        name,
        prefill,
        decode,
        parse_rate(storage_nic, "--storage-nic"),
        parse_rate(compute_nic, "--compute-nic"),
    )
    end_like_ctrl_c()
    lifecycle.up(spec)
    _announce(spec)
    if model is None:
        return
    cluster_spec = ClusterSpec(
        model,
        store_uri(spec),
        num_prefill=prefill,
        num_decode=decode,
        mode=checked_mode,
        engine_args=tuple(engine_args or ()),
        router_args=router_args(spec),
        extra_config=extra,
        log_dir=directory(name) / "logs",
        start_timeout_s=start_timeout,
        places=places(spec),
    )
    try:
        with entered(spec.head.namespace):
            raise typer.Exit(run_cluster(LocalCluster(cluster_spec), status_json, stop_event()))
    finally:
        typer.echo(f"testbed {name} stays: vllm-dualpath testbed down --name {name}", err=True)


def _announce(spec: TestbedSpec) -> None:
    typer.echo(
        f"testbed {spec.name} is up: {spec.num_prefill} prefill and {spec.num_decode} decode nodes,"
        f" storage NICs {rate_text(spec.storage_rate)}, compute NICs"
        f" {rate_text(spec.compute_rate)}\nstore on every node: {store_path(spec.name)}\nto run"
        " something on a node:"
    )
    for node in spec.engine_nodes():
        typer.echo(f"  {node.name}: {_quoted(node_prefix(node))} COMMAND")
    typer.echo(f"  clients: {' '.join(in_namespace(spec.head.namespace))} COMMAND")


def _quoted(prefix: tuple[str, ...]) -> str:
    return " ".join(f"'{part}'" if " " in part else part for part in prefix)


@app.command()
def down(name: Name = "testbed") -> None:
    """Remove a testbed, also what a crash left of one. May be repeated."""
    removed = lifecycle.down(name)
    for line in removed:
        typer.echo(f"removed {line}")
    if not removed:
        typer.echo(f"testbed {name}: nothing is there")


@app.command()
def status(name: Name = "testbed") -> None:
    """What is there, and each NIC's counters. Exit code 1 unless all of it is there."""
    check_name(name)
    check_requirements()
    spec = state.read_spec(name)
    spaces = network.namespaces(name)
    if spec is None or len(spaces) < len(spec.nodes()) + 1:
        typer.echo(f"testbed {name}: {'incomplete: run down' if spaces or spec else 'not there'}")
        raise typer.Exit(1)
    mounted = {path.name for path in lifecycle.mounts(name)}
    problems = lifecycle.problems(spec)
    if not problems:
        _announce(spec)
    counters = NicCounters(spec)
    try:
        read = counters.read()
    finally:
        counters.close()
    for node in spec.nodes():
        pids = len(network.processes_in(node.namespace))
        mount = ", store mounted" if node.name in mounted else ""
        typer.echo(f"{node.name}: namespace {node.namespace}, {pids} processes{mount}")
        for nic, (received, sent) in read.items():
            if nic.node == node.name:
                typer.echo(
                    f"  {nic.network} {node.address(nic.network)}: {received:,} bytes received,"
                    f" {sent:,} sent"
                )
    for problem in problems:
        typer.echo(f"WARNING: {problem}", err=True)
    raise typer.Exit(1 if problems else 0)
