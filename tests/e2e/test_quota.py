"""A server with the quota scheduler: the tokens are plain vLLM's."""

from __future__ import annotations

from pathlib import Path

from vllm_dualpath.bench.servers import SingleEngine
from vllm_dualpath.profile import VERSION, FittedCurve, Profile, save_profile

from .client import complete, complete_all, greedy
from .models import COMMON_ARGS, NO_PREFIX_CACHING
from .prompts import token_ids
from .reference import Reference

_SCHEDULER = "vllm_dualpath.connector.quota_scheduler.QuotaScheduler"
_START_S = 200.0


def test_answers_are_plain_vllms(
    llama_dir: Path, llama_reference: Reference, log_root: Path, tmp_path: Path
) -> None:
    """Prompts in pieces of a hundred tokens, several at a time, cold and from the store."""
    curve = FittedCurve(0.0, 1e-3, 1e-9, r2=1.0, median_error=0.0, num_samples=9)
    profile = Profile(VERSION, "llama", "cpu", "", curve, curve, beta_tokens=5000.0)
    save_profile(profile, tmp_path / "profile.json")
    (tmp_path / "store").mkdir()
    prompts = [token_ids(f"quota-{length}", length) for length in (389, 40, 700, 211)]
    engine = SingleEngine(
        llama_dir,
        f"file://{tmp_path}/store",
        {
            "staging_bytes": 64 << 20,
            "persist_slots": 64,
            "profile": str(tmp_path / "profile.json"),
            "quota_s": 0.1,
        },
        engine_args=(*COMMON_ARGS, *NO_PREFIX_CACHING, "--scheduler-cls", _SCHEDULER),
        log_dir=log_root / "quota",
        start_timeout_s=_START_S,
    )
    with engine:
        bodies = [greedy(prompt, 12) for prompt in prompts]
        expected = [llama_reference.tokens(prompt, 12) for prompt in prompts]
        cold = complete_all(engine.url, bodies)
        warm = [complete(engine.url, body) for body in bodies]
        assert [answer.tokens for answer in cold] == expected
        assert [answer.tokens for answer in warm] == expected
    log = (log_root / "quota" / "single.log").read_text()
    assert "filled up to 100 ms of attention" in log
