"""Many agents' turns as flat arrays, shared by every agent that replays one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_dualpath.errors import ConfigError

TokenCounts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TrajectorySet:
    """Trajectory i has turns ``offsets[i]`` to ``offsets[i + 1]`` of the two token arrays.

    Turn t's prompt is everything before it, appended and generated, plus ``append_tokens[t]``;
    its answer has exactly ``generated_tokens[t]`` tokens.
    Source: the paper's replay, PAPER.md (A.3).
    """

    offsets: npt.NDArray[np.int64]
    append_tokens: TokenCounts
    generated_tokens: TokenCounts

    def __post_init__(self) -> None:
        num_turns = len(self.append_tokens)
        if len(self.generated_tokens) != num_turns or int(self.offsets[-1]) != num_turns:
            raise ConfigError(
                f"trace: expected as many appends as answers as turns, found {num_turns}, "
                f"{len(self.generated_tokens)} and {int(self.offsets[-1])}"
            )
        if num_turns == 0 or np.any(np.diff(self.offsets) <= 0) or self.offsets[0] != 0:
            raise ConfigError("trace: expected at least one turn in every trajectory")
        if self.append_tokens.min() < 1 or self.generated_tokens.min() < 1:
            raise ConfigError("trace: expected at least 1 token appended and generated a turn")

    @classmethod
    def from_turns(cls, trajectories: Sequence[Sequence[tuple[int, int]]]) -> TrajectorySet:
        """A set of the given (appended, generated) turns."""
        lengths = [len(turns) for turns in trajectories]
        flat = np.array([turn for turns in trajectories for turn in turns], dtype=np.int32)
        flat = flat.reshape(-1, 2)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        return cls(offsets, flat[:, 0].copy(), flat[:, 1].copy())

    @property
    def num_trajectories(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_turns(self) -> npt.NDArray[np.int64]:
        """Turns of each trajectory."""
        return np.diff(self.offsets)

    def turns(self, trajectory: int) -> list[tuple[int, int]]:
        """The (appended, generated) tokens of each turn."""
        part = slice(int(self.offsets[trajectory]), int(self.offsets[trajectory + 1]))
        appended, generated = self.append_tokens[part], self.generated_tokens[part]
        return list(zip(appended.tolist(), generated.tolist(), strict=True))

    def total_tokens(self) -> npt.NDArray[np.int64]:
        """Appended and generated tokens of each trajectory: its context at the end."""
        both = self.append_tokens.astype(np.int64) + self.generated_tokens
        return np.add.reduceat(both, self.offsets[:-1])

    def prompt_tokens(self) -> npt.NDArray[np.int64]:
        """The length of every turn's prompt, in the order of the flat arrays."""
        both = self.append_tokens.astype(np.int64) + self.generated_tokens
        running = np.cumsum(both)
        before = np.concatenate([[0], running])[self.offsets[:-1]]
        ends = running - np.repeat(before, self.num_turns)
        prompts: npt.NDArray[np.int64] = ends - self.generated_tokens
        return prompts

    def scaled(self, *, append: float = 1.0, generated: float = 1.0) -> TrajectorySet:
        """The same turns with longer or shorter appends and answers (at least 1 token each)."""
        return TrajectorySet(
            self.offsets,
            np.maximum(1, np.rint(self.append_tokens * append)).astype(np.int32),
            np.maximum(1, np.rint(self.generated_tokens * generated)).astype(np.int32),
        )
