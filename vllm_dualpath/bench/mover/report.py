"""The benchmark for people: a progress bar while it runs, one table after it."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_dualpath.bench.mover.plan import Plan
from vllm_dualpath.bench.mover.run import Measured, measure
from vllm_dualpath.bench.mover.staging import NUM_STALLED

_PART = TextColumn("bench mover: {task.fields[part]}")


def measure_with_progress(plan: Plan, console: Console) -> Measured:
    """``measure`` behind a progress bar on ``console`` (silent where it is no terminal).

    The bar counts planned seconds: no thread of its own redraws it, which would be noise in what
    is measured.
    """
    columns = (_PART, BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, auto_refresh=False) as progress:
        task = progress.add_task("", total=plan.planned_s, part="")
        last_s = time.monotonic()

        def tick() -> None:
            nonlocal last_s
            now_s = time.monotonic()
            progress.update(task, advance=now_s - last_s, refresh=True)
            last_s = now_s

        def show(part: str) -> None:
            nonlocal last_s
            last_s = time.monotonic()
            progress.update(task, part=part, refresh=True)

        return measure(plan, show, tick)


def result_table(record: dict[str, Any]) -> Table:
    """Speeds, then ratios with their intervals; single figures in the caption."""
    table = Table(title="bench mover", caption=_caption(record), caption_justify="left")
    table.add_column("what")
    for name in ("GB/s", "beside", "GB/s", "ratio", "95 %", "pairs"):
        table.add_column(name, justify="right")
    for row in _put_rows(record):
        table.add_row(*row)
    _add_section(table, record, "storage", "action", "fio", ("read", "write"))
    _add_section(table, record, "copies", "direction", "memcpy", ("load", "save"))
    staging = record["staging"]
    table.add_section()
    table.add_row(
        "stage over the decode path",
        _speed(staging["stage_gb_per_s"]),
        "read alone",
        _speed(staging["read_gb_per_s"]),
        *_ratio_cells(record, "stage_vs_read"),
    )
    return table


def _put_rows(record: dict[str, Any]) -> list[list[str]]:
    cells = {(each["link"], each["piece_bytes"], each["variant"]): each for each in record["puts"]}
    rows = []
    for (link, size, variant), ours in cells.items():
        if variant != "ours":
            continue
        what = f"put {link}, {_size(size)} ({ours['us_per_descriptor']:.2f} us each)"
        for other in ("raw", "nixl"):
            theirs = cells.get((link, size, other))
            name = f"put_{link}_{_size(size, short=True)}_vs_{other}"
            speed = _speed(theirs["gb_per_s"]) if theirs else "-"
            rows.append([what, _speed(ours["gb_per_s"]), other, speed, *_ratio_cells(record, name)])
            what = ""
    return rows


def _add_section(
    table: Table, record: dict[str, Any], part: str, by: str, other: str, kinds: tuple[str, ...]
) -> None:
    """One row a shape and kind, then the ratio of all of them."""
    table.add_section()
    speeds = {(row["shape"], row[by], row["variant"]): row["gb_per_s"] for row in record[part]}
    for (shape, kind, variant), speed in speeds.items():
        if variant == other or kind not in kinds:
            continue
        beside = speeds.get((shape, kind, other))
        table.add_row(
            f"{part}: {kind} {shape}", _speed(speed), other, _speed(beside) if beside else "-"
        )
    storage = [f"storage_{kind}_vs_fio" for kind in kinds]
    for name in storage if part == "storage" else ["copy_vs_memcpy"]:
        table.add_row(name, "", "", "", *_ratio_cells(record, name))


def _ratio_cells(record: dict[str, Any], name: str) -> list[str]:
    interval = record["intervals"].get(name)
    if interval is None:
        return ["-", "", ""]
    low, high = interval["low"], interval["high"]
    return [f"{interval['median']:.2f}", f"{low:.2f}-{high:.2f}", str(interval["num_pairs"])]


def _caption(record: dict[str, Any]) -> str:
    checked = record["checked_read_vs_unchecked"]
    lines = [
        f"CRC32C {record['crc32c_gb_per_s']:.1f} GB/s from cache,"
        f" {record['crc32c_from_memory_gb_per_s']:.1f} from memory; a checked read runs at"
        f" {checked['median']:.2f} ({checked['low']:.2f}-{checked['high']:.2f}) of the speed of"
        " one without",
        f"an idle mover uses {record['idle_cpu_percent']:.2f} % of a core,"
        f" {record['stalled_cpu_percent']:.2f} % while {NUM_STALLED} transfers wait for a store"
        " that hangs",
        "us, p50/p99: "
        + ", ".join(
            f"{name.replace('_', ' ')} {each['p50']:.0f}/{each['p99']:.0f}"
            for name, each in record["latency_us"].items()
        ),
        f"{record['machine']['cpu']}, {record['machine']['cpus']} CPUs,"
        f" {record['machine']['file_system']}; {record['machine']['took_s']:.0f} s,"
        f" {record['machine']['steal_share']:.0%} of the CPU time stolen by the hypervisor",
    ]
    lines += sorted({f"missing: {reason}" for reason in record["missing"].values()})
    return "\n".join(lines)


def _speed(value: float) -> str:
    return f"{value:.2f}"


def _size(num_bytes: int, short: bool = False) -> str:
    if num_bytes >= 1 << 20:
        return f"{num_bytes >> 20}m" if short else f"{num_bytes >> 20} MiB"
    return f"{num_bytes >> 10}k" if short else f"{num_bytes >> 10} KiB"
