"""Which model's KV this engine makes: geometry of its pages, fingerprint of its weights.

Everything that changes the bytes of a page, or their meaning, goes into the fingerprint, and the
fingerprint starts the hash chain: two engines share a block only if they would have computed it
alike.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import KVCacheSpec, UniformTypeKVCacheSpecs

from vllm_dualpath.blocks import Geometry, chain_root
from vllm_dualpath.config import divide_staging
from vllm_dualpath.connector.weights import weights_digest
from vllm_dualpath.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_dualpath.config import EngineConfig

DEFAULT_BLOCK_TOKENS = 64

_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
"""Keys of a Hugging Face config that differ between copies of one model."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What an engine says of its model, before the caches exist."""

    geometry: Geometry
    """As vLLM planned it; the worker refines ``layout`` once it sees the caches."""
    layer_names: tuple[str, ...]
    fingerprint: bytes

    @property
    def root(self) -> bytes:
        """The chain's start for requests without a ``cache_salt``."""
        return chain_root(self.fingerprint)


def identify(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    config: EngineConfig,
    digest_cache: Path,
) -> ModelIdentity:
    """Work out geometry and fingerprint. Raises ``ConfigError`` where one cannot be had.

    ``digest_cache`` is a file that remembers the digests of weight files, so that two processes of
    one engine hash them once.
    """
    geometry, layer_names = page_geometry(vllm_config, kv_cache_config, config.block_tokens)
    divide_staging(config, geometry, vllm_config.model_config.max_model_len)
    facts = {
        "weights": config.model_id or weights_digest(vllm_config, digest_cache),
        "hf_config": _hf_config(vllm_config),
        "dtype": str(vllm_config.model_config.dtype),
        "quantization": str(vllm_config.model_config.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "geometry": repr(geometry),
    }
    canonical = json.dumps(facts, sort_keys=True, default=str)
    return ModelIdentity(geometry, layer_names, hashlib.sha256(canonical.encode()).digest())


def layer_specs(kv_cache_config: KVCacheConfig) -> dict[str, KVCacheSpec]:
    """The spec of each layer of the only KV cache group, in the model's order."""
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return {name: spec.kv_cache_specs[name] for name in group.layer_names}
    return dict.fromkeys(group.layer_names, spec)


def page_geometry(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, block_tokens: int | None
) -> tuple[Geometry, tuple[str, ...]]:
    """The geometry as vLLM planned it, and the layers' names. Raises ``ConfigError``.

    ``block_tokens``: of a Full Block; none: the default for vLLM's block size.
    """
    specs = layer_specs(kv_cache_config)
    first = next(iter(specs.values()))
    page_tokens = first.block_size
    block_tokens = block_tokens or -(-DEFAULT_BLOCK_TOKENS // page_tokens) * page_tokens
    if block_tokens % page_tokens:
        raise ConfigError(
            f"kv_connector_extra_config.block_tokens: expected a multiple of vLLM's block size"
            f" {page_tokens}, found {block_tokens}; change it or --block-size"
        )
    layout = kv_cache_config.kv_cache_layout
    if layout is None:
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout().name
    geometry = Geometry(
        block_tokens=block_tokens,
        page_tokens=page_tokens,
        layer_page_bytes=tuple(_page_bytes(spec) for spec in specs.values()),
        layout=layout,
        kv_heads=getattr(first, "num_kv_heads", 1),
        kv_dtype=str(getattr(first, "dtype", "")).removeprefix("torch."),
    )
    return geometry, tuple(specs)


def _page_bytes(spec: KVCacheSpec) -> int:
    """Bytes of a page without the padding that another allocation might not have."""
    unpadded = getattr(spec, "unpadded_page_size_bytes", None)
    return spec.page_size_bytes if unpadded is None else int(unpadded)


def _hf_config(vllm_config: VllmConfig) -> dict[str, object]:
    values = vllm_config.model_config.hf_config.to_dict()
    return {key: value for key, value in values.items() if key not in _VOLATILE_KEYS}
