"""``vllm-dualpath keys``: the CURVE keys that control needs off loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_dualpath.control.curve import create_keys


def keys(
    directory: Annotated[Path, typer.Argument(help="Where to write them; made if missing.")],
) -> None:
    """Make a key directory: copy it to every host and name it as `keys` on all of them."""
    for path in create_keys(directory):
        typer.echo(str(path))
