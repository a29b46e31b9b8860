"""What both sides work out at start from vLLM's configuration, with every check that can fail."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import EngineConfig, parse_engine_config
from vllm_dualpath.connector.identity import ModelIdentity, identify
from vllm_dualpath.connector.plugin import URL_VARIABLE, check_vllm_version
from vllm_dualpath.connector.quota_scheduler import check_quota_is_used
from vllm_dualpath.connector.unsupported import check_supported
from vllm_dualpath.control.runtime_dir import mover_socket_path, runtime_dir
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.messages import PROTOCOL_VERSION, GeometrySpec, MoverSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One engine as its connector knows it. Equal on both sides."""

    config: EngineConfig
    identity: ModelIdentity
    engine_id: str
    url: str
    model: str
    max_model_len: int
    num_cache_blocks: int
    prefix_caching: bool
    """Whether vLLM keeps the blocks of finished prompts."""
    async_scheduling: bool
    """Whether vLLM orders a step before it knows how the last one ended."""
    socket_path: Path

    @classmethod
    def make(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> EngineSetup:
        """Check everything, then work it out. Raises ``ConfigError``."""
        check_vllm_version()
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        config = parse_engine_config(transfer.kv_connector_extra_config)
        check_supported(vllm_config, kv_cache_config)
        if config.profile is not None:
            check_quota_is_used(vllm_config)
        directory = runtime_dir(config.runtime_dir)
        rank = vllm_config.parallel_config.data_parallel_rank
        served = vllm_config.model_config.served_model_name
        return cls(
            config=config,
            identity=identify(vllm_config, kv_cache_config, config, directory / "digests.json"),
            engine_id=config.name or str(transfer.engine_id),
            url=_engine_url(config),
            model=str(served[0] if isinstance(served, list) else served),
            max_model_len=vllm_config.model_config.max_model_len,
            num_cache_blocks=kv_cache_config.num_blocks,
            prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            async_scheduling=bool(vllm_config.scheduler_config.async_scheduling),
            socket_path=mover_socket_path(directory, f"{transfer.engine_id}-{rank}"),
        )

    def mover_spec(self, geometry: Geometry) -> MoverSpec:
        """What the mover is started with."""
        return MoverSpec(
            version=PROTOCOL_VERSION,
            engine_id=self.engine_id,
            socket_path=str(self.socket_path),
            config=self.config.model_dump(mode="json"),
            url=self.url,
            model=self.model,
            fingerprint=self.identity.fingerprint,
            root=self.identity.root,
            geometry=GeometrySpec.of(geometry),
            max_model_len=self.max_model_len,
            kv_tokens=self.num_cache_blocks * geometry.page_tokens,
            prefix_caching=self.prefix_caching,
        )


def _engine_url(config: EngineConfig) -> str:
    url = config.url or os.environ.get(URL_VARIABLE, "")
    if not url and config.router is not None:
        raise ConfigError(
            "kv_connector_extra_config.url: expected this server's address for the router, found"
            " none; set it, e.g. http://127.0.0.1:8000 (it is found by itself under `vllm serve`)"
        )
    return url
