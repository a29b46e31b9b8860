"""Curves through measured steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.bench.profiling.fit import Sample, fit_curve
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.native import PrefillCurve


def samples(num: int = 60, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(rng.randrange(30_000), rng.randrange(32, 4096), 0.0, 0.0) for _ in range(num)]


def seconds(step_s: float, token_s: float, pair_s: float, found: list[Sample]) -> list[float]:
    curve = PrefillCurve(1 / token_s if token_s else float("inf"), pair_s)
    return [step_s + curve.seconds(s.cached_tokens, s.new_tokens) for s in found]


@given(st.floats(1e-4, 1e-1), st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-7))
def test_a_known_curve_is_found_again(step_s: float, token_s: float, pair_s: float) -> None:
    """Of exact times all predictions are right, whatever the sizes of the three terms."""
    found = samples()
    fitted = fit_curve(found, seconds(step_s, token_s, pair_s, found))
    assert fitted.median_error < 1e-6
    assert fitted.r2 > 1 - 1e-9
    again = seconds(fitted.step_s, fitted.token_s, fitted.token_pair_s, found)
    assert again == pytest.approx(seconds(step_s, token_s, pair_s, found), rel=1e-6)


def test_noise_is_averaged_out() -> None:
    """Times that are a tenth off at random still give each coefficient within a tenth."""
    rng = random.Random(1)
    found = samples(400)
    exact = seconds(2e-3, 1e-5, 3e-9, found)
    fitted = fit_curve(found, [each * rng.uniform(0.9, 1.1) for each in exact])
    assert fitted.token_s == pytest.approx(1e-5, rel=0.1)
    assert fitted.token_pair_s == pytest.approx(3e-9, rel=0.1)
    assert 0.01 < fitted.median_error < 0.1


def test_no_coefficient_is_negative() -> None:
    """Where a free fit would take time back, the term is left out: more work never takes less."""
    found = samples()
    times = [s.new_tokens * 1e-5 * (1 - s.cached_tokens / 100_000) for s in found]
    fitted = fit_curve(found, times)
    assert fitted.token_pair_s == 0
    assert min(fitted.step_s, fitted.token_s) >= 0
    assert fitted.r2 < 1


def test_too_few_steps_are_an_error() -> None:
    """It says what to do."""
    with pytest.raises(LaunchError, match=r"found 2.*--seconds"):
        fit_curve(samples(2), [1.0, 2.0])
