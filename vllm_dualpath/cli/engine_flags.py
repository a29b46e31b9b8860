"""Flags that end up in ``kv_connector_extra_config``, the same for every command that has them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vllm_dualpath.errors import ConfigError

StagingBytes = Annotated[
    int | None, typer.Option("--staging-bytes", help="Staging memory of each engine's mover.")
]
BlockTokens = Annotated[
    int | None, typer.Option("--block-tokens", help="Tokens a Full Block; default 64.")
]
ConfigJson = Annotated[
    str | None,
    typer.Option(
        "--config-json", help="Further keys of kv_connector_extra_config, as a JSON object."
    ),
]


def extra_config(
    staging_bytes: int | None, block_tokens: int | None, config_json: str | None
) -> dict[str, Any]:
    """What the flags say, nothing for those not given. Raises ``ConfigError`` for bad JSON."""
    config = parse_object(config_json or "{}", "--config-json")
    if staging_bytes is not None:
        config["staging_bytes"] = staging_bytes
    if block_tokens is not None:
        config["block_tokens"] = block_tokens
    return config


def parse_object(text: str, flag: str) -> dict[str, Any]:
    """Parse a JSON object given as the value of ``flag``. Raises ``ConfigError``."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{flag}: expected a JSON object: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: expected a JSON object, found {type(value).__name__}")
    return value
