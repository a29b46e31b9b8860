"""``vllm-dualpath serve``: vLLM's own server with our connector filled in."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from vllm_dualpath.bench.vllm_command import connector_command
from vllm_dualpath.cli.engine_flags import (
    BlockTokens,
    ConfigJson,
    StagingBytes,
    check_model,
    extra_config,
)
from vllm_dualpath.config import parse_engine_config
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.posix import root_of


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory or name, as vLLM takes it.")],
    store: Annotated[str, typer.Option(help="Where Full Blocks live: file:///absolute/path.")],
    role: Annotated[
        str, typer.Option(help="prefill or decode, with --router; both, without.")
    ] = "both",
    router: Annotated[
        str | None, typer.Option(help="The router's control address: tcp://host:port.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Engine id shown in logs and metrics.")] = None,
    url: Annotated[
        str | None, typer.Option(help="This engine's HTTP address as the router reaches it.")
    ] = None,
    staging_bytes: StagingBytes = None,
    block_tokens: BlockTokens = None,
    config_json: ConfigJson = None,
) -> None:
    """Start one vLLM server with the connector; all other arguments go to vLLM as they are."""
    flags: dict[str, Any] = {
        "role": role,
        "store": store,
        "router": router,
        "name": name,
        "url": url,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = {**given, **extra_config(staging_bytes, block_tokens, config_json)}
    if any(arg.partition("=")[0] == "--kv-transfer-config" for arg in context.args):
        raise ConfigError("serve writes --kv-transfer-config itself: use its flags, --config-json")
    check_model(model)
    # vLLM would find out only after it has loaded the model.
    root_of(parse_engine_config(config).store)
    command = connector_command(model, config, context.args)
    sys.stdout.flush()
    # Replaced, not spawned: signals and the exit code are vLLM's own.
    os.execv(command[0], command)
