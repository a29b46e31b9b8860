"""Builds the compiled core, ``vllm_dualpath._native``.

Only the headers of UCX are needed: the library itself is loaded at run time, so that one build
serves hosts with and without RDMA. The headers come from ``DUALPATH_UCX_INCLUDE``, the libucx
wheel, or a system UCX found by pkg-config, in that order.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.hpp"))


def ucx_include_dir() -> str | None:
    """Where ``ucp/api/ucp.h`` lies, or None for the compiler's own search path."""
    if override := os.environ.get("DUALPATH_UCX_INCLUDE"):
        return override
    spec = importlib.util.find_spec("libucx")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "include")
    if shutil.which("pkg-config"):
        found = subprocess.run(
            ["pkg-config", "--variable=includedir", "ucx"],
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.strip() or None
    return None


def needs_recompile(object_path: str, source_path: str) -> bool:
    """Whether an object is older than its source or any header: layouts must agree everywhere."""
    compiled = Path(object_path)
    if not compiled.exists():
        return True
    newest = max(Path(path).stat().st_mtime for path in [source_path, *HEADERS])
    return compiled.stat().st_mtime < newest


include_dir = ucx_include_dir()
ParallelCompile("MAX_JOBS", default=0, needs_recompile=needs_recompile).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "vllm_dualpath._native",
            SOURCES,
            cxx_std=20,
            include_dirs=["csrc"],
            depends=HEADERS,
            # The headers of UCX are C and not ours to clean: -isystem keeps their warnings out.
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
            + (["-isystem", include_dir] if include_dir else []),
            libraries=["dl", "pthread"],
        )
    ]
)
