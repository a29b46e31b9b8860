"""The libraries we stand on: UCX, vLLM."""

from __future__ import annotations

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.connector.plugin import check_vllm_version
from vllm_dualpath.errors import ConfigError, NativeUnavailable


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
        "with a device: a UCX with its providers (OFED, HPC-X, libucx0), or DUALPATH_UCX_LIBRARY",
    )


def check_vllm() -> Check:
    """Whether a vLLM that the connector takes is installed; it is not imported."""
    try:
        return Check("vLLM", "ok", check_vllm_version())
    except ConfigError as exc:
        return Check("vLLM", "fail", str(exc), "the connector does not start with it")
