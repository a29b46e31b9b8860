"""Moving bytes with UCX: TCP or RDMA between hosts, plain stores to peers on this host.

The work is done by ``native.UcxEngine`` and its progress thread. Here opaque addresses and
descriptors are packed and checked, and native events and errors become those of ``base``.

There are three ways to a peer, in order of preference:

1. *Stores*: a peer on this host whose region is a shared file (a memfd) that we can map. UCX
   carries the notices alone. ``UCX_TLS`` without any shared-memory transport forbids it.
2. *CMA*: a peer on this host whose memory UCX can write by system call. Both go by UCX's worker
   address, without UCX's failure handling, which rules out its shared-memory transports: the death
   of such a peer is for the caller to notice, who then calls ``disconnect``.
3. *The network*, through the peer's listener, with failure handling: a loss arrives as
   ``PeerClosed``. Also a peer on this host that the other ways cannot reach: UCX 1.22 would take
   TCP for it all the same, and over TCP to a worker address a target crashes now and then, when
   it connects back while it receives its first large put.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import msgspec

from vllm_dualpath import native
from vllm_dualpath.errors import TransportError
from vllm_dualpath.transport.base import Region
from vllm_dualpath.transport.engine import EngineTransport, check_advertised, kernel_id
from vllm_dualpath.transport.frames import pack, translated, unpack

logger = logging.getLogger(__name__)

MAX_INFLIGHT_BYTES = 64 << 20
MAX_PUT_BYTES = 1 << 20

_NAMESPACES = ("pid", "user")
_SHARED_MEMORY = frozenset({"cma", "posix", "sysv", "xpmem", "knem"})


class _Address(msgspec.Struct, frozen=True, array_like=True, tag="ucx-address-2"):
    """UCX address."""

    nonce: bytes
    host: str
    port: int
    worker_address: bytes
    memory_domain: str
    has_cma: bool
    has_rdma: bool


class _File(msgspec.Struct, frozen=True, array_like=True):
    """A shared file that a process has open: see ``SharedFile`` in csrc/ucx/peer_memory.hpp."""

    pid: int
    fd: int
    device: int
    inode: int


class _Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="ucx-region-2"):
    """UCX region descriptor."""

    nonce: bytes
    address: int
    num_bytes: int
    key: bytes
    file: _File | None


class UcxTransport(EngineTransport):
    """One UCX worker with its listener and progress thread.

    Args:
        listen_host: numeric IP address to accept peers of other hosts on.
        listen_port: 0 picks a free one.
        advertise_host: numeric IP address peers connect to, where ``listen_host`` is a wildcard.
        max_inflight_bytes: bound of what is handed to UCX and cannot be taken back.
        max_put_bytes: adjacent pieces are merged up to this, larger ones are split.

    Raises ``NativeUnavailable`` without a usable UCX, ``TransportError`` when it does not start.
    """

    def __init__(
        self,
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        *,
        advertise_host: str | None = None,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        max_put_bytes: int = MAX_PUT_BYTES,
    ) -> None:
        super().__init__()
        self._host = advertise_host or listen_host
        library = native.load_ucx()
        with translated():
            check_advertised(self._host)
            self._engine: native.UcxEngine = native.UcxEngine(
                library, listen_host, listen_port, max_inflight_bytes, max_put_bytes
            )
        info = self._engine.context_info()
        self._report = native.UcxReport(
            library.path, library.version, native.parse_ucx_transports(info)
        )
        self._nonce = secrets.token_bytes(16)
        self._memory_domain = _memory_domain(self._report.transports)
        self._has_cma = "cma" in self._report.transports
        logger.info("%s from %s", self.name, library.path)

    @property
    def name(self) -> str:
        return f"ucx {self._report.version} ({','.join(self._report.transports)})"

    @property
    def address(self) -> bytes:
        return pack(
            _Address(
                nonce=self._nonce,
                host=self._host,
                port=self._engine.listen_port,
                worker_address=self._engine.worker_address,
                memory_domain=self._memory_domain,
                has_cma=self._has_cma,
                has_rdma=self._report.has_rdma,
            )
        )

    @property
    def report(self) -> native.UcxReport:
        """The library and its transports."""
        return self._report

    def suits(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> bool:
        """Whether there is a way by shared memory or RDMA to this peer.

        Raises ``TransportError`` on bad input.
        """
        peer = unpack(peer_address, _Address)
        file = unpack(region_descriptor, _Descriptor).file
        if same_host and peer.memory_domain == self._memory_domain != "" and _may_open(file):
            return True
        return peer.has_rdma and self._report.has_rdma

    def register(self, address: int, num_bytes: int, *, fd: int | None = None) -> Region:
        self._check_open()
        with translated():
            key = self._engine.register_region(address, num_bytes)
            file = None if fd is None else _describe_file(fd)
        descriptor = _Descriptor(self._nonce, address, num_bytes, key, file)
        return Region(address, num_bytes, pack(descriptor))

    def connect(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> int:
        self._check_open()
        peer = unpack(peer_address, _Address)
        region = unpack(region_descriptor, _Descriptor)
        if peer.nonce != region.nonce:
            raise TransportError("address and region descriptor are of different transports")
        local = same_host and peer.memory_domain == self._memory_domain != ""
        memory = self._map(region) if local else None
        by_memory = memory is not None or (local and peer.has_cma and self._has_cma)
        if not by_memory:
            self._warn_of_slow_path(peer, same_host)
        with translated():
            return self._engine.connect(
                host="" if by_memory else peer.host,
                port=peer.port,
                worker_address=peer.worker_address,
                remote_key=region.key,
                remote_address=region.address,
                remote_bytes=region.num_bytes,
                memory=memory,
            )

    def _map(self, region: _Descriptor) -> native.PeerMemory | None:
        """The peer's memory in this process, if the kernel allows it."""
        file = region.file
        if file is None:
            return None
        try:
            return native.PeerMemory(
                file.pid, file.fd, file.device, file.inode, region.address, region.num_bytes
            )
        except (OSError, RuntimeError, TypeError) as exc:
            logger.info("a peer's memory cannot be mapped, trying CMA: %s", exc)
            return None

    def _warn_of_slow_path(self, peer: _Address, same_host: bool) -> None:
        if same_host:
            logger.warning(
                "no shared memory with a peer on this host (UCX_TLS, another PID namespace, or "
                "forbidden): bytes to it go by the network; see `vllm-dualpath doctor`"
            )
        elif not self._report.has_rdma:
            logger.warning(
                "UCX (%s) has no RDMA transport: bytes to %s go by TCP; see `vllm-dualpath doctor`",
                self._report.path,
                peer.host,
            )


def _memory_domain(transports: tuple[str, ...]) -> str:
    """What two processes that reach each other's memory have in common; empty if UCX may not."""
    if _SHARED_MEMORY.isdisjoint(transports):
        return ""
    return ":".join(
        [kernel_id(), *(str(Path(f"/proc/self/ns/{ns}").readlink()) for ns in _NAMESPACES)]
    )


def _describe_file(fd: int) -> _File:
    stat = os.fstat(fd)
    return _File(os.getpid(), fd, stat.st_dev, stat.st_ino)


def _may_open(file: _File | None) -> bool:
    """False if the kernel forbids to open the peer's file: then CMA, which asks more, is too."""
    if file is None:
        return True
    try:
        Path(f"/proc/{file.pid}/fd/{file.fd}").stat()
    except PermissionError:
        return False
    except OSError as exc:
        logger.debug("a peer's memory is gone, it will be found dead: %s", exc)
    return True
