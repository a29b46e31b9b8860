"""Copies for caches on a GPU through NVIDIA's driver, and the choice among the ways to make them.

None of them is trusted unseen: whichever is used has just moved a pattern out of device memory and
back, on this GPU, with this driver.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyEngine, page_map, page_rows
from vllm_dualpath.connector.copy_self_test import self_test
from vllm_dualpath.connector.index_copies import IndexCopies, register_memory, unregister_memory
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.errors import ConfigError, DualPathError, TransferTimeout
from vllm_dualpath.native import CudaCopies, CudaMark, PageMap, PageRows

logger = init_logger("vllm.dualpath.copies")

_JOIN_S = 10.0
_WARN_S = 30.0


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Registered staging memory, and where the pages lie in it."""

    host: torch.Tensor
    pages: PageMap


class DriverCopies:
    """Copies by the driver's copy engines, handed over by a native thread.

    ``method`` is ``batch`` (one call for all pages of a layer, CUDA 12.8 and later) or ``single``.
    """

    def __init__(self, device: torch.device, method: str) -> None:
        self._device = device
        self._copies = CudaCopies(device.index or 0, method)

    def map(
        self, caches: PagedCaches, memory: mmap.mmap, num_slots: int, geometry: Geometry
    ) -> _Mapping:
        host = torch.frombuffer(memory, dtype=torch.uint8)
        register_memory(host)
        return _Mapping(host, page_map(caches, host.data_ptr(), num_slots, geometry))

    def unmap(self, mapping: _Mapping) -> None:
        unregister_memory(mapping.host)

    def rows(self, mapping: _Mapping, copies: Sequence[PageCopy]) -> PageRows:
        return page_rows(mapping.pages, copies)

    def submit(
        self,
        rows: PageRows,
        first_layer: int,
        end_layer: int,
        *,
        load: bool,
        reported: bool = False,
    ) -> CudaMark:
        return self._copies.submit(
            rows, load, first_layer, end_layer, self.now(), reported=reported
        )

    def submit_barrier(self) -> None:
        self._copies.submit_barrier()

    def wait_reports(self, seen: int) -> tuple[int, str]:
        return self._copies.wait_reports(seen, _WARN_S)

    def submit_layers(self, rows: PageRows, *, load: bool) -> list[CudaMark]:
        after = self.now()
        layers = range(rows.num_layers)
        return [self._copies.submit(rows, load, layer, layer + 1, after) for layer in layers]

    def submit_background(
        self, rows: PageRows, first_layer: int, end_layer: int, after: CudaMark, *, load: bool
    ) -> CudaMark:
        return self._copies.submit(rows, load, first_layer, end_layer, after, background=True)

    def hold_forward(self, mark: CudaMark | None) -> float:
        if mark is None:
            return 0.0
        started = time.perf_counter()
        while not self._copies.hold(self._stream(), mark, _WARN_S):
            logger.warning("a copy of KV pages was not started in %.0f s; waiting on", _WARN_S)
        return time.perf_counter() - started

    def now(self) -> CudaMark:
        return self._copies.now(self._stream())

    def wait(self, mark: CudaMark | None) -> None:
        while mark is not None and not self._copies.wait(mark, _WARN_S):
            logger.warning("a copy of KV pages was not started in %.0f s; waiting on", _WARN_S)

    def close(self) -> None:
        if not self._copies.close(_JOIN_S):
            raise TransferTimeout(f"copies of KV pages did not end in {_JOIN_S} s")

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


WAYS: dict[str, Callable[[torch.device], CopyEngine]] = {
    "batched driver copies": lambda device: DriverCopies(device, "batch"),
    "single driver copies": lambda device: DriverCopies(device, "single"),
    "index kernels": IndexCopies,
}
"""Best first."""


def choose_engine(
    device: torch.device, ways: dict[str, Callable[[torch.device], CopyEngine]] = WAYS
) -> CopyEngine:
    """The first way that passes the self test. Raises ``ConfigError`` if none does."""
    problems = []
    for name, make in ways.items():
        try:
            engine = make(device)
            self_test(engine, device)
        except (DualPathError, RuntimeError) as exc:
            problems.append(f"{name}: {exc}")
            logger.warning("copies on %s by %s cannot be used: %s", device, name, exc)
            continue
        logger.info("copies on %s by %s", device, name)
        return engine
    raise ConfigError(f"KV caches on {device}: no way to copy them: " + "; ".join(problems))
