"""Flags that end up in ``kv_connector_extra_config``, the same for every command that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dualpath.errors import ConfigError

_MODEL_FILES = ("config.json", "params.json")
"""What vLLM opens first: of a model in Hugging Face's form, in Mistral's."""
_PATH_STARTS = ("/", "./", "../", "~")

StagingBytes = Annotated[
    int | None, typer.Option("--staging-bytes", help="Staging memory of each engine's mover.")
]
BlockTokens = Annotated[
    int | None,
    typer.Option(
        "--block-tokens", help="Tokens a Full Block; default 64, or vLLM's block size if larger."
    ),
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


def check_model(model: str) -> None:
    """Raise ``ConfigError`` for a directory without a model, which vLLM finds out late.

    A name, which vLLM looks up, is left to it.
    """
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in _MODEL_FILES):
        raise ConfigError(f"model: expected one of {', '.join(_MODEL_FILES)} in {path}, found none")
    if model.startswith(_PATH_STARTS) and not path.exists():
        raise ConfigError(f"model: {model} does not exist; expected a model's directory or name")


def parse_object(text: str, flag: str) -> dict[str, Any]:
    """Parse a JSON object given as the value of ``flag``. Raises ``ConfigError``."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{flag}: expected a JSON object: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: expected a JSON object, found {type(value).__name__}")
    return value
