"""``python -m vllm_dualpath.bench.mover``: the puts alone, for work on the transport."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.puts import LINKS, PIECE_BYTES, VARIANTS, PutPlan, measure_puts
from vllm_dualpath.bench.processes import ProcessGuard


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print one line a link and size."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dualpath.bench.mover")
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--pieces", type=_numbers, default=PIECE_BYTES)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=_numbers, help="of initiators and targets: 0,1")
    parser.add_argument("--nixl-path", type=Path)
    arguments = parser.parse_args()
    plan = PutPlan(
        links=arguments.links.split(","),
        piece_bytes=arguments.pieces,
        variants=arguments.variants.split(","),
        budget=Budget(0.0, arguments.rounds, arguments.rounds),
        nixl_path=arguments.nixl_path,
        cores=tuple(arguments.cores) if arguments.cores else None,
    )
    guard = ProcessGuard()
    try:
        with tempfile.TemporaryDirectory() as directory:
            result = measure_puts(plan, Path(directory), guard)
    finally:
        guard.close()
    for link in plan.links:
        for size in plan.piece_bytes:
            cells = [
                f"{variant} {result.gb_per_s(link, size, variant):5.2f}"
                for variant in plan.variants
                if variant not in result.missing
            ]
            for other in plan.variants:
                ratio = result.ratio(link, size, other) if other != "ours" else None
                if ratio is not None:
                    cells.append(
                        f"ours/{other} {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
                    )
            print(f"{link} {size:>8}  " + "  ".join(cells) + "  (GB/s)")
    for variant, reason in result.missing.items():
        print(f"{variant}: {reason}")


if __name__ == "__main__":
    main()
