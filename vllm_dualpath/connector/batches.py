"""The copies of one step, grouped by the mover whose memory they use, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from vllm.logger import init_logger

from vllm_dualpath.connector.copies import Mark, Rows
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.reports import Report, Reports
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.connector.worker_mover import WorkerMover

logger = init_logger("vllm.dualpath.batches")


@dataclass(slots=True, eq=False)
class Batch:
    """Copies that use one mover's memory, which is kept until ``Batches.release``."""

    staging: Staging
    copies: Sequence[PageCopy]
    rows: Rows


Saved = Callable[[Sequence[PageCopy], int], object]
"""Called with the copies of a batch and a layer in which they were carried out."""


class LayerSaves:
    """Copies one batch out of the caches, as the forward pass fills them."""

    def __init__(self, batch: Batch, reports: Reports, saved: Saved) -> None:
        self.batch = batch
        self._reports = reports
        self._saved = saved

    def start(self, layer: int) -> Mark:
        """Copy one layer. In every layer of a forward pass: as little as can be."""
        report = partial(self._report, layer)
        return self._reports.submit(self.batch.rows, layer, layer + 1, report, load=False)

    def _report(self, layer: int, done: bool) -> None:
        if done:
            self._saved(self.batch.copies, layer)


class Batches:
    """Makes batches in hooks."""

    def __init__(self, mover: WorkerMover, reports: Reports) -> None:
        self._mover = mover
        self._reports = reports

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

    def save(self, batch: Batch, num_layers: int, report: Report) -> Mark:
        """Copy all layers of a batch out of the caches, then report."""
        return self._reports.submit(batch.rows, 0, num_layers, report, load=False)

    def layer_saves(self, batch: Batch, saved: Saved) -> LayerSaves:
        """Saves of a batch, layer by layer."""
        return LayerSaves(batch, self._reports, saved)

    def release(self, batch: Batch) -> None:
        """Let go of a batch's staging memory once its copies have ended, well or not."""
        self._reports.after_all(lambda _done: batch.staging.release())
