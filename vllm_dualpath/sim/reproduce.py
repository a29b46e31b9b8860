"""The paper's experiments in the simulator, each figure as a row beside the published one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from vllm_dualpath.sim.assumptions import paper_assumptions
from vllm_dualpath.sim.capacity import find_capacity
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.costs import model_work
from vllm_dualpath.sim.results import SimulationResult, Summary
from vllm_dualpath.sim.run import load_trace, run_simulation

Figures = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure. ``paper`` and ``ours`` have one number, or a range's two ends."""

    figure: str
    what: str
    paper: Figures
    ours: Figures
    held_out: bool
    unit: str = "x"

    def deviation(self) -> float | None:
        """The largest relative distance of our number (or end of a range) from the paper's."""
        if not self.paper:
            return None
        pairs = zip(self.ours, self.paper, strict=True)
        return max((abs(ours / paper - 1) for ours, paper in pairs))

    def to_json(self) -> dict[str, Any]:
        """As one of ``rows`` in the JSON file."""
        return {
            "figure": self.figure,
            "what": self.what,
            "paper": _plain(self.paper),
            "ours": _plain(self.ours),
            "unit": self.unit,
            "held_out": self.held_out,
            "deviation": self.deviation(),
        }


def _plain(figures: Figures) -> float | list[float]:
    return figures[0] if len(figures) == 1 else list(figures)


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is run. Short leaves out the largest cluster and most of the sweeps."""

    traces: tuple[str, ...]
    agents_660b: tuple[int, ...]
    agents_27b: tuple[int, ...]
    append_scales: tuple[float, ...]
    duration_s: float
    tolerance: float
    large: bool


FULL = Scope(
    traces=("32k", "48k", "64k"),
    agents_660b=(500, 1000, 2000),
    agents_27b=(125, 250, 500, 1000),
    append_scales=(0.5, 1.0, 2.0, 4.0),
    duration_s=5000.0,
    tolerance=0.02,
    large=True,
)
SHORT = Scope(
    traces=("64k",),
    agents_660b=(2000,),
    agents_27b=(500,),
    append_scales=(1.0, 2.0),
    duration_s=3000.0,
    tolerance=0.1,
    large=False,
)
NOT_GIVEN: Figures = ()
_ABLATION = (
    ("+ layer-wise prefill", 0.1721, {"mode": "basic", "layerwise": True}),
    (
        "+ dual path",
        0.3819,
        {"mode": "dual", "placement": "round_robin", "read_path": "alternate"},
    ),
    ("+ scheduling", 0.4562, {"mode": "dual"}),
)

_EQUAL_PAIRS = (
    ("dual 1P1D / Basic 2P1D", ("dual", (1, 1)), ("basic", (2, 1))),
    ("dual 2P1D / dual 1P2D", ("dual", (2, 1)), ("dual", (1, 2))),
    ("Basic 1P1D / Basic 1P2D", ("basic", (1, 1)), ("basic", (1, 2))),
)


def reproduce(short: bool, started: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Run the experiments; ``started`` hears of each before it begins."""
    scope = SHORT if short else FULL
    rows: list[Row] = []
    for experiment in EXPERIMENTS:
        started(experiment.__name__.strip("_").replace("_", " "))
        rows += experiment(scope)
    _run.cache_clear()
    return rows


@lru_cache(maxsize=256)
def _run(**choices: Any) -> SimulationResult:
    """A run that several figures share is made once."""
    return run_simulation(make_config(**choices))


def _offline(model: str, nodes: tuple[int, int], mode: str, trace: str, agents: int) -> float:
    result = _run(
        model=model,
        prefill_nodes=nodes[0],
        decode_nodes=nodes[1],
        mode=mode,
        trace=trace,
        agents=agents,
    )
    return result.job_s


def _beside_dual(
    model: str, nodes: tuple[int, int], traces: Sequence[str], agents: Sequence[int]
) -> tuple[list[float], list[float]]:
    """(Basic over dual, dual over Oracle) in JCT, for every trace and number of agents."""
    ratios, slower = [], []
    for trace, count in product(traces, agents):
        basic, dual, oracle = (
            _offline(model, nodes, mode, trace, count) for mode in ("basic", "dual", "oracle")
        )
        ratios.append(basic / dual)
        slower.append(dual / oracle)
    return ratios, slower


def _range(values: Sequence[float]) -> Figures:
    return min(values), max(values)


def cache_compute_ratio(_: Scope) -> Iterator[Row]:
    """Table 1: GB of KV to load per PFLOP to compute."""
    published = {"qwen-32b": (117.0, 267.0), "ds-660b": (13.0, 36.0)}
    for name, paper in published.items():
        shape = paper_assumptions().model(name)
        work, ours = model_work(shape), []
        for context in (16_384, 65_536):
            selected = min(context, shape.top_k) if shape.top_k else 0
            flops = 429 * (
                work.linear_flops + work.pair_flops * context + work.selected_pair_flops * selected
            )
            ours.append(context * work.kv_bytes_per_token / 1e9 / (flops / 1e15))
        what = f"{name}: cache-compute ratio, contexts of 16K and 64K"
        yield Row("Table 1", what, paper, tuple(ours), held_out=False, unit="GB/PFLOP")


def offline_27b(scope: Scope) -> Iterator[Row]:
    """DS 27B 1P1D against Basic and Oracle."""
    ratios, slower = _beside_dual("ds-27b", (1, 1), scope.traces, scope.agents_27b)
    figure = "Offline, DS 27B 1P1D"
    yield Row(figure, "JCT of Basic over dual, at most", (1.78,), (max(ratios),), False)
    what = "JCT of dual over Oracle, range"
    yield Row(figure, what, (1.09, 1.85), _range(slower), False)


def ablation(scope: Scope) -> Iterator[Row]:
    """JCT against Basic, DS 660B 2P4D, and balance of the storage NICs with and without it."""
    agents = max(scope.agents_660b)
    basic = _run(model="ds-660b", mode="basic", agents=agents)
    results = []
    for what, paper, choices in _ABLATION:
        result = _run(model="ds-660b", agents=agents, **choices)
        results.append(result)
        ours = (1 - result.job_s / basic.job_s,)
        yield Row("Ablation", f"{what}: JCT less than Basic's by", (paper,), ours, False, "")
    window = paper_assumptions().balance.window_s
    for what, published, result in (
        ("round robin", 1.53, results[1]),
        ("the paper's policy", 1.18, results[2]),
    ):
        balance = result.storage_balance(window)
        yield Row("Storage NICs", f"max/mean, {what}", (published,), (balance,), True)
    yield Row("Attention time", "max/mean", (1.06,), (results[2].attention_balance,), False)


def online_2p4d(scope: Scope) -> Iterator[Row]:
    """Latencies at 0.4 agents a second, and the working set."""
    yield from _latencies(scope, (2, 4), 0.4, (1.739, 0.228, 0.039), held_out=False)
    total = float(
        load_trace("64k", paper_assumptions().trace.num_trajectories, 0).total_tokens().mean()
    )
    kv_bytes = model_work(paper_assumptions().model("ds-660b")).kv_bytes_per_token
    for rate, paper in ((0.1, 69.0), (0.45, 681.0)):
        mean_s = Summary.of(_online(scope, (2, 4), rate).agent_s).mean
        ours = (rate * mean_s * total / 2 * kv_bytes / 1e9,)
        what = f"DS 660B at {rate} agents a second"
        yield Row("Working set", what, (paper,), ours, held_out=False, unit="GB")


def _online(scope: Scope, nodes: tuple[int, int], rate: float) -> SimulationResult:
    return _run(
        model="ds-660b",
        prefill_nodes=nodes[0],
        decode_nodes=nodes[1],
        mode="dual",
        agents_per_s=rate,
        duration_s=scope.duration_s,
        warm_up_s=scope.duration_s / 2,
    )


def _latencies(
    scope: Scope, nodes: tuple[int, int], rate: float, published: Figures, held_out: bool
) -> Iterator[Row]:
    result = _online(scope, nodes, rate)
    values = (result.first_token_s, result.second_token_s, result.per_token_s)
    for name, times, paper in zip(("TTFT", "TTST", "TPOT"), values, published, strict=True):
        what = f"DS 660B {nodes[0]}P{nodes[1]}D at {rate} agents a second: {name}"
        ours = (Summary.of(times).mean,)
        yield Row("Scale, online", what, (paper,), ours, held_out, unit="s")


def offline_660b(scope: Scope) -> Iterator[Row]:
    """DS 660B 2P4D against Basic and Oracle."""
    ratios, slower = _beside_dual("ds-660b", (2, 4), scope.traces, scope.agents_660b)
    figure = "Offline, DS 660B 2P4D"
    yield Row(figure, "JCT of Basic over dual, at most", (1.87,), (max(ratios),), True)
    what = "JCT of dual over Oracle, range (near it, says the paper)"
    yield Row(figure, what, NOT_GIVEN, _range(slower), True)


def offline_qwen(scope: Scope) -> Iterator[Row]:
    """Qwen 32B 1P1D; our notes of the paper have no number for it."""
    ratios = [
        _offline("qwen-32b", (1, 1), "basic", trace, 250)
        / _offline("qwen-32b", (1, 1), "dual", trace, 250)
        for trace in scope.traces
    ]
    what = "JCT of Basic over dual"
    yield Row("Offline, Qwen 32B 1P1D", what, NOT_GIVEN, _range(ratios), True)


def ratios_27b(scope: Scope) -> Iterator[Row]:
    """DS 27B with 1P1D, 2P1D, 1P2D, and the pairs that the paper found equal."""
    ratios: list[float] = []
    pairs: dict[str, list[float]] = {what: [] for what, _, _ in _EQUAL_PAIRS}
    for trace in scope.traces:
        for agents in scope.agents_27b:
            jct = {
                (mode, nodes): _offline("ds-27b", nodes, mode, trace, agents)
                for mode in ("basic", "dual")
                for nodes in ((1, 1), (2, 1), (1, 2))
            }
            ratios += [jct["basic", n] / jct["dual", n] for n in ((1, 1), (2, 1), (1, 2))]
            for what, one, other in _EQUAL_PAIRS:
                pairs[what].append(jct[one] / jct[other])
    figure = "Ratios, DS 27B"
    mean = sum(ratios) / len(ratios)
    yield Row(figure, "JCT of Basic over dual, mean", (1.64,), (mean,), True)
    yield Row(figure, "JCT of Basic over dual, at most", (2.46,), (max(ratios),), True)
    for what, found in pairs.items():
        yield Row(figure, f"equal pair {what}, range", (1.0, 1.0), _range(found), True)


def append_scaled(scope: Scope) -> Iterator[Row]:
    """Appends made longer or shorter."""
    ratios = []
    for scale in scope.append_scales:
        basic, dual = (
            _run(model="ds-660b", mode=mode, agents=max(scope.agents_660b), append_scale=scale)
            for mode in ("basic", "dual")
        )
        ratios.append(basic.job_s / dual.job_s)
    what = "DS 660B: JCT of Basic over dual, range"
    yield Row("Append length scaled", what, (1.82, 1.99), _range(ratios), True)


def capacity(scope: Scope) -> Iterator[Row]:
    """Agents a second within TTFT <= 4 s and TPOT <= 50 ms."""
    for model, nodes, start, paper in (
        ("ds-27b", (1, 1), 0.3, 1.67),
        ("ds-660b", (2, 4), 0.4, 2.25),
    ):
        found = []
        for mode in ("basic", "dual"):
            config = make_config(
                model=model,
                prefill_nodes=nodes[0],
                decode_nodes=nodes[1],
                mode=mode,
                agents_per_s=start,
                duration_s=scope.duration_s,
                warm_up_s=scope.duration_s / 2,
            )
            found.append(find_capacity(config, tolerance=scope.tolerance))
        what = f"{model}: agents a second of dual over Basic ({found[1]:.2f} / {found[0]:.2f})"
        yield Row("Capacity at the SLO", what, (paper,), (found[1] / found[0],), True)


def scale(scope: Scope) -> Iterator[Row]:
    """From 2P4D to 48P96D and 44P88D."""
    found = [_offline("ds-660b", (2, 4), "dual", trace, 2000) for trace in scope.traces]
    small = found[-1]
    what = "2P4D, 2K agents: JCT, over all traces"
    yield Row("Scale, offline", what, (3167.0,) * 2, _range(found), True, "s")
    if not scope.large:
        return
    large = _offline("ds-660b", (48, 96), "dual", "64k", 48_000)
    what = "48P96D, 48K agents: JCT, 64k"
    yield Row("Scale, offline", what, (3201.0,), (large,), True, "s")
    what = "48P96D over 2P4D: JCT"
    yield Row("Scale, offline", what, (3201 / 3167,), (large / small,), True)
    yield from _latencies(scope, (44, 88), 8.8, (1.847, 0.194, 0.036), held_out=True)


EXPERIMENTS: tuple[Callable[[Scope], Iterator[Row]], ...] = (
    cache_compute_ratio,
    offline_27b,
    ablation,
    online_2p4d,
    offline_660b,
    offline_qwen,
    ratios_27b,
    append_scaled,
    capacity,
    scale,
)
