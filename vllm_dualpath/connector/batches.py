"""The copies of one step, grouped by the mover whose memory they use, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm.logger import init_logger

from vllm_dualpath.connector.copies import CopyEngine, CopyThread, Mark, Rows
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.connector.worker_mover import WorkerMover

logger = init_logger("vllm.dualpath.batches")


@dataclass(slots=True, eq=False)
class Batch:
    """Copies that use one mover's memory, which is kept until ``Batches.release``."""

    staging: Staging
    copies: Sequence[PageCopy]
    rows: Rows
    last_mark: Mark = None
    """Of the last copy submitted."""


class Batches:
    """Makes batches in hooks, and goes on after their copies on the copy thread."""

    def __init__(self, mover: WorkerMover, engine: CopyEngine, thread: CopyThread) -> None:
        self._mover = mover
        self._engine = engine
        self._thread = thread

    def each(
        self, copies: Sequence[PageCopy], drop: Callable[[Sequence[PageCopy]], None]
    ) -> Iterator[Batch]:
        """Batches of ``copies``, to be released one by one.

        ``drop`` gets those whose mover's memory is gone, and those that make no sense.
        """
        by_boot: dict[bytes, list[PageCopy]] = {}
        for copy in copies:
            by_boot.setdefault(copy.claim.boot_id, []).append(copy)
        for boot_id, group in by_boot.items():
            staging = self._mover.acquire(boot_id)
            if staging is None:
                drop(group)
                continue
            try:
                rows = staging.rows(group)
            except Exception:
                staging.release()
                logger.exception("copies for mover %s cannot be made", boot_id.hex()[:8])
                drop(group)
                continue
            yield Batch(staging, group, rows)

    def release(self, batch: Batch) -> None:
        """Let go of a batch's staging memory once its copies have ended, well or not."""
        self.after(batch.last_mark, batch.staging.release, batch.staging.release)

    def after(
        self, mark: Mark, then: Callable[[], object], failed: Callable[[], object] | None = None
    ) -> None:
        """Call ``then`` once ``mark`` is reached, or ``failed`` if its copy failed, after all
        earlier calls of this kind.
        """

        def wait_then() -> None:
            try:
                self._engine.wait(mark)
            except Exception:
                if failed is not None:
                    failed()
                raise
            then()

        self._thread.put(wait_then)
