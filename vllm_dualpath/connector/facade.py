"""The class that vLLM instantiates, once in the scheduler's process and once in each worker's.

Every method forwards to the guarded side of its process. Works under its registered name
(``"kv_connector": "DualPathConnector"``) and by vLLM's dotted form, with this module as
``kv_connector_module_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)

from vllm_dualpath.connector.guard import GuardedScheduler, GuardedWorker
from vllm_dualpath.connector.metadata import DualPathMetadata
from vllm_dualpath.connector.scheduler import SchedulerSide
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.stats import DualPathPromMetrics, DualPathStats
from vllm_dualpath.connector.worker import WorkerSide
from vllm_dualpath.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class DualPathConnector(KVConnectorBase_V1):
    """Loads stored KV through the node's mover, and stores new KV. Raises ``ConfigError`` at
    start.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        setup = EngineSetup.make(vllm_config, kv_cache_config)
        self._engine_role = setup.config.role
        self._scheduler_side: GuardedScheduler | None = None
        self._worker_side: GuardedWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler_side = GuardedScheduler(SchedulerSide(setup))
        else:
            self._worker_side = GuardedWorker(WorkerSide(setup))

    @property
    def _scheduler(self) -> GuardedScheduler:
        if self._scheduler_side is None:
            raise ConfigError("DualPathConnector: a scheduler hook was called in a worker")
        return self._scheduler_side

    @property
    def _worker(self) -> GuardedWorker:
        if self._worker_side is None:
            raise ConfigError("DualPathConnector: a worker hook was called in the scheduler")
        return self._worker_side

    @property
    def requires_kv_delivery(self) -> bool:
        return self._engine_role == "prefill"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Only prefill engines use the layer hooks; others keep their full graphs."""
        return extra_config.get("role") == "prefill"

    # --- both sides ------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> DualPathStats | None:
        return (self._scheduler_side or self._worker).take_stats()

    def shutdown(self) -> None:
        (self._scheduler_side or self._worker).shutdown()

    # --- worker side -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Not guarded: this is start, where errors belong to the user."""
        self._worker.side.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:  # noqa: ARG002
        self._worker.fence()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, DualPathMetadata)
        self._worker.bind(connector_metadata)

    def has_connector_metadata(self) -> bool:
        """Asked in every layer, whose hooks are called where it says yes: most steps have nothing
        for them.
        """
        worker = self._worker_side
        return worker is not None and bool(worker.side.load_marks or worker.side.step.saves)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,  # noqa: ARG002 # registered already
        attn_metadata: AttentionMetadata,  # noqa: ARG002 # pages are known without it
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        self._worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        self._worker.finish_saves()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received, failed = self._worker.results(finished_req_ids)
        return KVConnectorTransferResults(sent, received, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The older form of ``get_transfer_results``, which cannot tell failures."""
        sent, received, _ = self._worker.results(finished_req_ids)
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid_blocks()

    # --- scheduler side --------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.side.bind_cache_manager(kv_cache_manager)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> DualPathMetadata:
        return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.update(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request, block_ids), None

    def has_pending_push_work(self) -> bool:
        return self._scheduler.has_pending_work()

    def reset_cache(self) -> bool:
        return self._scheduler.reset()

    # --- statistics ------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return DualPathStats() if data is None else DualPathStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return DualPathPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
