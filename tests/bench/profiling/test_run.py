"""A real engine and a real store, profiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.bench.profiling.run import measure_profile
from vllm_dualpath.bench.profiling.steps import time_steps
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.profile import load_profile, save_profile

pytest.importorskip("vllm")

MODEL = TinyModel(layers=2, hidden=64, heads=2, kv_heads=1, max_len=512)
ARGS = ("--dtype", "float32", "--block-size", "32", "--max-num-batched-tokens", "256")


@pytest.mark.slow
def test_an_engine_and_a_store_are_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure is there and possible, progress was told, and nothing stays in the store."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    store, model = tmp_path / "store", tmp_path / "model"
    store.mkdir()
    write_tiny_model(MODEL, model)
    told: list[tuple[str, float]] = []
    measured = measure_profile(
        str(model), f"file://{store}", 0.1, None, ARGS, lambda *each: told.append(each)
    )
    geometry = measured.steps.geometry
    assert geometry is not None
    assert (geometry.block_tokens, geometry.page_tokens, geometry.num_layers) == (64, 32, 2)
    assert geometry.layer_page_bytes == (32 * 2 * MODEL.head_dim * 4,) * 2
    for sample in measured.steps.samples:
        assert 0 < sample.attention_s < sample.step_s
        assert sample.cached_tokens + sample.new_tokens <= 511
    assert max(sample.new_tokens for sample in measured.steps.samples) <= 256
    profile = measured.profile
    assert profile.alpha_tokens is not None
    assert profile.alpha_tokens > 0 < profile.beta_tokens
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert {what for what, _ in told} == {
        "starting the engine", "timing steps", "reading from the store",
    }  # fmt: skip
    assert list(store.iterdir()) == []


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_shown(tmp_path: Path) -> None:
    """The error has the command, its exit code and what vLLM said."""
    with pytest.raises(LaunchError, match=rf"--model {tmp_path} .*exit code 1(.|\n)*config\.json"):
        time_steps(str(tmp_path), 0.1, None, ())
