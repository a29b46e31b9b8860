"""Decisions worked out by hand, in files that the router's and the simulator's tests share."""

from __future__ import annotations

import pytest

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.policy import MODES, make_policy

from .golden_cases import GoldenCase, load_golden_cases

CASES = load_golden_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_case(case: GoldenCase) -> None:
    """The decision is the one that was worked out by hand."""
    decision = case.policy().decide(
        case.view(), case.request(), case.line(), ignore_load=case.ignore_load
    )
    found = {
        "verdict": decision.verdict.name.lower(),
        "prefill": decision.prefill,
        "decode": decision.decode,
        "num_cached_blocks": decision.num_cached_blocks,
        "num_recompute_blocks": decision.num_recompute_blocks,
        "segments": decision.segments,
    }
    assert {name: found[name] for name in case.expected} == case.expected


def test_every_mode_has_golden_cases() -> None:
    """A mode without a case worked out by hand is a mode nobody has thought about."""
    assert {case.mode for case in CASES} == set(MODES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("mode", "parameters", "match"),
    [
        ("fastest", {}, "expected prefill_only, dual, split or pool, found 'fastest'"),
        ("split", {"split_fraction": 1.1}, "split_fraction: expected 0 to 1"),
        ("split", {"split_fraction": float("nan")}, "split_fraction"),
        ("pool", {"max_readers": 17}, "max_readers: expected 1 to 16"),
        ("dual", {"alpha_s": -1.0}, "alpha_s: expected 0 or more"),
        ("dual", {"gamma": 1}, "gamma"),
    ],
)
def test_a_mode_or_parameter_that_is_none_is_refused(
    mode: str, parameters: dict[str, float], match: str
) -> None:
    """The message names it and says what is expected."""
    with pytest.raises(ConfigError, match=match):
        make_policy(mode, **parameters)
