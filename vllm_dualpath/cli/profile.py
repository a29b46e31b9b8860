"""``vllm-dualpath profile``: what an engine of this model does on this machine, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_dualpath.bench.profiling.report import (
    fit_warning,
    profile_table,
    profile_with_progress,
)
from vllm_dualpath.cli.output import check_outputs, write_json
from vllm_dualpath.profile import save_profile
from vllm_dualpath.storage.posix import root_of


def profile(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory or name, as vLLM takes it.")],
    store: Annotated[
        str | None,
        typer.Option(help="Measure alpha here: file:///absolute/path. Nothing stays there."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="What the router's --profile and an engine's profile key take.")
    ] = Path("profile.json"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Time steps for so long.")] = 20.0,
    block_tokens: Annotated[
        int | None, typer.Option(help="Tokens a Full Block; default 64.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements here, too.")
    ] = None,
) -> None:
    """Time a real engine's steps and reads from the store; fit the curves that schedulers use.

    All other arguments go to vLLM as they are: give those that the engines are served with.
    """
    check_outputs(out, json_path)
    if store is not None:
        root_of(store)
    measured = profile_with_progress(
        model, store, seconds, block_tokens, context.args, Console(stderr=True)
    )
    save_profile(measured.profile, out)
    write_json(json_path, measured.to_json())
    console = Console()
    console.print(profile_table(measured))
    console.print(f"written to {out}")
    if (warning := fit_warning(measured)) is not None:
        typer.echo(f"warning: {warning}", err=True)
