"""Measures an engine and a store, and makes a profile of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from vllm_dualpath.bench.profiling.fit import fit_curve
from vllm_dualpath.bench.profiling.reading import Reading, measure_reading
from vllm_dualpath.bench.profiling.steps import StepTimes, time_steps
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import ALPHA_S, BETA_S, VERSION, Profile

Progress = Callable[[str, float], None]
"""(what goes on, share done)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile and what it was made of."""

    profile: Profile
    steps: StepTimes
    reading: Reading | None

    def to_json(self) -> dict[str, Any]:
        """Plain types, every timed step among them."""
        return {
            "profile": msgspec.to_builtins(self.profile),
            "tokens_per_s": self.steps.tokens_per_s,
            "samples": [asdict(sample) for sample in self.steps.samples],
            "reading": None if self.reading is None else asdict(self.reading),
        }


def measure_profile(
    model: str,
    store: str | None,
    seconds: float,
    block_tokens: int | None,
    engine_args: Sequence[str],
    progress: Progress,
) -> Measured:
    """Time the engine's steps for ``seconds``, then reads from ``store`` for 3 s.

    Raises ``LaunchError`` if the engine does not start, ``ConfigError`` for a store that does not
    work.
    """
    progress("starting the engine", 0.0)
    steps = time_steps(
        model,
        seconds,
        block_tokens,
        engine_args,
        lambda share: progress("timing steps", share),
    )
    reading = None
    if store is not None:
        if steps.geometry is None:
            raise ConfigError(
                f"profile: expected a model with one KV cache group, found {model} with several;"
                " leave out --store: no engine of it can read from one"
            )
        progress("reading from the store", 0.0)
        reading = measure_reading(store, steps.geometry)
    return Measured(_profile_of(steps, reading), steps, reading)


def _profile_of(steps: StepTimes, reading: Reading | None) -> Profile:
    samples = steps.samples
    return Profile(
        version=VERSION,
        model=steps.model,
        device=steps.device,
        vllm=steps.vllm,
        attention=fit_curve(samples, [sample.attention_s for sample in samples]),
        step=fit_curve(samples, [sample.step_s for sample in samples]),
        beta_tokens=BETA_S * steps.tokens_per_s,
        alpha_tokens=None if reading is None else ALPHA_S * reading.tokens_per_s,
    )
