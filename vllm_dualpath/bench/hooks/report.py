"""Both measurements as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from vllm_dualpath.bench.hooks.idle import CASES, IdleOverhead
from vllm_dualpath.bench.hooks.timing import LIMIT_US, StepTiming
from vllm_dualpath.bench.mover.pairing import Ratio

IDLE_RATIOS = ("idle_vs_plain", "idle_cpu_vs_plain", "idle_cpu_vs_empty")


def to_json(timings: Sequence[StepTiming], idle: Mapping[str, IdleOverhead]) -> dict[str, Any]:
    """Plain types: microseconds and seconds; ``idle`` by the model, ratios null without it."""
    steps = {
        str(timing.num_pages): {
            "cpu_us_a_layer_and_step": timing.cpu_us,
            "waited_us_a_layer_and_step": timing.waited_us,
            "bare_cpu_us_a_layer_and_step": timing.bare_cpu_us,
            "hooks": timing.hooks,
        }
        for timing in timings
    }
    names = [f"{kind}_{model}" for model in CASES for kind in IDLE_RATIOS]
    ratios = {
        f"{kind}_{model}": ratio
        for model, overhead in idle.items()
        for kind, ratio in overhead.ratios().items()
    }
    return {
        "pages": steps,
        "ratios": {name: ratios[name].median if name in ratios else None for name in names},
        "intervals": {name: ratio.to_json() for name, ratio in ratios.items()},
        "samples": {model: asdict(overhead) for model, overhead in idle.items()},
    }


def hook_table(timings: Sequence[StepTiming]) -> Table:
    """A row a hook, a column a number of pages."""
    table = Table(
        title="CPU time of one call of each hook, µs",
        caption="waits for copies are not in it; the last rows are a layer's share of a step",
    )
    table.add_column("pages loaded a step")
    for timing in timings:
        table.add_column(str(timing.num_pages), justify="right")
    for hook in timings[0].hooks:
        table.add_row(hook, *(f"{timing.hooks[hook]['cpu_us']:.1f}" for timing in timings))
    table.add_section()
    table.add_row(
        f"all hooks, a layer and step (limit {LIMIT_US:.0f})",
        *(f"{timing.cpu_us:.1f}" for timing in timings),
    )
    table.add_row(
        "the same with nothing that hides the copies",
        *(f"{timing.bare_cpu_us:.1f}" for timing in timings),
    )
    table.add_row(
        "and waits then, a layer and step", *(f"{timing.waited_us:.1f}" for timing in timings)
    )
    return table


def idle_line(model: str, idle: IdleOverhead) -> str:
    """One sentence."""
    percents = {name: _percent(ratio) for name, ratio in idle.ratios().items()}
    return (
        f"{model} model: a batch of {1e3 * idle.batch_s:.0f} ms without hits or transfers takes,"
        " against plain vLLM,"
        f" {percents['idle_vs_plain']} of time and {percents['idle_cpu_vs_plain']} of CPU time;"
        f" against a connector that does nothing {percents['idle_cpu_vs_empty']} of CPU time"
        f" ({len(idle.plain)} rounds)"
    )


def _percent(ratio: Ratio) -> str:
    low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
    return f"{100 * (ratio.median - 1):+.2f} % (95 % interval {low:+.2f} to {high:+.2f})"
