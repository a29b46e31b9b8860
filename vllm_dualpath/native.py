"""The only door to the compiled core, ``vllm_dualpath._native``.

Memory crosses as (address, bytes): the caller keeps it mapped for the call. Every function here
may be called from any thread, and those that touch much memory release the GIL. Knows nothing of
blocks, slots or peers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dualpath.errors import NativeUnavailable

try:
    from vllm_dualpath import _native
except ImportError as exc:
    raise NativeUnavailable(
        f"the compiled core of vllm-dualpath cannot be loaded ({exc}); reinstall with "
        "`pip install vllm-dualpath`, or in a source tree run `pip install -e .`"
    ) from exc

PeerMemory = _native.PeerMemory
TcpEngine = _native.TcpEngine
TcpError = _native.TcpError
BlockEngine = _native.BlockEngine
CopyQueue = _native.CopyQueue
leave_compute_cores = _native.leave_compute_cores
"""Keep the calling thread off the cores that the thread which started it is bound to."""
CudaCopies = _native.CudaCopies
CudaMark = _native.CudaMark
PageMap = _native.PageMap
PageRows = _native.PageRows
UcxEngine = _native.UcxEngine
UcxError = _native.UcxError
PeerClosedError = _native.PeerClosedError
RawPutLoop = _native.RawPutLoop
RawPutTarget = _native.RawPutTarget
SimSettings = _native.SimSettings
simulate = _native.simulate
ClusterView = _native.ClusterView
EngineState = _native.EngineState
NodeState = _native.NodeState
Placement = _native.Placement
PolicyCore = _native.PolicyCore
PolicyParameters = _native.PolicyParameters
PrefillCurve = _native.PrefillCurve
PrefixCacheModel = _native.PrefixCacheModel
ReadPath = _native.ReadPath
ReadRate = _native.ReadRate
Role = _native.Role
WaitingLine = _native.WaitingLine
NO_LIMIT = _native.NO_LIMIT
"""Of a count of tokens: as many as there are."""

__all__ = [
    "NO_LIMIT",
    "BlockEngine",
    "ClusterView",
    "CopyQueue",
    "CudaCopies",
    "CudaMark",
    "EngineState",
    "NodeState",
    "PageMap",
    "PageRows",
    "PeerClosedError",
    "PeerMemory",
    "Placement",
    "PolicyCore",
    "PolicyParameters",
    "PrefillCurve",
    "PrefixCacheModel",
    "RawPutLoop",
    "RawPutTarget",
    "ReadPath",
    "ReadRate",
    "Role",
    "SimSettings",
    "TcpEngine",
    "TcpError",
    "UcxEngine",
    "UcxError",
    "UcxReport",
    "WaitingLine",
    "atomic_compare_exchange_u64",
    "atomic_fetch_add_u64",
    "atomic_load_u64",
    "atomic_store_u64",
    "buffer_address",
    "crc32c",
    "crc32c_implementation",
    "crc32c_many",
    "crc32c_portable",
    "leave_compute_cores",
    "load_ucx",
    "parse_ucx_transports",
    "simulate",
    "stream_copy_implementation",
    "ucx_candidates",
    "ucx_report",
]

UCX_LIBRARY_VARIABLE = "DUALPATH_UCX_LIBRARY"

# Where distributions, OFED and HPC-X put libucp; LD_LIBRARY_PATH comes before these.
_SYSTEM_UCX_DIRECTORIES = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/ucx/lib",
    "/opt/ucx/lib",
    "/opt/hpcx/ucx/lib",
)
_RDMA_MODULES = ("libuct_ib*.so*", "libuct_efa*.so*", "libuct_mlx5*.so*")
_RDMA_TRANSPORT = re.compile(r"(rc|dc|ud|srd|gga)(_|$)")
_UCX_RESOURCE = re.compile(r"^#\s+resource\s+\d+\s*:.*--\s*(\S+?)/", re.MULTILINE)


def buffer_address(buffer: Any) -> int:
    """The address of the first byte of a non-empty contiguous buffer (mmap, memoryview, array).

    The number stays valid only while the buffer lives. It holds no reference: an ``mmap`` can
    still be closed.
    """
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def crc32c(address: int, num_bytes: int, seed: int = 0) -> int:
    """CRC32C of ``num_bytes`` bytes at ``address``; ``seed`` continues an earlier checksum."""
    return _native.crc32c(address, num_bytes, seed)


def crc32c_portable(address: int, num_bytes: int, seed: int = 0) -> int:
    """The same value without CPU instructions, for comparison."""
    return _native.crc32c_portable(address, num_bytes, seed)


def crc32c_many(address: int, sizes: Sequence[int]) -> list[int]:
    """CRC32C of each of the adjacent ranges of ``sizes`` bytes that start at ``address``."""
    return _native.crc32c_many(address, sizes)


def crc32c_implementation() -> str:
    """``avx512+vpclmulqdq``, ``sse4.2+pclmul`` or ``portable``: what ``crc32c`` runs on here."""
    return _native.crc32c_implementation()


def stream_copy_implementation() -> str:
    """How bytes are stored into a peer's memory here: ``avx512``, ``avx2`` or ``memcpy``."""
    return _native.stream_copy_implementation()


def atomic_load_u64(address: int) -> int:
    """The 64-bit word at ``address``, read atomically. ``ValueError`` unless aligned to 8."""
    return _native.atomic_load_u64(address)


def atomic_store_u64(address: int, value: int) -> None:
    """Write the 64-bit word at ``address`` atomically, visible to every process that maps it."""
    _native.atomic_store_u64(address, value)


def atomic_fetch_add_u64(address: int, delta: int) -> int:
    """Add ``delta`` (modulo 2^64) to the word at ``address``; returns the value before."""
    return _native.atomic_fetch_add_u64(address, delta)


def atomic_compare_exchange_u64(address: int, expected: int, desired: int) -> tuple[bool, int]:
    """Write ``desired`` if the word is ``expected``; returns (written, the value before)."""
    return _native.atomic_compare_exchange_u64(address, expected, desired)


@dataclass(frozen=True, slots=True)
class UcxReport:
    """What the transport would run on here, for ``doctor`` and the logs."""

    path: str
    version: str
    transports: tuple[str, ...]

    @property
    def has_rdma(self) -> bool:
        """Whether a device, not only a library, for RDMA is there."""
        return any(_RDMA_TRANSPORT.match(transport) for transport in self.transports)


def ucx_candidates() -> list[Path]:
    """Every libucp to try, best first.

    ``DUALPATH_UCX_LIBRARY`` alone if set; else a system UCX with RDMA providers, the libucx
    wheel (which has none), then any other system UCX.
    """
    if override := os.environ.get(UCX_LIBRARY_VARIABLE):
        return [Path(override)]
    system = list(_system_ucx_libraries())
    with_rdma = [path for path in system if _has_rdma_module(path)]
    without = [path for path in system if path not in with_rdma]
    return [*with_rdma, *_wheel_ucx_libraries(), *without]


def _system_ucx_libraries() -> Iterator[Path]:
    searched = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for directory in dict.fromkeys([*searched, *_SYSTEM_UCX_DIRECTORIES]):
        library = Path(directory) / "libucp.so.0"
        if directory and library.exists():
            yield library


def _wheel_ucx_libraries() -> Iterator[Path]:
    spec = importlib.util.find_spec("libucx")
    if spec is not None and spec.origin is not None:
        library = Path(spec.origin).parent / "lib" / "libucp.so.0"
        if library.exists():
            yield library


def _has_rdma_module(library: Path) -> bool:
    modules = library.parent / "ucx"
    return any(next(modules.glob(pattern), None) is not None for pattern in _RDMA_MODULES)


@functools.lru_cache(maxsize=1)
def load_ucx() -> _native.UcxLibrary:
    """Load the best libucp, once a process.

    Raises ``NativeUnavailable``, naming every library tried and why it was refused.
    """
    failures: list[str] = []
    for candidate in ucx_candidates():
        try:
            return _native.UcxLibrary(str(candidate))
        except UcxError as exc:
            failures.append(f"{candidate}: {exc}")
    tried = "; ".join(failures) or "no libucp.so.0 was found"
    raise NativeUnavailable(
        f"no usable UCX ({tried}); `pip install libucx-cu12`, install UCX 1.13 or later, or set "
        f"{UCX_LIBRARY_VARIABLE} to a libucp.so.0"
    )


def parse_ucx_transports(context_info: str) -> tuple[str, ...]:
    """The transport names in UCX's description of a context, each once, in its order."""
    return tuple(dict.fromkeys(_UCX_RESOURCE.findall(context_info)))


def ucx_report() -> UcxReport:
    """Load UCX, open a context and say what is there. Raises ``NativeUnavailable``."""
    library = load_ucx()
    try:
        transports = parse_ucx_transports(library.context_info())
    except UcxError as exc:
        raise NativeUnavailable(f"{library.path} does not start: {exc}") from exc
    return UcxReport(library.path, library.version, transports)
