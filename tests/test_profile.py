"""The profile as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import VERSION, FittedCurve, Profile, load_profile, save_profile

ATTENTION = FittedCurve(1e-3, 2e-6, 3e-10, r2=0.99, median_error=0.02, num_samples=50)
STEP = FittedCurve(5e-3, 8e-6, 3e-10, r2=0.98, median_error=0.03, num_samples=50)
PROFILE = Profile(VERSION, "m", "cpu", "0.32.0", ATTENTION, STEP, beta_tokens=5e5, alpha_tokens=3e6)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """All of it, also without a store's rate."""
    for profile in (PROFILE, Profile(VERSION, "m", "cpu", "v", ATTENTION, STEP, beta_tokens=1.0)):
        save_profile(profile, tmp_path / "p.json")
        assert load_profile(tmp_path / "p.json") == profile
    assert load_profile(tmp_path / "p.json").read_tokens_per_s == 0


def test_rates_are_the_papers_tokens_by_their_seconds() -> None:
    """Alpha is 3 seconds of reading, beta 5 of computing."""
    assert PROFILE.read_tokens_per_s == pytest.approx(1e6)
    assert PROFILE.prefill_tokens_per_s == pytest.approx(1e5)


def test_a_curve_without_a_term_for_tokens_has_pairs_only() -> None:
    """New tokens alone then take no time."""
    curve = FittedCurve(0.0, 0.0, 2.0, r2=1.0, median_error=0.0, num_samples=6).curve
    assert curve.seconds(10, 2) == 2 * 2 * (10 + 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "truncated"),
        (b'{"version": 1}', "missing required field"),
        (b"[1]", "Expected `object`"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """The message has the file, what is wrong in it, and how to get a good one."""
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"p\.json: .*({words}).*vllm-dualpath profile"):
        load_profile(tmp_path / "p.json")


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    """A curve that falls would make schedulers take more the longer it lasts."""
    save_profile(PROFILE, tmp_path / "p.json")
    good = (tmp_path / "p.json").read_text()
    for bad, words in (
        (good.replace('"token_s": 2e-6', '"token_s": -2e-6'), r"\$\.attention\.token_s"),
        (good.replace('"version": 1', '"version": 9'), "expected version 1, found 9"),
        (good.replace('"r2"', '"r3"', 1), "unknown field|missing required"),
    ):
        assert bad != good
        (tmp_path / "p.json").write_text(bad)
        with pytest.raises(ConfigError, match=words):
            load_profile(tmp_path / "p.json")


def test_a_file_that_cannot_be_is_one_message(tmp_path: Path) -> None:
    """Neither read nor written."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_profile(tmp_path / "none" / "p.json")
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        save_profile(PROFILE, tmp_path / "none" / "p.json")
