"""What the router knows of one engine. Plain data, owned by the event loop.

An engine's load is kept here and, at once, in the policy's view of its group: a decision looks at
no Python object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from yarl import URL

from vllm_dualpath.messages import Hello, MoverStats
from vllm_dualpath.policy import (
    NO_LIMIT,
    ClusterView,
    EngineState,
    NodeState,
    PrefixCacheModel,
    ReadRate,
    Role,
)


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
    load_changed: Callable[[], None] = lambda: None
    """Called when it may take more than before."""
    stats: MoverStats = field(default_factory=MoverStats)
    num_loads: int = 0
    """Heartbeats received."""
    num_sent: int = 0
    """Messages sent to its mover in this registration, heartbeats not counted."""
    num_welcomes: int = 0
    """Of them ``Welcome``."""
    num_heard: int = 0
    """Messages that its mover has sent, as it counts them itself; see ``Hello.num_sent``."""
    last_moved_s: float = 0.0
    """When its counters last showed bytes read or pushed."""
    serving: bool = False
    """Its HTTP server has answered: a mover says ``Hello`` long before vLLM serves."""
    renders: bool = True
    """Its ``/render`` endpoints are on, as far as is known."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    num_requests: int = 0
    num_tokens: int = 0
    num_compute_tokens: int = 0
    """Of its tokens, those that its prefill legs still compute."""
    num_kv_tokens: int = 0
    """Of its tokens, those that lie in its KV cache for decoding."""
    read_queue_tokens: int = 0
    recent_read_tokens: float = 0.0
    """Kept by the view; here while the engine is in none."""
    read_rate: ReadRate = field(default_factory=ReadRate)
    prefix_cache: PrefixCacheModel | None = None
    """Which prompts it still holds; ``None`` unless it is a prefill engine that keeps any."""
    _view: ClusterView | None = None
    _index: int = 0
    _heartbeat_s: float | None = None
    _shunned_until_s: float = 0.0

    def __post_init__(self) -> None:
        hello = self.hello
        if hello.role == "prefill" and hello.prefix_caching and hello.kv_tokens:
            self.prefix_cache = PrefixCacheModel(PrefixCacheModel.room_of(hello.kv_tokens))

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

    @property
    def max_request_tokens(self) -> int:
        """The longest prompt it can take: for its model, and for its staging memory."""
        staging_tokens = self.hello.num_slots * self.hello.geometry.block_tokens
        return min(self.hello.max_model_len, staging_tokens)

    @property
    def donates(self) -> bool:
        """Whether it can read for requests of other engines, as of its last heartbeat."""
        fit = self.hello.num_donor_slots > 0 and not self.stats.donor_slots_stuck
        return fit and self.last_seen_s >= self._shunned_until_s

    def shun(self, until_s: float) -> None:
        """Let it read for no other engine's request until then."""
        self._shunned_until_s = until_s
        self._show_donates()

    def _show_donates(self) -> None:
        if self._view is not None:
            self._view.engine(self._index).donates = self.donates

    # --- the policy's view ---

    def state(self, node: int) -> tuple[NodeState, EngineState]:
        """What a view starts with: the engine on a node of its own, since it has its own mover."""
        storage = NodeState()
        storage.read_queue_tokens = self.read_queue_tokens
        storage.recent_read_tokens = self.recent_read_tokens
        storage.read_rate = self.read_rate.rate
        engine = EngineState()
        engine.role = Role.PREFILL if self.role == "prefill" else Role.DECODE
        engine.donates = self.donates
        engine.node = node
        engine.num_requests = self.num_requests
        engine.num_tokens = self.num_tokens
        engine.num_compute_tokens = self.num_compute_tokens
        engine.max_request_tokens = self.max_request_tokens
        if self.role == "decode" and self.hello.kv_tokens > 0:
            # One longest prompt more than there is: the next is staged while the last one decodes.
            room_tokens = self.hello.kv_tokens + self.hello.max_model_len
            engine.free_kv_tokens = room_tokens - self.num_kv_tokens
        else:
            engine.free_kv_tokens = NO_LIMIT
        return storage, engine

    def seen_in(self, view: ClusterView | None, index: int = 0) -> None:
        """Changes of load go into ``view`` from now on."""
        if self._view is not None:
            self.recent_read_tokens = self._view.node(self._index).recent_read_tokens
        self._view, self._index = view, index

    def index_in(self, view: ClusterView) -> int | None:
        """Where it is in ``view``, if it is."""
        return self._index if self._view is view else None

    def add_load(
        self, num_requests: int, num_tokens: int, compute_tokens: int = 0, kv_tokens: int = 0
    ) -> None:
        """Requests come, or leave where the numbers are negative."""
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self.num_compute_tokens += compute_tokens
        self.num_kv_tokens += kv_tokens
        if self._view is not None:
            self._view.add_load(self._index, num_requests, num_tokens, compute_tokens, kv_tokens)
        if num_tokens < 0 or kv_tokens < 0:
            self.load_changed()

    def add_reads(self, num_tokens: int) -> None:
        """Tokens are planned to be read here, or are staged where the number is negative."""
        self.read_queue_tokens += num_tokens
        if self._view is not None:
            self._view.add_reads(self._index, num_tokens)

    def heartbeat(self, stats: MoverStats, now_s: float) -> None:
        """Take in one ``Load``."""
        if _moved_bytes(stats) != _moved_bytes(self.stats):
            self.last_moved_s = now_s
        self._measure(stats, now_s)
        self.stats = stats
        self.num_loads += 1
        self.last_seen_s = now_s
        self._show_donates()

    def _measure(self, stats: MoverStats, now_s: float) -> None:
        before_s, self._heartbeat_s = self._heartbeat_s, now_s
        if before_s is None:
            return
        num_bytes = stats.storage_read_bytes - self.stats.storage_read_bytes
        busy_s = stats.storage_read_busy_s - self.stats.storage_read_busy_s
        nominal = 0.0 if self._view is None else self._view.nominal_read_rate
        num_tokens = int(num_bytes / _token_bytes(self.hello))
        self.read_rate.add(num_tokens, busy_s, now_s - before_s, nominal)
        rate = self.read_rate.rate
        if self._view is None:
            return
        self._view.forget_reads(self._index, now_s - before_s)
        if rate > 0:
            self._view.node(self._index).read_rate = rate
            # What the best of the group reads is what the others are believed to be able to.
            self._view.nominal_read_rate = max(nominal, rate)


def _moved_bytes(stats: MoverStats) -> int:
    return stats.storage_read_bytes + stats.push_to_prefill_bytes + stats.push_to_decode_bytes


def _token_bytes(hello: Hello) -> float:
    return sum(hello.geometry.layer_page_bytes) / hello.geometry.page_tokens
