"""vLLM's real schedulers with a quota: what each step holds, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from tests.connector.engine import (
    PAGE_TOKENS,
    Engine,
    make_cache_config,
    make_request,
    make_scheduler,
    make_vllm_config,
    write_model,
)
from vllm_dualpath.connector.quota import LEAST_CHUNK_TOKENS
from vllm_dualpath.connector.quota_scheduler import (
    AsyncQuotaScheduler,
    QuotaScheduler,
    check_chunking,
    check_seam,
)
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import VERSION, FittedCurve, Profile, save_profile

Make = Callable[..., Engine]
Steps = list[dict[str, int]]


def write_profile(directory: Path, token_s: float, pair_s: float = 0.0) -> str:
    curve = FittedCurve(0.0, token_s, pair_s, r2=1.0, median_error=0.0, num_samples=9)
    profile = Profile(VERSION, "tiny", "cpu", "0.32", curve, curve, beta_tokens=5 / token_s)
    save_profile(profile, directory / "profile.json")
    return str(directory / "profile.json")


def with_quota(make: Make, directory: Path, num_tokens: int, **options: Any) -> Engine:
    """An engine whose steps hold ``num_tokens`` of prompts, at a millisecond each."""
    extra = {"profile": write_profile(directory, 1e-3), "quota_s": num_tokens / 1e3}
    is_async = options.pop("is_async", False)
    scheduler = AsyncQuotaScheduler if is_async else QuotaScheduler
    options = {"num_blocks": 256, **options}
    return make("both", extra=extra, scheduler_cls=scheduler, is_async=is_async, **options)


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * at) % 89 for at in range(length)]


def run_recorded(engine: Engine) -> Steps:
    """Run to the end; what each step that had anything held."""
    steps: Steps = []
    schedule = engine.scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            steps.append(dict(output.num_scheduled_tokens))
        return output

    engine.scheduler.schedule = recorded  # type: ignore[method-assign]
    engine.run()
    engine.check_ended()
    return steps


def test_a_step_is_filled_up_to_the_quota(engine: Make, tmp_path: Path, is_async: bool) -> None:
    """Prompts in their order until the quota; the last is cut at a block boundary, then goes on."""
    made = with_quota(engine, tmp_path, 202, is_async=is_async)
    for name, length in (("a", 40), ("b", 50), ("c", 200), ("d", 10)):
        made.add(name, prompt(length, ord(name)), max_tokens=1)
    steps = run_recorded(made)
    assert steps == [{"a": 40, "b": 50, "c": 112}, {"c": 88, "d": 10}]
    for name in "abcd":
        made.check_output(name, 1)


def test_chunks_shrink_behind_more_context(engine: Make, tmp_path: Path) -> None:
    """Pairs count: the same quota covers fewer tokens later in a prompt, each time the most."""
    profile = write_profile(tmp_path, 1e-9, 1e-6)
    extra = {"profile": profile, "quota_s": 0.008}
    made = engine("both", extra=extra, scheduler_cls=QuotaScheduler)
    made.add("a", prompt(250, 1), max_tokens=1)
    # n (c + n/2) <= 8000: 126 from the start; 57 behind 124; the rest of 70 behind 180 takes 15050.
    assert [step["a"] for step in run_recorded(made)] == [124, 64, 62]


def test_no_request_overtakes(engine: Make, tmp_path: Path, is_async: bool) -> None:
    """Short prompts behind one that was cut wait until it is through."""
    made = with_quota(engine, tmp_path, 80, is_async=is_async)
    names = ["a", "b", "c", "d", "e"]
    for name, length in zip(names, (240, 5, 150, 6, 7), strict=True):
        made.add(name, prompt(length, ord(name)), max_tokens=1)
    steps = run_recorded(made)
    first = {name: next(i for i, step in enumerate(steps) if name in step) for name in names}
    assert list(first.values()) == sorted(first.values())
    assert all(sum(step.values()) <= 80 for step in steps)


def test_a_quota_below_one_token_still_moves(engine: Make, tmp_path: Path, is_async: bool) -> None:
    """The first prompt gets a least chunk a step; every answer is right."""
    made = with_quota(engine, tmp_path, 0.001, is_async=is_async)
    for name in "abc":
        made.add(name, prompt(150, ord(name)), max_tokens=3)
    steps = run_recorded(made)
    prompts = [count for step in steps for count in step.values() if count > 1]
    assert max(prompts) == LEAST_CHUNK_TOKENS
    assert all(sum(count > 1 for count in step.values()) <= 1 for step in steps)
    for name in "abc":
        made.check_output(name, 3)


def test_decodes_are_not_held_up(engine: Make, tmp_path: Path) -> None:
    """A request that decodes does so in every step, while another's prompt takes the quota."""
    made = with_quota(engine, tmp_path, 70)
    made.add("short", prompt(8, 1), max_tokens=6)
    made.step()
    made.add("long", prompt(250, 2), max_tokens=1)
    steps = run_recorded(made)
    assert [step.get("short") for step in steps[:5]] == [1] * 5
    assert [step.get("long") for step in steps[:4]] == [68, 68, 68, 46]


def test_without_a_profile_it_is_vllm(tmp_path: Path, is_async: bool) -> None:
    """The same requests make the same steps as with vLLM's own scheduler, one by one."""
    plain = AsyncScheduler if is_async else Scheduler
    ours = AsyncQuotaScheduler if is_async else QuotaScheduler
    runs = []
    for scheduler in (plain, ours):
        made = Engine(
            tmp_path, "both", scheduler_cls=scheduler, is_async=is_async,
            num_blocks=90, max_num_batched_tokens=128, long_prefill_token_threshold=48,
        )  # fmt: skip
        for at in range(8):
            made.add(str(at), prompt(30 * at + 5, at), max_tokens=3)
        runs.append((type(made.scheduler), run_recorded(made)))
        made.close()
    assert runs[0][1] == runs[1][1]
    assert [kind for kind, _ in runs] == [plain, ours]


def test_preemption_under_a_quota(engine: Make, tmp_path: Path, is_async: bool) -> None:
    """With too few blocks requests are preempted and computed again: right tokens, nothing left."""
    made = with_quota(
        engine, tmp_path, 90, is_async=is_async, num_blocks=40, scheduler_reserve_full_isl=False
    )
    requests = [made.add(str(at), prompt(56, at), max_tokens=40) for at in range(4)]
    run_recorded(made)
    assert sum(request.num_preemptions for request in requests) > 0
    for at in range(4):
        made.check_output(str(at), 40)


def test_blocks_found_in_the_prefix_cache_are_context(engine: Make, tmp_path: Path) -> None:
    """A local hit is not computed: it takes nothing but what attention over it does."""
    made = with_quota(engine, tmp_path, 100)
    made.add("first", prompt(240, 1), max_tokens=1)
    run_recorded(made)
    made.add("again", prompt(240, 1), max_tokens=1)
    made.add("other", prompt(80, 2), max_tokens=1)
    assert made.schedule().output.num_scheduled_tokens == {"again": PAGE_TOKENS, "other": 80}


def test_the_wrong_kind_of_scheduler_is_refused(engine: Make) -> None:
    """Each is for one way of scheduling: the message names the other class."""
    with pytest.raises(ConfigError, match=r"expected .*\.AsyncQuotaScheduler, found Quota"):
        engine("both", scheduler_cls=QuotaScheduler, is_async=True)


def test_a_profile_without_the_scheduler_is_refused(engine: Make, tmp_path: Path) -> None:
    """It would be read by nobody."""
    with pytest.raises(ConfigError, match=r"--scheduler-cls .*\.QuotaScheduler, found Scheduler"):
        engine("both", extra={"profile": write_profile(tmp_path, 1e-3)})


def test_a_missing_profile_is_refused(engine: Make, tmp_path: Path) -> None:
    """At start, with what to do."""
    extra = {"profile": str(tmp_path / "none.json")}
    with pytest.raises(ConfigError, match=r"No such file.*vllm-dualpath profile"):
        engine("both", extra=extra, scheduler_cls=QuotaScheduler)


def test_another_vllm_is_refused() -> None:
    """A scheduler that never asks, or asks otherwise, is named with what was expected."""

    class Never(Scheduler):
        def schedule(self, *_: Any) -> Any:
            return None

    class Other(Scheduler):
        def _reserve_prefill_lookahead(self, request: Any) -> int:  # type: ignore[override]
            return int(request.num_tokens)

    check_seam(Scheduler)
    with pytest.raises(ConfigError, match=r"called 2 times by schedule.*called 0 times"):
        check_seam(Never)
    with pytest.raises(ConfigError, match=r"found \(self, request\)"):
        check_seam(Other)


def test_whole_prompts_only_is_refused() -> None:
    """Where vLLM must not cut prompts there is nothing to fill a step with."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=False))
    with pytest.raises(ConfigError, match="--no-enable-chunked-prefill"):
        check_chunking(config)  # type: ignore[arg-type]


def test_a_quota_beside_another_connector(tmp_path: Path) -> None:
    """Where ours is one of several connectors, the quota is found in its part of the config."""
    model = write_model(tmp_path / "model")
    extra = {"role": "both", "profile": write_profile(tmp_path, 1e-3), "quota_s": 0.121}
    alone = make_vllm_config(model, tmp_path, extra).kv_transfer_config
    assert alone is not None
    names = ("kv_connector", "kv_connector_module_path", "kv_role", "kv_load_failure_policy")
    ours = {name: getattr(alone, name) for name in names}
    ours["kv_connector_extra_config"] = alone.kv_connector_extra_config
    elsewhere = {"shared_storage_path": str(tmp_path / "example")}
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": elsewhere,
    }
    several = {"kv_connector": "MultiConnector", "kv_connector_module_path": None}
    extra = {"transfer": several, "connectors": [other, ours]}
    config = make_vllm_config(model, tmp_path, extra, scheduler_cls=QuotaScheduler)
    config.cache_config.num_gpu_blocks = 256
    scheduler = make_scheduler(config, make_cache_config(256))
    try:
        for name, length in (("a", 40), ("b", 200)):
            scheduler.add_request(make_request(name, prompt(length, ord(name)), 1))
        assert scheduler.schedule().num_scheduled_tokens == {"a": 40, "b": 80}
    finally:
        scheduler.shutdown()
