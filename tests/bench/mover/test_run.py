"""The benchmark itself, with few rounds of few bytes: real processes, real files, real movers."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
from rich.console import Console

from vllm_dualpath.bench.mover import fio
from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.plan import Plan
from vllm_dualpath.bench.mover.record import make_record
from vllm_dualpath.bench.mover.report import measure_with_progress, result_table

RATIOS = {
    "storage_read_vs_fio",
    "storage_write_vs_fio",
    "put_shm_32k_vs_raw",
    "put_shm_4k_vs_raw",
    "put_tcp_32k_vs_raw",
    "put_tcp_4k_vs_raw",
    "put_shm_32k_vs_nixl",
    "put_shm_4k_vs_nixl",
    "put_tcp_32k_vs_nixl",
    "put_tcp_4k_vs_nixl",
    "copy_vs_memcpy",
    "stage_vs_read",
}
ONCE = Budget(0.0, 2, 2)


def needed_but_missing() -> set[str]:
    """Baselines that this environment has not: their ratios are null, with the reason."""
    missing = set() if fio.is_installed() else {name for name in RATIOS if name.endswith("_fio")}
    if importlib.util.find_spec("nixl") is None:
        missing |= {name for name in RATIOS if name.endswith("_nixl")}
    return missing


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("bench")
    plan = Plan(
        directory,
        None,
        piece_bytes=(4096, 32768),
        puts_per_turn=1,
        puts=ONCE,
        storage=ONCE,
        storage_bytes=1 << 20,
        copies=ONCE,
        copy_bytes=1 << 20,
        staging=ONCE,
        staging_bytes=16 << 20,
        num_pings=20,
        idle_s=0.2,
    )
    record = make_record(measure_with_progress(plan, Console(stderr=True)))
    assert list(directory.iterdir()) == [], "scratch files were left"
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def test_every_ratio_is_a_number_or_null_with_a_reason(
    record: dict[str, dict[str, object]],
) -> None:
    """Whoever reads the file finds every ratio by name, whatever is installed."""
    ratios, missing = record["ratios"], record["missing"]
    absent = needed_but_missing()
    if absent:
        print(f"without a baseline here: {sorted(absent)}")
    assert set(ratios) == RATIOS
    assert set(missing) == absent
    for name, value in ratios.items():
        if name in absent:
            assert value is None
            assert "install" in str(missing[name])
        else:
            assert isinstance(value, float)
            assert value > 0


def test_intervals_come_with_their_pairs(record: dict[str, dict[str, dict[str, float]]]) -> None:
    """Each number has its interval, from as many pairs as there were rounds."""
    for name, interval in record["intervals"].items():
        assert interval["low"] <= interval["median"] <= interval["high"], name
        assert interval["num_pairs"] == ONCE.at_most, name


def test_single_figures(record: dict[str, object]) -> None:
    """What is no ratio is there as well, and possible."""
    assert isinstance(record["crc32c_gb_per_s"], float)
    assert record["crc32c_gb_per_s"] > 0
    for rest in ("idle_cpu_percent", "stalled_cpu_percent"):
        share = record[rest]
        assert isinstance(share, float), rest
        assert 0 <= share <= 100, rest
    latency = record["latency_us"]
    assert isinstance(latency, dict)
    for each in latency.values():
        assert 0 < each["p50"] <= each["p99"]


def test_machine_and_samples_are_recorded(record: dict[str, dict[str, object]]) -> None:
    """A figure without its machine and its samples cannot be compared."""
    expected = {"cpu", "kernel", "ucx", "file_system", "fio", "cores", "steal_share"}
    assert expected <= set(record["machine"])
    assert "shm/4096/ours" in record["samples"]["put_s"]  # type: ignore[operator]
    assert {each["variant"] for each in record["puts"]} >= {"ours", "raw"}  # type: ignore[index]


def test_the_table_shows_every_ratio_there_is(
    record: dict[str, dict[str, dict[str, float]]],
) -> None:
    """People see what the file says."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(record))
    text = console.export_text()
    for name, interval in record["intervals"].items():
        assert f"{interval['median']:.2f}" in text, name
