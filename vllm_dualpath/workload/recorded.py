"""Recorded traces: one JSON array of [appended, generated] pairs a line, one line a trajectory."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.workload.trajectories import TrajectorySet


def save_trajectories(trajectories: TrajectorySet, path: Path) -> None:
    """Write a trace so that ``load_trajectories`` gives it back."""
    with path.open("w", encoding="utf-8") as file:
        for trajectory in range(trajectories.num_trajectories):
            file.write(json.dumps(trajectories.turns(trajectory)) + "\n")


def load_trajectories(path: Path) -> TrajectorySet:
    """Read a recorded trace. Raises ConfigError with file and line for what is no trajectory."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"trace {path}: cannot be read ({exc})") from exc
    found = [_parse(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"trace {path}: expected one trajectory a line, found none")
    return TrajectorySet.from_turns(found)


def _parse(path: Path, number: int, line: str) -> list[tuple[int, int]]:
    expected = f"trace {path}, line {number}: expected [[appended, generated], ...] in tokens"
    try:
        turns = json.loads(line)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{expected}, found no JSON ({exc})") from exc
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{expected}, found {line[:60]!r}")
    return [_turn(expected, turn) for turn in turns]


def _turn(expected: str, turn: object) -> tuple[int, int]:
    match turn:
        case [int(appended), int(generated)] if 0 < appended < 2**31 and 0 < generated < 2**31:
            return appended, generated
        case _:
            raise ConfigError(f"{expected}, each above 0, found {turn!r}")
