"""What ``--json`` writes: ratios as plain numbers, how sure they are, and every sample."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_dualpath.bench.mover.pairing import Ratio, paired_ratio
from vllm_dualpath.bench.mover.puts import LINKS
from vllm_dualpath.bench.mover.run import Measured
from vllm_dualpath.bench.mover.shapes import SHAPES
from vllm_dualpath.bench.mover.side_puts_memory import NUM_BYTES

PUT_SIZES = {"4k": 4096, "32k": 32768}

Samples = Mapping[Any, Sequence[float]]


class Ratios:
    """Each ratio by its name, or the reason why it is missing."""

    def __init__(self, measured: Measured) -> None:
        self.found: dict[str, Ratio] = {}
        self.missing: dict[str, str] = {}
        self._put_ratios(measured)
        self._storage_ratios(measured)
        copies = measured.copies.seconds
        self._pooled(
            "copy_vs_memcpy",
            [
                (copies[shape, direction, "memcpy"], copies[shape, direction, "copy"])
                for shape, direction, method in copies
                if method == "copy"
            ],
        )
        staging = measured.staging.seconds
        self._pooled("stage_vs_read", [(staging["stage"], staging["read"])])

    def medians(self) -> dict[str, float | None]:
        """The table's core: a number, or null."""
        names = sorted({*self.found, *self.missing})
        return {name: self.found[name].median if name in self.found else None for name in names}

    def _put_ratios(self, measured: Measured) -> None:
        for link in LINKS:
            for label, size in PUT_SIZES.items():
                for other in ("raw", "nixl"):
                    name = f"put_{link}_{label}_vs_{other}"
                    ratio = measured.puts.ratio(link, size, other)
                    if ratio is None:
                        self.missing[name] = measured.puts.missing.get(other, "not measured")
                    else:
                        self.found[name] = ratio

    def _storage_ratios(self, measured: Measured) -> None:
        seconds, missing = measured.storage.seconds, measured.storage.missing
        for action in ("read", "write"):
            name = f"storage_{action}_vs_fio"
            if missing is not None:
                self.missing[name] = missing
                continue
            pairs = [
                (seconds[each.name, action, "fio"], seconds[each.name, action, "ours"])
                for each in SHAPES
            ]
            self._pooled(name, pairs)

    def _pooled(self, name: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
        self.found[name] = pooled_ratio(pairs)


def pooled_ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Ratio:
    """Of each round the geometric mean over all that was measured in it."""
    logs = [np.log(np.asarray(above) / np.asarray(below)) for above, below in pairs]
    pooled = np.exp(np.mean(logs, axis=0))
    return paired_ratio(pooled.tolist(), [1.0] * len(pooled))


def checked_read_ratio(measured: Measured) -> Ratio:
    """Speed of reads with their checksums over reads without, all shapes together."""
    seconds = measured.storage.seconds
    return pooled_ratio(
        [
            (seconds[shape.name, "read_unchecked", "ours"], seconds[shape.name, "read", "ours"])
            for shape in SHAPES
        ]
    )


def gb_per_s(num_bytes: int, seconds: Sequence[float]) -> float:
    """Of the median run."""
    return num_bytes / statistics.median(seconds) / 1e9


def make_record(measured: Measured) -> dict[str, Any]:
    """The whole record, plain types only."""
    ratios = Ratios(measured)
    return {
        "ratios": ratios.medians(),
        "missing": ratios.missing,
        "intervals": {name: ratio.to_json() for name, ratio in sorted(ratios.found.items())},
        "crc32c_gb_per_s": measured.checksums.cached,
        "crc32c_from_memory_gb_per_s": measured.checksums.memory,
        "checked_read_vs_unchecked": checked_read_ratio(measured).to_json(),
        "puts": _puts(measured),
        "storage": _storage(measured),
        "copies": _copies(measured),
        "staging": {
            "num_bytes": measured.staging.num_bytes,
            "stage_gb_per_s": gb_per_s(
                measured.staging.num_bytes, measured.staging.seconds["stage"]
            ),
            "read_gb_per_s": gb_per_s(measured.staging.num_bytes, measured.staging.seconds["read"]),
        },
        "idle_cpu_percent": 100 * measured.staging.idle_cpu_share,
        "stalled_cpu_percent": 100 * measured.staging.stalled_cpu_share,
        "latency_us": {
            **{f"notice_{link}": asdict(each) for link, each in measured.notices.items()},
            "read_to_callback": asdict(measured.callback),
            "plain_read": asdict(measured.plain_read),
        },
        "shapes": {
            shape.name: {"block_bytes": shape.geometry.slot_bytes, "source": shape.source}
            for shape in SHAPES
        },
        "machine": measured.machine,
        "samples": {
            "put_s": _named(measured.puts.seconds),
            "storage_s": _named(measured.storage.seconds),
            "copy_s": _named(measured.copies.seconds),
            "staging_s": dict(measured.staging.seconds),
        },
    }


def _puts(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "link": link,
            "piece_bytes": size,
            "variant": variant,
            "gb_per_s": gb_per_s(NUM_BYTES, seconds),
            "us_per_descriptor": statistics.median(seconds) * 1e6 / (NUM_BYTES // size),
            "runs_on": measured.puts.names[f"{variant}-{link}"],
        }
        for (link, size, variant), seconds in measured.puts.seconds.items()
    ]


def _storage(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "shape": shape,
            "action": action,
            "variant": who,
            "gb_per_s": gb_per_s(measured.storage.num_bytes[shape], seconds),
        }
        for (shape, action, who), seconds in measured.storage.seconds.items()
    ]


def _copies(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "shape": shape,
            "direction": direction,
            "variant": method,
            "gb_per_s": gb_per_s(measured.copies.num_bytes[shape], seconds),
        }
        for (shape, direction, method), seconds in measured.copies.seconds.items()
    ]


def _named(samples: Samples) -> dict[str, list[float]]:
    return {"/".join(map(str, key)): list(values) for key, values in samples.items()}
