"""What the router takes from a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.config import parse_router_config
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import VERSION, FittedCurve, Profile
from vllm_dualpath.router.app import Router, _prefill_rate, _speed_of
from vllm_dualpath.router.roster import EngineSpeed

CURVE = FittedCurve(1e-3, 1e-5, 2e-9, r2=1.0, median_error=0.0, num_samples=9)
PROFILE = Profile(VERSION, "m", "cpu", "v", CURVE, CURVE, beta_tokens=4e5, alpha_tokens=3e6)


def test_the_profile_gives_curve_and_rates() -> None:
    """The curve of whole steps prices recomputing, beta's rate limits load, alpha's is nominal."""
    config = parse_router_config({"recompute": True, "profile": "p.json"})
    assert _speed_of(config, PROFILE) == EngineSpeed(pytest.approx(1e5), 2e-9, 1e6)
    assert _prefill_rate(config, PROFILE) == pytest.approx(8e4)


def test_a_rate_that_is_given_wins() -> None:
    """The flag is the user's word; only the store's rate still comes from the profile."""
    config = parse_router_config({"prefill_tokens_per_s": 7, "profile": "p.json"})
    assert _speed_of(config, PROFILE) == EngineSpeed(7, 0, 1e6)
    assert _prefill_rate(config, PROFILE) == 7


def test_without_a_profile_nothing_changes() -> None:
    """As before there were profiles."""
    assert _speed_of(parse_router_config({}), None) == EngineSpeed()
    assert _prefill_rate(parse_router_config({}), None) is None


def test_a_missing_profile_ends_the_start(tmp_path: Path) -> None:
    """Before the router listens anywhere."""
    with pytest.raises(ConfigError, match=r"profile .*none\.json: cannot be read"):
        Router(parse_router_config({"profile": str(tmp_path / "none.json")}))
