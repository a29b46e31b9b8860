"""A profile as people see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.bench.profiling.report import fit_warning
from vllm_dualpath.bench.profiling.run import Measured
from vllm_dualpath.bench.profiling.steps import StepTimes
from vllm_dualpath.cli.main import main
from vllm_dualpath.profile import VERSION, FittedCurve, Profile, load_profile

STEPS = StepTimes((), 1000.0, "m", "cpu", "0.32", None)


def measured(attention_error: float, step_error: float) -> Measured:
    attention, step = (
        FittedCurve(1e-3, 1e-5, 1e-9, r2=0.9, median_error=error, num_samples=9)
        for error in (attention_error, step_error)
    )
    return Measured(Profile(VERSION, "m", "cpu", "0.32", attention, step, 5000.0), STEPS, None)


def test_a_poor_curve_is_warned_of() -> None:
    """Either curve counts, the worse one is named; curves that fit are not spoken of."""
    assert fit_warning(measured(0.25, 0.25)) is None
    assert "off by more than 40 %" in str(fit_warning(measured(0.4, 0.1)))
    assert "off by more than 30 %" in str(fit_warning(measured(0.26, 0.3)))


def test_the_command_warns_and_writes_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A poor profile is written: it is for whoever runs the command to measure again."""
    poor = measured(0.4, 0.1)
    monkeypatch.setattr("vllm_dualpath.cli.profile.profile_with_progress", lambda *_: poor)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "m", "--out", str(tmp_path / "p.json")])
    assert ended.value.code == 0
    assert "warning: the curves are poor" in capsys.readouterr().err
    assert load_profile(tmp_path / "p.json") == poor.profile
