"""``vllm-dualpath mover``: what a worker starts beside its engine; not for people."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def mover(
    spec: Annotated[Path, typer.Option(help="The file the engine's worker wrote.")],
) -> None:
    """Become the mover of one engine."""
    command = [sys.executable, "-m", "vllm_dualpath.mover", "--spec", str(spec)]
    # A fresh interpreter: nothing that this command imported stays in the mover.
    os.execv(command[0], command)
