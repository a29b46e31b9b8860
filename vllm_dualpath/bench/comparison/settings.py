"""What a comparison runs: topologies, modes, agents, model, rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from vllm_dualpath.bench.replay import ReplayPlan, TokenRange
from vllm_dualpath.bench.testbed.layout import TestbedSpec
from vllm_dualpath.bench.tiny_model import TinyModel
from vllm_dualpath.errors import ConfigError

CompareMode = Literal[
    "prefill_only", "dual", "split", "pool", "oracle", "nixl", "nixl_lmcache", "nixl_mooncake"
]
"""Our read modes, one plain engine as the floor, and the baselines of ``bench.baselines``."""
Say = Callable[[str], None]
"""Where progress goes, a line each."""

BASE_MODE: CompareMode = "prefill_only"

BLOCK_TOKENS = 64
_PARTIAL_TOKENS = BLOCK_TOKENS
_PREFILL_TOKENS_A_STEP = 8192
_TOPOLOGY = re.compile(r"(\d+)P(\d+)D")


@dataclass(frozen=True, slots=True)
class Topology:
    """Numbers of prefill and decode nodes."""

    num_prefill: int
    num_decode: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse ``1P2D``. Raises ``ConfigError``."""
        match = _TOPOLOGY.fullmatch(text.strip())
        if match is None or not (int(match[1]) and int(match[2])):
            raise ConfigError(f"--topology: expected 1P1D,2P1D,..., found {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.num_prefill}P{self.num_decode}D"

    @property
    def ideal(self) -> float:
        """The speed-up of a load bound by storage alone, over reads by the prefill side."""
        return (self.num_prefill + self.num_decode) / self.num_prefill


def parse_modes(text: str) -> tuple[CompareMode, ...]:
    """Parse ``prefill_only,split``. Raises ``ConfigError``."""
    modes = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [mode for mode in modes if mode not in get_args(CompareMode)]
    if unknown or not modes or len(set(modes)) < len(modes):
        raise ConfigError(
            f"--modes: expected some of {', '.join(get_args(CompareMode))}, each once;"
            f" found {text!r}"
        )
    return modes  # type: ignore[return-value]


def default_model() -> TinyModel:
    """64 KiB of KV a token in float32, which is exact whatever the batch shape.

    Wide heads on few layers: much KV, as a large model with a long context has. So wide otherwise
    that recomputing a context takes twice as long as reading it through one storage NIC.
    """
    return TinyModel(layers=4, hidden=2048, heads=32, kv_heads=32, head_dim=64, max_len=8192)


DEFAULT_APPEND = TokenRange(30, 50)


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What to run. Raises ``ConfigError``."""

    topologies: tuple[Topology, ...] = (Topology(1, 1),)
    modes: tuple[CompareMode, ...] = ("prefill_only", "dual", "split")
    repeats: int = 3
    agents: int = 6
    turns: int = 4
    context: int = 2048
    """Tokens of each agent's context that are in the store before a run."""
    append: TokenRange = DEFAULT_APPEND
    generate: int = 4
    num_alone: int = 1
    """Requests on the idle cluster before each run."""
    storage_rate: int | None = 250 * 10**6
    compute_rate: int | None = 1600 * 10**6
    prefix_caching: bool = False
    pool_share: float = 0.25
    """Of all agents' KV, what a baseline that keeps KV in memory (Mooncake) has room for."""
    seed: int = 0
    model: TinyModel = field(default_factory=default_model)

    def __post_init__(self) -> None:
        problems = []
        if BASE_MODE not in self.modes:
            problems.append(f"modes: expected {BASE_MODE} among them, all else is compared with it")
        if self.context % BLOCK_TOKENS or self.context < BLOCK_TOKENS:
            problems.append(
                f"context: expected a multiple of {BLOCK_TOKENS} tokens, found {self.context}"
            )
        least = {"repeats": 1, "agents": 1, "turns": 2, "generate": 1, "num_alone": 0}
        for name, number in least.items():
            if (found := getattr(self, name)) < number:
                problems.append(f"{name}: expected at least {number}, found {found}")
        if not 0 < self.pool_share < math.inf:
            problems.append(f"pool_share: expected more than 0, found {self.pool_share}")
        if len(set(self.topologies)) < len(self.topologies):
            problems.append("topologies: expected each once")
        if self.longest > self.model.max_len:
            problems.append(
                f"a conversation of {self.longest} tokens; the model takes {self.model.max_len}"
            )
        if problems:
            raise ConfigError("bench cluster: " + "; ".join(problems))

    def testbed(self, topology: Topology, name: str) -> TestbedSpec:
        """What to build for a topology. Raises ``ConfigError``."""
        rates = (self.storage_rate, self.compute_rate)
        return TestbedSpec(name, topology.num_prefill, topology.num_decode, *rates)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation, its last answer included."""
        return self.context + self.turns * (self.append.high + self.generate)

    @property
    def bytes_per_token(self) -> int:
        """KV of one token."""
        itemsize = 4 if self.model.dtype == "float32" else 2
        return 2 * self.model.layers * self.model.kv_heads * self.model.head_dim * itemsize

    @property
    def kv_cache_gib(self) -> int:
        """What an engine's KV cache needs, so that no agent waits for room in it."""
        tokens = self.agents * (self.longest + 2 * BLOCK_TOKENS)
        return max(1, -(-tokens * self.bytes_per_token // 2**30))

    @property
    def staging_bytes(self) -> int:
        """The same for the staging memory of a mover, with room for blocks to be stored."""
        blocks = self.agents * (self.longest // BLOCK_TOKENS + 2) + _PARTIAL_TOKENS
        return blocks * (BLOCK_TOKENS * self.bytes_per_token + 8192)

    @property
    def pool_bytes(self) -> int:
        """Memory of such a baseline, on all prefill nodes together."""
        return int(self.pool_share * self.agents * self.longest * self.bytes_per_token)

    def replay_plan(self, arrivals_s: tuple[float, ...] = ()) -> ReplayPlan:
        """The agents; the first turn's append holds the context."""
        return ReplayPlan(
            agents=len(arrivals_s) or self.agents,
            turns=self.turns,
            append=self.append,
            first=TokenRange(self.context + self.append.low, self.context + self.append.high),
            generate=self.generate,
            seed=self.seed,
            arrivals_s=arrivals_s,
        )

    @property
    def context_blocks(self) -> int:
        """Blocks that all agents' contexts have together."""
        return self.agents * self.context // BLOCK_TOKENS

    def unseen_context(self) -> tuple[int, ...]:
        """As long as the agents', and like none of theirs."""
        plan = replace(self.replay_plan(), seed=self.seed + 1)
        return tuple(plan.appends(0)[0][: self.context])

    def contexts(self) -> list[tuple[int, ...]]:
        """What the store holds of each agent before a run."""
        plan = self.replay_plan()
        return [tuple(plan.appends(idx)[0][: self.context]) for idx in range(self.agents)]


def engine_args(plan: ComparisonPlan) -> tuple[str, ...]:
    """Arguments of vLLM, the same for every engine, the reference and the baselines."""
    caching = "--enable-prefix-caching" if plan.prefix_caching else "--no-enable-prefix-caching"
    return (
        *("--dtype", plan.model.dtype, "--max-model-len", str(plan.longest + 1)),
        *("--block-size", str(BLOCK_TOKENS)),
        *("--max-num-batched-tokens", str(_PREFILL_TOKENS_A_STEP), caching),
    )


def engine_env(plan: ComparisonPlan) -> dict[str, str]:
    """Environment of vLLM, the same for every engine, the reference and the baselines."""
    return {"VLLM_CPU_KVCACHE_SPACE": str(plan.kv_cache_gib)}
