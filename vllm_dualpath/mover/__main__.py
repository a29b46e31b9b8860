"""``python -m vllm_dualpath.mover --spec FILE``: run one mover."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from vllm_dualpath.config import parse_engine_config
from vllm_dualpath.errors import ConfigError, DualPathError
from vllm_dualpath.messages import PROTOCOL_VERSION, MoverSpec
from vllm_dualpath.mover.log_limit import RepeatLimit
from vllm_dualpath.mover.mover import Mover

_EXIT_CONFIG = 2


def read_spec(path: Path) -> MoverSpec:
    """Read and remove the private spec file. Raises ``ConfigError``."""
    try:
        payload = path.read_bytes()
        path.unlink()
        spec = msgspec.msgpack.decode(payload, type=MoverSpec)
    except (OSError, msgspec.MsgspecError) as exc:
        raise ConfigError(f"mover spec {path}: {exc}") from exc
    if spec.version != PROTOCOL_VERSION:
        raise ConfigError(
            f"mover spec: version {spec.version}, expected {PROTOCOL_VERSION};"
            " engine and mover must come from one installation"
        )
    return spec


def shed_inheritance() -> None:
    """Undo what the engine's process passed on: CPU affinity and working directory."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    os.chdir("/")


def main() -> int:
    """Run until the engine is gone: 0; 1 if stores did not end; 2 for a bad configuration."""
    parser = argparse.ArgumentParser(prog="vllm-dualpath mover")
    parser.add_argument("--spec", type=Path, required=True, help="file written by the engine")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s mover %(process)d %(message)s",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatLimit())
    try:
        spec = read_spec(arguments.spec)
        shed_inheritance()
        mover = Mover(spec, parse_engine_config(spec.config))
    except DualPathError as exc:
        print(f"vllm-dualpath mover: {exc}", file=sys.stderr)
        return _EXIT_CONFIG
    # Python runs signal handlers on the main thread, which is the loop's; poll returns at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: mover.stop(signal.Signals(signum).name))
    try:
        mover.run()
    except DualPathError as exc:
        print(f"vllm-dualpath mover: while ending: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
