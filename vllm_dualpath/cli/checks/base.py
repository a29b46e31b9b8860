"""The result of one check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do where it is not as it should be.

    ``fail``: it will not work. ``warn``: it works, but slower or only on this host.
    """

    name: str
    level: Level
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain types."""
        return asdict(self)
