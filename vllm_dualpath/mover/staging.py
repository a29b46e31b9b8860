"""Staging memory: one memfd divided into slots, and the pools that grant them.

The memory is shared with the engine, which maps it; peers write into it through the transport. A
slot is granted to one owner at a time and returns to its pool only when nobody can still read or
write it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dualpath import native
from vllm_dualpath.errors import ConfigError


class SharedMemory:
    """A sealed-size memfd mapped read-write. ``read_only_fd`` is for those who may only look."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create(f"dualpath-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            # Who maps it need not fear a bus error.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.map = mmap.mmap(self.fd, num_bytes)
        except OSError as exc:
            os.close(self.fd)
            raise ConfigError(
                f"staging: cannot map {num_bytes} bytes of shared memory ({exc}); lower"
                " staging_bytes or raise the memory limit"
            ) from exc
        self.view = memoryview(self.map)
        self.address = native.buffer_address(self.map)

    def read_only_fd(self) -> int:
        """A new descriptor of the same memory that cannot be mapped for writing."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)


@dataclass(slots=True, eq=False)
class _Waiting:
    num_slots: int
    granted: Callable[[tuple[int, ...]], None]


class SlotPool:
    """Slots of one purpose, granted FIFO, all or nothing.

    A waiting reservation blocks later, smaller ones: otherwise a large prompt could starve. Each
    slot has a generation, raised when it is freed, so that a double free is found.
    """

    def __init__(self, name: str, first_slot: int, num_slots: int) -> None:
        self.name = name
        self.num_slots = num_slots
        self._free: deque[int] = deque(range(first_slot, first_slot + num_slots))
        self._granted: set[int] = set()
        self._generations: dict[int, int] = dict.fromkeys(self._free, 0)
        self._waiting: deque[_Waiting] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_granted(self) -> int:
        return len(self._granted)

    def generation(self, slot: int) -> int:
        """How often the slot was freed."""
        return self._generations[slot]

    def try_take(self, num_slots: int) -> tuple[int, ...] | None:
        """Slots now, or ``None``; never overtakes a reservation that waits."""
        if self._waiting or len(self._free) < num_slots:
            return None
        return self._take(num_slots)

    def reserve(
        self, num_slots: int, granted: Callable[[tuple[int, ...]], None]
    ) -> Callable[[], None]:
        """Call ``granted`` with the slots, now or later; return a function that withdraws the wait.

        Raises ``ValueError`` for more slots than the pool has: such a wait would never end.
        """
        if num_slots > self.num_slots:
            raise ValueError(
                f"pool {self.name}: {num_slots} slots asked for, the pool has {self.num_slots}"
            )
        waiting = _Waiting(num_slots, granted)
        self._waiting.append(waiting)
        self._grant()
        return lambda: self._withdraw(waiting)

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back. Raises ``AssertionError`` for one that is not granted: our own bug."""
        for slot in slots:
            assert slot in self._granted, f"pool {self.name}: slot {slot} freed twice"
            self._granted.remove(slot)
            self._generations[slot] += 1
            self._free.append(slot)
        self._grant()

    def _withdraw(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0].num_slots <= len(self._free):
            waiting = self._waiting.popleft()
            waiting.granted(self._take(waiting.num_slots))

    def _take(self, num_slots: int) -> tuple[int, ...]:
        slots = tuple(self._free.popleft() for _ in range(num_slots))
        self._granted.update(slots)
        return slots
