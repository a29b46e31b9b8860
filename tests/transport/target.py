"""The target of a transport test: in this process for the loopback, in a child for UCX."""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import select
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dualpath import native
from vllm_dualpath.transport import NoticeReceived, Transport, make_transport

DEADLINE_S = 20.0


class Memory:
    """A memfd mapped twice, as a mover and its worker map staging: register one, read the other."""

    def __init__(self, num_bytes: int) -> None:
        self.fd = os.memfd_create("transport-test", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.num_bytes = num_bytes
        self.registered = mmap.mmap(self.fd, num_bytes, mmap.MAP_SHARED)
        self.other = mmap.mmap(self.fd, num_bytes, mmap.MAP_SHARED)
        self.address = native.buffer_address(self.registered)

    def crc32c(self, offset: int, num_bytes: int) -> int:
        return native.crc32c(native.buffer_address(self.other) + offset, num_bytes)


class Target:
    """What the receiving side does, on a transport and memory of its own."""

    def __init__(self, kind: str, num_bytes: int, share: bool = True) -> None:
        self.transport: Transport = make_transport(kind)
        self.memory = Memory(num_bytes)
        self.region = self.transport.register(
            self.memory.address, num_bytes, fd=self.memory.fd if share else None
        )
        self._notices: deque[tuple[bytes, int]] = deque()

    def hello(self) -> tuple[bytes, bytes, int]:
        return self.transport.address, self.region.descriptor, self.memory.address

    def next_notice(self, checked_bytes: int, timeout_s: float) -> tuple[bytes, int] | None:
        """The next notice and the CRC of the first bytes at the time it was read."""
        deadline = time.monotonic() + timeout_s
        while not self._notices:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.transport.fileno()], [], [], left)[0]:
                return None
            for event in self.transport.poll():
                if isinstance(event, NoticeReceived):
                    self._notices.append((event.payload, self.memory.crc32c(0, checked_bytes)))
        return self._notices.popleft()

    def read(self, offset: int, num_bytes: int) -> bytes:
        return self.memory.other[offset : offset + num_bytes]

    def cpu_seconds_while_idle(self, seconds: float) -> float:
        before = time.process_time()
        time.sleep(seconds)
        return time.process_time() - before

    def close(self) -> float:
        """How long closing the transport took."""
        before = time.monotonic()
        self.transport.close()
        return time.monotonic() - before


def _serve(pipe: Any, environment: dict[str, str], kind: str, num_bytes: int, share: bool) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the fork server's is as old as its first child
    target = Target(kind, num_bytes, share)
    while True:
        name, arguments = pipe.recv()
        if name == "exit":
            return
        pipe.send(getattr(target, name)(*arguments))


class ProcessTarget:
    """A ``Target`` in a child process; every call has a deadline."""

    def __init__(self, kind: str, num_bytes: int, share: bool = True) -> None:
        # Forked from a process that has imported this module and nothing more: as clean as a new
        # one, without half a second of imports for each test.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, dict(os.environ), kind, num_bytes, share)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> Any:
            self._pipe.send((name, arguments))
            assert self._pipe.poll(DEADLINE_S), f"the target does not answer {name}"
            return self._pipe.recv()

        return call

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE_S)
        assert not self.process.is_alive()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)
