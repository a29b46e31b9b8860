"""What commands share in what they write: a spinner while they work, and JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A line on stderr that turns; what is yielded says beside it what is done now."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda name: progress.update(task, description=name)


def write_json(path: Path | None, content: Any) -> None:
    """``content`` as a file of its own; None: nowhere."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
