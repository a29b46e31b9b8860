"""The worker's mover: starts it, maps its staging memory, lets go of it when it died."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from pathlib import Path

from vllm.logger import init_logger

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.attach import MoverConnection
from vllm_dualpath.connector.copies import CopyEngine
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.connector.supervisor import MoverProcess
from vllm_dualpath.messages import Attached, LocalMessage, Mapped, MoverSpec

logger = init_logger("vllm.dualpath.worker")

_MAP_WAIT_S = 5.0
_IDLE_S = 2.0
"""A worker without a step for this long has no order of the scheduler's on its way."""
_RECHECK_S = 0.1
_RETIRE_S = 60.0


class WorkerMover:
    """The worker's end of its mover's life. The steps' methods and ``acquire`` are for hooks."""

    def __init__(
        self,
        spec: MoverSpec,
        geometry: Geometry,
        caches: PagedCaches,
        engine: CopyEngine,
        on_message: Callable[[LocalMessage], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._geometry = geometry
        self._caches = caches
        self._engine = engine
        self._on_message = on_message
        self._on_lost = on_lost
        self._process = MoverProcess(spec)
        self._staging: Staging | None = None
        self._named: Set[bytes] = frozenset()
        self._in_step = False
        self._retiring = False
        """Somebody waits until no step names the last mover any more."""
        self._scheduler_boot: bytes | None = None
        self._last_step_s = self._lost_s = time.monotonic()
        self._gone: bytes | None = None
        self._changed = threading.Condition()
        self._closing = False
        self.connection = MoverConnection(Path(spec.socket_path), "worker", self)

    def begin_step(self, scheduler_boot: bytes | None, boot_ids: Set[bytes]) -> None:
        """A step's orders arrived: they name the movers ``boot_ids``, none of later steps will name
        one older than ``scheduler_boot``.

        The mapping of a mover that the step names stays until ``end_step``.
        """
        self._in_step = True
        if not boot_ids and scheduler_boot == self._scheduler_boot and not self._retiring:
            return  # as nearly every step: nothing changes for anybody
        with self._changed:
            self._scheduler_boot = scheduler_boot
            self._named = boot_ids
            self._changed.notify_all()

    def end_step(self) -> None:
        """The step has acquired what its orders use."""
        self._in_step = False
        self._last_step_s = time.monotonic()
        if self._named:
            with self._changed:
                self._named = frozenset()
                self._changed.notify_all()

    def acquire(self, boot_id: bytes) -> Staging | None:
        """The staging memory of mover ``boot_id``, to be released after use; ``None`` if it is
        gone.

        Waits for a mapping that is being made: the scheduler side may attach first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._known(boot_id), _MAP_WAIT_S)
            staging = self._staging
            if staging is not None and staging.boot_id == boot_id and staging.acquire():
                return staging
        return None

    def close(self) -> None:
        """Disconnect, let the mover end, unmap. Raises ``TransferTimeout``."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        was_attached = self.connection.boot_id is not None
        self.connection.close()
        self._process.stop(was_attached=was_attached)
        self._retire()

    def prepare(self) -> None:
        self._wait_until_unused()
        self._retire()
        self._process.ensure_running()

    def attached(self, attached: Attached, fds: list[int]) -> None:
        self._retiring = False
        staging = Staging(attached, fds[0], self._geometry, self._caches, self._engine)
        with self._changed:
            self._staging = staging
            self._changed.notify_all()
        self.connection.send_surely(attached.boot_id, Mapped())

    def received(self, message: LocalMessage) -> None:
        self._on_message(message)

    def lost(self) -> None:
        with self._changed:
            self._lost_s = time.monotonic()
        self._on_lost()

    def _known(self, boot_id: bytes) -> bool:
        """Whether it is settled if that mover's memory is mapped."""
        mapped = self._staging is not None and self._staging.boot_id == boot_id
        return mapped or boot_id == self._gone or self._closing

    def _wait_until_unused(self) -> None:
        """Until no order that names the last mover can arrive: the scheduler side has moved on.

        The scheduler side loses its connection when we lose ours. It says so in its next step;
        where there are no steps, nothing it ordered before is on its way any more.
        """
        self._retiring = True
        with self._changed:
            while self._staging is not None and not self._closing:
                moved_on = (
                    self._last_step_s > self._lost_s
                    and self._scheduler_boot != self._staging.boot_id
                )
                idle_s = time.monotonic() - max(self._last_step_s, self._lost_s)
                named = self._staging.boot_id in self._named
                # While a step runs the next one may be on its way already.
                is_idle = not self._in_step and idle_s >= _IDLE_S
                if not named and (moved_on or is_idle):
                    return
                self._changed.wait(None if named else max(_IDLE_S - idle_s, _RECHECK_S))

    def _retire(self) -> None:
        staging = self._staging
        if staging is not None:
            staging.retire(_RETIRE_S)
            with self._changed:
                self._staging = None
                self._gone = staging.boot_id
