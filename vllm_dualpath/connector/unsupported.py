"""What the connector does not cover yet, in one table: start is refused, by name, with all reasons
at once.

Requests that must not load are listed here as well; they are computed as if there were no
connector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config_or_none
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SparseCacheRole,
    iter_layer_specs,
)

from vllm_dualpath.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_PLAIN_SPECS = (FullAttentionSpec, MLAAttentionSpec)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is refused. ``find`` returns what was found, or ``None`` if all is well."""

    what: str
    where: str
    expected: str
    find: Callable[[VllmConfig, KVCacheConfig], object]
    remedy: str


RULES = (
    Rule(
        "load failures that fail requests",
        "--kv-transfer-config kv_load_failure_policy",
        "'recompute'",
        lambda vllm, _: _failure_policy(vllm),
        "set it to recompute, of a MultiConnector too: a lost mover must not end requests",
    ),
    Rule(
        "a one-sided kv_role",
        "--kv-transfer-config kv_role",
        "'kv_both'",
        lambda vllm, _: _unless(_transfer(vllm).kv_role, "kv_both"),
        "set it to kv_both; the engine's role is kv_connector_extra_config.role",
    ),
    Rule(
        "tensor parallelism",
        "--tensor-parallel-size",
        "1",
        lambda vllm, _: _unless(vllm.parallel_config.tensor_parallel_size, 1),
        "run one engine a GPU",
    ),
    Rule(
        "pipeline parallelism",
        "--pipeline-parallel-size",
        "1",
        lambda vllm, _: _unless(vllm.parallel_config.pipeline_parallel_size, 1),
        "run without it",
    ),
    Rule(
        "data parallelism inside one engine",
        "--data-parallel-size",
        "1",
        lambda vllm, _: _unless(vllm.parallel_config.data_parallel_size, 1),
        "start one server a rank and let the router balance them",
    ),
    Rule(
        "context parallelism",
        "--decode-context-parallel-size, --prefill-context-parallel-size",
        "1",
        lambda vllm, _: _unless(
            vllm.parallel_config.decode_context_parallel_size
            * vllm.parallel_config.prefill_context_parallel_size,
            1,
        ),
        "run without it",
    ),
    Rule(
        "speculative decoding",
        "--speculative-config",
        "none",
        lambda vllm, _: vllm.speculative_config and vllm.speculative_config.method,
        "run without it",
    ),
    Rule(
        "LoRA adapters",
        "--enable-lora",
        "off",
        lambda vllm, _: vllm.lora_config and "on",
        "serve a merged model",
    ),
    Rule(
        "multimodal models",
        "model",
        "a text model",
        lambda vllm, _: vllm.model_config.is_multimodal_model and vllm.model_config.model,
        "serve it without the connector, or with --language-model-only where vLLM allows that",
    ),
    Rule(
        "encoder-decoder models",
        "model",
        "a decoder-only model",
        lambda vllm, _: vllm.model_config.is_encoder_decoder and vllm.model_config.model,
        "serve it without the connector",
    ),
    Rule(
        "models that do not generate token by token",
        "model",
        "a generative model",
        lambda vllm, _: (
            "a diffusion model"
            if vllm.model_config.is_diffusion
            else _unless(vllm.model_config.runner_type, "generate")
        ),
        "serve it without the connector",
    ),
    Rule(
        "several KV cache groups",
        "model",
        "1 group",
        lambda _, cache: _unless(len(cache.kv_cache_groups), 1),
        "serve it without the connector: hybrid attention is not covered yet",
    ),
    Rule(
        "attention kinds other than full attention and MLA",
        "model",
        "full attention or MLA in every layer",
        lambda _, cache: ", ".join(
            sorted({type(s).__name__ for s in _specs(cache) if not _plain(s)})
        ),
        "serve it without the connector",
    ),
    Rule(
        "sparse-attention indexer caches",
        "model",
        "no indexer layers",
        lambda vllm, cache: _indexer(vllm, cache),
        "serve it without the connector: vLLM reads indexer keys before it asks for the layer",
    ),
    Rule(
        "fast prefill with shared KV layers",
        "--kv-sharing-fast-prefill",
        "off",
        lambda vllm, _: vllm.cache_config.kv_sharing_fast_prefill and "on",
        "turn it off",
    ),
)


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise one ``ConfigError`` that names everything in the configuration that is not covered."""
    problems = []
    for rule in RULES:
        found = rule.find(vllm_config, kv_cache_config)
        if found:
            problems.append(
                f"  {rule.what}: {rule.where}: expected {rule.expected}, found {found};"
                f" {rule.remedy}"
            )
    if problems:
        raise ConfigError(
            f"DualPathConnector does not cover this configuration, {len(problems)} problem(s)\n"
            + "\n".join(problems)
        )


def why_not_loadable(request: Request) -> str | None:
    """Why the KV of ``request`` must neither be loaded nor stored, or ``None`` if it may."""
    if request.pooling_params is not None:
        return "pooling"
    if request.mm_features:
        return "multimodal"
    if request.lora_request is not None:
        return "lora"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.resumable:
        return "streaming_input"
    return None


def _transfer(vllm_config: VllmConfig):  # type: ignore[no-untyped-def] # vLLM's decorated config class
    return vllm_config.kv_transfer_config


def _unless(found: object, expected: object) -> object:
    return None if found == expected else repr(found)


def _failure_policy(vllm: VllmConfig) -> object:
    """What is not ``recompute``. Of several connectors vLLM goes by what stands around them, which
    a worker's connector can see while it is made, and a scheduler's cannot.
    """
    around = get_current_vllm_config_or_none()
    configs = [vllm] if around is None or around.kv_transfer_config is None else [vllm, around]
    found = (_unless(_transfer(each).kv_load_failure_policy, "recompute") for each in configs)
    return next(filter(None, found), None)


def _specs(cache: KVCacheConfig) -> list[KVCacheSpec]:
    return [
        spec for group in cache.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)
    ]


def _plain(spec: KVCacheSpec) -> bool:
    """Exactly these classes: a subclass exists because something about it differs."""
    return type(spec) in _PLAIN_SPECS and spec.tokens_per_state == 1


def _indexer(vllm_config: VllmConfig, cache: KVCacheConfig) -> str | None:
    if hasattr(vllm_config.model_config.hf_text_config, "index_topk"):
        return "index_topk in the model's config"
    roles = [getattr(spec, "cache_role", None) for spec in _specs(cache)]
    return "indexer layers" if SparseCacheRole.INDEXER in roles else None
