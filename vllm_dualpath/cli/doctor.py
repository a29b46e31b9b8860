"""``vllm-dualpath doctor``: what this host has, what is missing, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.cli.checks.host import (
    check_memlock,
    check_open_files,
    check_port,
    check_shared_memory,
)
from vllm_dualpath.cli.checks.peer_memory import check_peer_memory
from vllm_dualpath.cli.checks.software import check_ucx, check_vllm
from vllm_dualpath.cli.checks.store import check_store

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

_DEFAULT_PORTS = (9000, 9100)
"""The router's: clients, movers."""


def doctor(
    store: Annotated[
        str | None, typer.Option(help="Also check this store: file:///absolute/path.")
    ] = None,
    port: Annotated[
        list[int] | None, typer.Option(help="Ports that must be free; default: the router's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this host. Exit code 1 if something will not work."""
    checks = list(_run(store, tuple(port or _DEFAULT_PORTS)))
    if as_json:
        typer.echo(json.dumps([check.to_json() for check in checks], indent=1))
    else:
        _print(checks)
    raise typer.Exit(1 if any(check.level == "fail" for check in checks) else 0)


def _run(store: str | None, ports: tuple[int, ...]) -> Iterator[Check]:
    yield check_vllm()
    yield from check_ucx()
    yield check_peer_memory()
    yield check_memlock()
    yield check_open_files()
    yield check_shared_memory()
    for port in ports:
        yield check_port(port)
    if store is not None:
        yield from check_store(store)


def _print(checks: list[Check]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.level:<5}", style=_STYLES[check.level])
        line.append(f"{check.name:<{width}}  {check.found}", style="default")
        console.print(line)
        if check.advice:
            console.print(Text(f"{'':<{5 + width}}  -> {check.advice}", style="dim"))
