"""Puts of one random permutation of pieces between two processes: ours, a plain loop, NIXL.

Every variant has an initiator and a target process of its own with the same kind of memory. They
stay up for the whole measurement; while one pair is measured the others are stopped, because
targets of the baselines spin. Bytes are checked after each turn, outside the timed part.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import vllm_dualpath
from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.channel import Child, close_all
from vllm_dualpath.bench.mover.pairing import Ratio, in_turn, paired_ratio
from vllm_dualpath.bench.mover.side_puts_memory import NUM_BYTES
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.errors import LaunchError

LINKS: Mapping[str, str] = {"shm": "sm,self,tcp", "tcp": "tcp,self"}
"""``UCX_TLS`` of each link. NIXL needs a transport with failure handling beside shared memory."""

VARIANTS = ("ours", "raw", "nixl")
PIECE_BYTES = (4096, 32768, 1 << 20)
_SEED = 1
_LONG_TURN_S = 0.1  # slow puts are not repeated within a turn: more rounds say more


@dataclass(frozen=True, slots=True)
class PutPlan:
    """What to measure."""

    links: Sequence[str] = tuple(LINKS)
    piece_bytes: Sequence[int] = PIECE_BYTES
    variants: Sequence[str] = VARIANTS
    budget: Budget = Budget(30.0)  # noqa: RUF009 # frozen
    puts_per_turn: int = 3
    """Timed ones at most, after one that is not; their median is the sample."""
    nixl_path: Path | None = None
    """Where NIXL is, if not in this environment."""
    cores: tuple[int, int] | None = None
    """Of initiators and of targets; None: wherever the scheduler puts them."""


@dataclass(slots=True)
class PutResult:
    """Seconds of each round, by ``(link, piece bytes, variant)``."""

    seconds: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a variant was not measured."""
    names: dict[str, str] = field(default_factory=dict)
    """What each variant says it runs on."""

    def ratio(self, link: str, piece_bytes: int, other: str) -> Ratio | None:
        """Our speed over that of ``other``, or None where one is missing."""
        ours = self.seconds.get((link, piece_bytes, "ours"))
        theirs = self.seconds.get((link, piece_bytes, other))
        return paired_ratio(theirs, ours) if ours and theirs else None

    def gb_per_s(self, link: str, piece_bytes: int, variant: str) -> float:
        return NUM_BYTES / statistics.median(self.seconds[link, piece_bytes, variant]) / 1e9


class PutPair:
    """Initiator and target of one variant over one link, stopped but for their turns."""

    def __init__(
        self, variant: str, link: str, plan: PutPlan, directory: Path, guard: ProcessGuard
    ) -> None:
        self.variant = variant
        self._same_host = link == "shm"
        self._children: list[Child] = []
        self._expected: dict[int, int] = {}
        environment = _environment(variant, link, plan)
        try:
            for side in ("initiator", "target"):
                core = plan.cores and plan.cores[side == "target"]
                log = directory / f"{variant}-{link}-{side}.log"
                self._children.append(Child(f"{variant}-{side}", log, guard, core, environment))
            self.initiator, self.target = self._children
        except LaunchError:
            self.close()
            raise

    def connect(self, piece_bytes: Sequence[int], expected: dict[int, int]) -> str:
        """Connect, and prepare each size; returns what the variant runs on.

        ``expected`` has the CRC32C of the target's memory by size: every initiator sends the same
        bytes in the same permutation, so that the first one computes it for all.
        """
        name: str = self.initiator.call("connect", self.target.call("hello"), self._same_host)
        for size in piece_bytes:
            self.initiator.call("prepare", size, _SEED)
            if size not in expected:
                expected[size] = self.initiator.call("expected", size, _SEED)
        self._expected = expected
        self._pause()
        return name

    def turn(self, piece_bytes: int, num_puts: int) -> float:
        """Median seconds of some puts. Raises ``LaunchError`` if the bytes did not arrive."""
        for child in self._children:
            child.resume()
        self.initiator.call("put", piece_bytes)
        self.target.call("clear")
        seconds: list[float] = []
        while len(seconds) < num_puts and sum(seconds) < _LONG_TURN_S:
            seconds.append(self.initiator.call("put", piece_bytes))
        found = self.target.call("crc32c")
        if found != self._expected[piece_bytes]:
            raise LaunchError(
                f"{self.variant}: pieces of {piece_bytes} bytes: expected CRC32C"
                f" {self._expected[piece_bytes]:#010x} of the target's memory, found {found:#010x}"
            )
        self._pause()
        return statistics.median(seconds)

    def close(self) -> None:
        close_all(self._children)

    def _pause(self) -> None:
        for child in self._children:
            child.pause()


def measure_puts(
    plan: PutPlan, directory: Path, guard: ProcessGuard, tick: Callable[[], None] = lambda: None
) -> PutResult:
    """Run the plan. Logs of the processes go to ``directory``."""
    result = PutResult()
    with ExitStack() as stack:
        # All start side by side; connecting and all that follows is one after the other.
        started: list[tuple[str, PutPair]] = []
        for link in plan.links:
            for variant in plan.variants:
                pair = PutPair(variant, link, plan, directory, guard)
                stack.callback(pair.close)
                started.append((link, pair))
        pairs = _connect(started, plan, result)
        for round_idx in plan.budget.rounds(tick):
            for link in plan.links:
                for size in plan.piece_bytes:
                    for pair in in_turn(pairs[link], round_idx):
                        seconds = pair.turn(size, plan.puts_per_turn)
                        result.seconds.setdefault((link, size, pair.variant), []).append(seconds)
    return result


def _connect(
    started: Sequence[tuple[str, PutPair]], plan: PutPlan, result: PutResult
) -> dict[str, list[PutPair]]:
    """The pairs that stand, by link. Only a baseline may be missing."""
    pairs: dict[str, list[PutPair]] = {link: [] for link in plan.links}
    expected: dict[int, int] = {}
    for link, pair in started:
        try:
            result.names[f"{pair.variant}-{link}"] = pair.connect(plan.piece_bytes, expected)
        except LaunchError as exc:
            if pair.variant != "nixl":
                raise
            result.missing[pair.variant] = _nixl_missing(exc)
            pair.close()
            continue
        pairs[link].append(pair)
    return pairs


def _nixl_missing(exc: LaunchError) -> str:
    if "ModuleNotFoundError" in str(exc):
        return "not installed: `pip install --no-deps nixl==1.5.1 nixl_cu12==1.5.1`"
    return str(exc).splitlines()[0]


def _environment(variant: str, link: str, plan: PutPlan) -> dict[str, str]:
    environment = {"UCX_TLS": LINKS[link]}
    if variant == "nixl" and plan.nixl_path is not None:
        environment["PYTHONPATH"] = f"{plan.nixl_path}:{_python_path()}"
    return environment


def _python_path() -> str:
    """What a child needs to find this very package."""
    return str(Path(vllm_dualpath.__file__).parent.parent)
