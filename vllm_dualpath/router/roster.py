"""The engines as they are between two changes of membership: sorted, grouped, and as the policy
sees them. Made anew when an engine comes, goes, or begins or ceases to serve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_dualpath.messages import Hello
from vllm_dualpath.policy import ClusterView
from vllm_dualpath.router.engine import Engine

PairGroup = tuple[str, bytes, bytes]
"""(store, fingerprint, root): engines that may share KV. A weight reset makes another root."""


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """What a prefill engine computes and a storage NIC reads, as configured; 0: not known."""

    tokens_per_s: float = 0.0
    s_per_token_pair: float = 0.0
    read_tokens_per_s: float = 0.0
    """Counts until an engine has measured its own."""


class GroupView:
    """The usable engines of one group, by id, and the policy's view of them: the same order."""

    def __init__(self, group: PairGroup, engines: list[Engine], speed: EngineSpeed) -> None:
        self.group = group
        self.engines = engines
        states = [engine.state(index) for index, engine in enumerate(engines)]
        self.view = ClusterView([node for node, _ in states], [engine for _, engine in states])
        measured = max(engine.read_rate.rate for engine in engines)
        self.view.nominal_read_rate = measured or speed.read_tokens_per_s
        self.view.set_prefill_curve(speed.tokens_per_s, speed.s_per_token_pair)
        for index, engine in enumerate(engines):
            engine.seen_in(self.view, index)
        roles = [engine.role for engine in engines]
        self.is_complete = len(set(roles)) == 2
        """There is a prefill and a decode engine."""
        self.max_request_tokens = max(
            (engine.max_request_tokens for engine in engines if engine.role == "prefill"), default=0
        )

    @property
    def hello(self) -> Hello:
        """Of any engine: geometry, root and store are the same for all."""
        return self.engines[0].hello


class Roster:
    """Owns nothing: ``Cluster`` makes one and throws it away."""

    def __init__(self, engines: Iterable[Engine], speed: EngineSpeed) -> None:
        self.engines = sorted(engines, key=lambda engine: engine.engine_id)
        usable = [engine for engine in self.engines if engine.usable]
        self.usable = {
            role: [engine for engine in usable if engine.role == role]
            for role in ("prefill", "decode")
        }
        for engine in self.engines:
            engine.seen_in(None)
        groups: dict[PairGroup, list[Engine]] = {}
        for engine in usable:
            groups.setdefault(group_of(engine), []).append(engine)
        views = [GroupView(group, members, speed) for group, members in groups.items()]
        complete = [view for view in views if view.is_complete]
        self.views = sorted(complete, key=lambda view: (-len(view.engines), view.group))
        """Groups with a prefill and a decode engine, the largest first."""
        self.view_of = {view.group: view for view in self.views}


def group_of(engine: Engine) -> PairGroup:
    """The engines that ``engine`` may share KV with."""
    hello = engine.hello
    return hello.store, hello.fingerprint, hello.root
