"""What the router knows of one engine. Plain data, owned by the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from yarl import URL

from vllm_dualpath.messages import Hello, MoverStats
from vllm_dualpath.policy import EngineLoad


def check_url(url: str) -> None:
    """Raise ``ValueError`` unless requests can be sent to ``url``."""
    try:
        host = URL(url).host if url.startswith(("http://", "https://")) else None
    except ValueError as exc:
        raise ValueError(f"url: expected http://host:port, found {url!r}: {exc}") from exc
    if not host:
        raise ValueError(f"url: expected http://host:port, found {url!r}")


@dataclass(slots=True, eq=False)
class Engine:
    """One run of an engine's mover (a boot id); a restarted mover is another ``Engine``."""

    hello: Hello
    last_seen_s: float
    stats: MoverStats = field(default_factory=MoverStats)
    num_loads: int = 0
    """Heartbeats received."""
    last_moved_s: float = 0.0
    """When its counters last showed bytes read or pushed."""
    serving: bool = False
    """Its HTTP server has answered: a mover says ``Hello`` long before vLLM serves."""
    renders: bool = True
    """Its ``/render`` endpoints are on, as far as is known."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    num_requests: int = 0
    num_tokens: int = 0
    read_queue_tokens: int = 0

    @property
    def engine_id(self) -> str:
        return self.hello.engine_id

    @property
    def role(self) -> str:
        return self.hello.role

    @property
    def boot_id(self) -> bytes:
        return self.hello.boot_id

    @property
    def usable(self) -> bool:
        return self.serving and not self.lost.is_set()

    def load(self) -> EngineLoad:
        """The policy's view."""
        staging_tokens = self.hello.num_slots * self.hello.geometry.block_tokens
        return EngineLoad(
            self.engine_id,
            self.role,
            self.num_requests,
            self.num_tokens,
            self.read_queue_tokens,
            min(self.hello.max_model_len, staging_tokens),
        )

    def heartbeat(self, stats: MoverStats, now_s: float) -> None:
        """Take in one ``Load``."""
        if _moved_bytes(stats) != _moved_bytes(self.stats):
            self.last_moved_s = now_s
        self.stats = stats
        self.num_loads += 1
        self.last_seen_s = now_s


class Assignment:
    """A request's weight on one engine, taken off once however often ``release`` is called."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self.engine = engine
        self._num_tokens = num_tokens
        self._open = True
        engine.num_requests += 1
        engine.num_tokens += num_tokens

    def release(self) -> None:
        if self._open:
            self._open = False
            self.engine.num_requests -= 1
            self.engine.num_tokens -= self._num_tokens


def _moved_bytes(stats: MoverStats) -> int:
    return stats.storage_read_bytes + stats.push_to_prefill_bytes + stats.push_to_decode_bytes
