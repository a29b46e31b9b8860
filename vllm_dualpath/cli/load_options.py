"""The options of ``simulate`` and ``plan`` that say what cluster is under what load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="A model of the assumptions.")]
Trace = Annotated[str, typer.Option(help="32k, 48k, 64k (the paper's), or a file of trajectories.")]
Agents = Annotated[int | None, typer.Option(help="So many agents, all at once.")]
Rate = Annotated[
    float | None, typer.Option(help="Agents a second, Poisson, instead of all at once.")
]
ToolTime = Annotated[float, typer.Option(help="Mean seconds between turns.")]
Seed = Annotated[int, typer.Option(help="Equal seeds, equal results.")]
AssumptionsFile = Annotated[
    Path | None, typer.Option(help="Hardware and models, in the form of assumptions.toml.")
]
