"""How long and how much: the full benchmark and the short one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.puts import PIECE_BYTES

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, where, and for how long."""

    directory: Path
    """A folder is made in it and removed again; what is measured is the storage behind it."""
    cores: tuple[int, int] | None
    """Of initiators and targets."""
    nixl_path: Path | None = None
    piece_bytes: Sequence[int] = PIECE_BYTES
    puts_per_turn: int = 3
    puts: Budget = Budget(60.0, 9)  # noqa: RUF009 # frozen, as are the next
    storage: Budget = Budget(60.0, 7)  # noqa: RUF009
    storage_bytes: int = 256 * _MIB
    copies: Budget = Budget(15.0, 9, 60)  # noqa: RUF009
    copy_bytes: int = 128 * _MIB
    staging: Budget = Budget(20.0, 9, 60)  # noqa: RUF009
    staging_bytes: int = 256 * _MIB
    num_pings: int = 1000
    idle_s: float = 10.0

    @property
    def planned_s(self) -> float:
        """Of the measuring itself; starting processes comes on top."""
        parts = (self.puts, self.storage, self.copies, self.staging)
        return sum(part.seconds for part in parts) + 2 * self.idle_s


def full_plan(directory: Path, nixl_path: Path | None, pin: bool) -> Plan:
    """Some minutes."""
    return Plan(directory, _two_cores() if pin else None, nixl_path)


def short_plan(directory: Path, nixl_path: Path | None, pin: bool) -> Plan:
    """Under 50 s on two cores: fewer rounds of fewer bytes, no pieces of 1 MiB."""
    return Plan(
        directory,
        _two_cores() if pin else None,
        nixl_path,
        piece_bytes=PIECE_BYTES[:2],
        puts_per_turn=2,
        puts=Budget(8.0),
        storage=Budget(6.0),
        storage_bytes=64 * _MIB,
        copies=Budget(0.6, 5),
        copy_bytes=48 * _MIB,
        staging=Budget(1.5, 5),
        staging_bytes=96 * _MIB,
        num_pings=100,
        idle_s=1.0,
    )


def _two_cores() -> tuple[int, int] | None:
    """The first two that this process may use; None on a machine with one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else None
