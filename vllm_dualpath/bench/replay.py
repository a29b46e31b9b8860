"""Replay of agents: each turn's prompt is everything said before, and a new append.

Turn i+1 of an agent is A1, G1, ..., Ai, Gi, A(i+1) with the tokens that the server really
generated; generation is forced to an exact length. All agents run at once, the turns of one agent
in order.

Source: DualPath, appendix A.3.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from vllm_dualpath.bench.completion import Completion, complete, open_session, served_model
from vllm_dualpath.bench.statistics import Summary, summarize
from vllm_dualpath.errors import ConfigError, RequestError

_NUM_TOKEN_IDS = 256
"""Appends are drawn from the ids below this: bytes for a tiny model, valid ids for any other."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """An inclusive range of lengths, drawn from uniformly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """Parse ``N`` or ``LOW-HIGH``. Raises ``ConfigError``."""
        low, separator, high = text.partition("-")
        try:
            parsed = cls(int(low), int(high if separator else low))
        except ValueError as exc:
            raise ConfigError(f"append: expected N or LOW-HIGH, found {text!r}") from exc
        if not 1 <= parsed.low <= parsed.high:
            raise ConfigError(f"append: expected 1 <= LOW <= HIGH, found {text!r}")
        return parsed


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What to replay. The same plan and seed give the same appends."""

    agents: int = 2
    turns: int = 4
    append: TokenRange = TokenRange(60, 100)
    first: TokenRange | None = None
    """Length of the first append; as ``append`` when not given."""
    generate: int = 8
    seed: int = 0
    think_time_s: float = 0.0
    """Pause between an answer and the agent's next turn."""
    lockstep: bool = False
    """All agents start a turn together: load on the storage queues that does not depend on luck."""
    arrivals_s: tuple[float, ...] = ()
    """When each agent comes; all at once if not given."""

    def __post_init__(self) -> None:
        if min(self.agents, self.turns, self.generate) < 1 or self.think_time_s < 0:
            raise ConfigError(
                "replay: agents, turns and generate must be at least 1, think-time not negative;"
                f" found {self.agents}, {self.turns}, {self.generate}, {self.think_time_s}"
            )
        if self.arrivals_s and (self.lockstep or len(self.arrivals_s) != self.agents):
            raise ConfigError(
                f"replay: expected a time of arrival for each of {self.agents} agents and no"
                f" lockstep, found {len(self.arrivals_s)}"
            )

    def appends(self, agent: int) -> list[list[int]]:
        """The appends of one agent, one a turn. Each agent has its own generator."""
        generator = random.Random(f"{self.seed}/{agent}")
        lengths = [self.first or self.append] + [self.append] * (self.turns - 1)
        return [
            [generator.randrange(_NUM_TOKEN_IDS) for _ in range(generator.randint(r.low, r.high))]
            for r in lengths
        ]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One turn of one agent. Without ``completion`` it failed, and ``error`` says how."""

    agent: int
    turn: int
    prompt: tuple[int, ...]
    start_s: float
    """When it was sent, after the start of the replay."""
    completion: Completion | None = None
    error: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain types; the prompt as its length, it can be rebuilt from the plan."""
        done = self.completion
        return {
            "agent": self.agent,
            "turn": self.turn,
            "prompt_tokens": len(self.prompt),
            "start_s": self.start_s,
            "token_ids": list(done.token_ids) if done else [],
            "ttft_s": done.ttft_s if done else None,
            "ttst_s": done.ttst_s if done else None,
            "tpot_s": done.tpot_s if done else None,
            "latency_s": done.arrival_s[-1] if done else None,
            "cached_tokens": done.cached_tokens if done else None,
            "error": self.error or None,
        }


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """All records of a run, by agent and turn, and its job completion time."""

    jct_s: float
    records: tuple[RequestRecord, ...]
    completions: tuple[Completion, ...] = field(init=False)

    def __post_init__(self) -> None:
        done = tuple(r.completion for r in self.records if r.completion is not None)
        object.__setattr__(self, "completions", done)

    @property
    def num_failed(self) -> int:
        """Requests without an answer. An agent stops at its first one."""
        return len(self.records) - len(self.completions)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(r.prompt) for r in self.records if r.completion is not None)

    @property
    def output_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    def latencies(self) -> dict[str, Summary | None]:
        """Summaries by name."""
        return {
            "ttft_s": summarize(completion.ttft_s for completion in self.completions),
            "ttst_s": summarize(completion.ttst_s for completion in self.completions),
            "tpot_s": summarize(completion.tpot_s for completion in self.completions),
        }

    def to_json(self) -> dict[str, object]:
        """The report of ``bench replay --json``."""
        summaries = self.latencies().items()
        return {
            "jct_s": self.jct_s,
            **{name: summary.to_json() if summary else None for name, summary in summaries},
            "prompt_tokens_per_s": self.prompt_tokens / self.jct_s,
            "output_tokens_per_s": self.output_tokens / self.jct_s,
            "num_requests": len(self.records),
            "num_failed": self.num_failed,
            "requests": [record.to_json() for record in self.records],
        }


async def replay(
    url: str,
    plan: ReplayPlan,
    model: str | None = None,
    on_answer: Callable[[RequestRecord], None] = lambda _: None,
) -> ReplayResult:
    """Run ``plan`` against ``url``; failed requests are in the result.

    ``on_answer`` is called in the event loop after each request. Raises ``RequestError`` only if
    the server does not say which model it serves.
    """
    async with open_session() as session:
        name = model or await served_model(session, url)
        run = _Run(session, url, name, plan, on_answer, time.perf_counter())
        records = await run.all_agents()
        jct_s = time.perf_counter() - run.start_s
    return ReplayResult(jct_s, tuple(records))


@dataclass(frozen=True, slots=True)
class _Run:
    session: aiohttp.ClientSession
    url: str
    model: str
    plan: ReplayPlan
    on_answer: Callable[[RequestRecord], None]
    start_s: float

    async def all_agents(self) -> list[RequestRecord]:
        agents = [_Agent(self, idx) for idx in range(self.plan.agents)]
        if self.plan.lockstep:
            for turn in range(self.plan.turns):
                await asyncio.gather(*(agent.take_turn(turn) for agent in agents))
        else:
            await asyncio.gather(*(agent.take_all_turns() for agent in agents))
        return [record for agent in agents for record in agent.records]

    async def request(self, agent: int, turn: int, prompt: tuple[int, ...]) -> RequestRecord:
        sent_s = time.perf_counter() - self.start_s
        try:
            completion = await complete(
                self.session, self.url, self.model, prompt, self.plan.generate
            )
        except RequestError as exc:
            return RequestRecord(agent, turn, prompt, sent_s, error=str(exc))
        return RequestRecord(agent, turn, prompt, sent_s, completion)


class _Agent:
    """One agent and all it has said and heard."""

    def __init__(self, run: _Run, idx: int) -> None:
        self.records: list[RequestRecord] = []
        self._run = run
        self._idx = idx
        self._appends = run.plan.appends(idx)
        self._prompt: tuple[int, ...] = ()
        self._failed = False

    async def take_all_turns(self) -> None:
        if self._run.plan.arrivals_s:
            await asyncio.sleep(self._run.plan.arrivals_s[self._idx])
        for turn in range(len(self._appends)):
            await self.take_turn(turn)

    async def take_turn(self, turn: int) -> None:
        """Pause, ask, remember. Does nothing once a request has failed."""
        if self._failed:
            return
        if turn and self._run.plan.think_time_s:
            await asyncio.sleep(self._run.plan.think_time_s)
        prompt = (*self._prompt, *self._appends[turn])
        record = await self._run.request(self._idx, turn, prompt)
        self.records.append(record)
        self._run.on_answer(record)
        if record.completion is None:
            self._failed = True
        else:
            self._prompt = (*prompt, *record.completion.token_ids)


async def count_exact(url: str, result: ReplayResult, model: str | None = None) -> int:
    """How many answers another server gives token by token, asked the very same prompts.

    One at a time, so that the reference does not depend on batching. Raises ``RequestError`` if
    the reference itself fails.
    """
    num_exact = 0
    async with open_session() as session:
        name = model or await served_model(session, url)
        for record in result.records:
            if record.completion is None:
                continue
            expected = record.completion.token_ids
            reference = await complete(session, url, name, record.prompt, len(expected))
            num_exact += reference.token_ids == expected
    return num_exact
