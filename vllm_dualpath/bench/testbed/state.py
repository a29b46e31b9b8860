"""The state file of a testbed: what was built, for commands that come later."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vllm_dualpath.bench.testbed.layout import STATE_ROOT, TestbedSpec, directory
from vllm_dualpath.errors import ConfigError

_FILE = "testbed.json"


def write_spec(spec: TestbedSpec) -> None:
    """Write or replace it; a reader never sees half a file."""
    path = directory(spec.name) / _FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(spec), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_spec(name: str) -> TestbedSpec | None:
    """What was built under this name; ``None`` if nothing was, or not to the end.

    Raises ``ConfigError`` for a file that is not ours.
    """
    path = directory(name) / _FILE
    try:
        return TestbedSpec(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{path}: expected a testbed's state, found something else") from exc


def names() -> list[str]:
    """Testbeds that have a directory, whole or in part."""
    return sorted(path.name for path in STATE_ROOT.iterdir()) if STATE_ROOT.is_dir() else []


def file_of(name: str) -> Path:
    """Where the state lies."""
    return directory(name) / _FILE
