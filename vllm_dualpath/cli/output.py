"""What commands share in what they write: a spinner while they work, and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from vllm_dualpath.errors import ConfigError


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A line on stderr that turns; what is yielded says beside it what is done now."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda name: progress.update(task, description=name)


def check_outputs(*files: Path | None, directories: tuple[Path | None, ...] = ()) -> None:
    """Raise ``ConfigError`` for what cannot be written: before the work, not after it."""
    for path in files:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            found = "a directory" if path.is_dir() else f"no directory {path.parent}"
            raise ConfigError(
                f"{path}: expected a file in a directory that is there, found {found}"
            )
    for path in directories:
        if path is not None and path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: expected a directory, or nothing yet, found a file")


def write_json(path: Path | None, content: Any) -> None:
    """``content`` as a file of its own; None: nowhere."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
