"""``vllm-dualpath router``: the process that clients talk to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dualpath.cli.logs import log_to_stderr
from vllm_dualpath.config import RouterConfig, parse_router_config
from vllm_dualpath.errors import ConfigError


def _help(name: str) -> str:
    return RouterConfig.model_fields[name].description or name


def router(
    listen: Annotated[str, typer.Option(help=_help("listen"))] = "127.0.0.1:9000",
    control: Annotated[str, typer.Option(help=_help("control"))] = "tcp://127.0.0.1:9100",
    mode: Annotated[str, typer.Option(help=_help("mode"))] = "dual",
    split_fraction: Annotated[float | None, typer.Option(help=_help("split_fraction"))] = None,
    min_segment_blocks: Annotated[
        int | None, typer.Option(help=_help("min_segment_blocks"))
    ] = None,
    max_readers: Annotated[int | None, typer.Option(help=_help("max_readers"))] = None,
    read_past_cache: Annotated[
        bool,
        typer.Option("--read-past-cache/--read-past-nothing", help=_help("read_past_cache")),
    ] = True,
    short_prompt_tokens: Annotated[
        int | None, typer.Option(help=_help("short_prompt_tokens"))
    ] = None,
    alpha_s: Annotated[float | None, typer.Option(help=_help("alpha_s"))] = None,
    beta_s: Annotated[float | None, typer.Option(help=_help("beta_s"))] = None,
    prefill_tokens_per_s: Annotated[
        float | None, typer.Option(help=_help("prefill_tokens_per_s"))
    ] = None,
    profile: Annotated[Path | None, typer.Option(help=_help("profile"))] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help=_help("recompute"))] = False,
    queue_wait_s: Annotated[float | None, typer.Option(help=_help("queue_wait_s"))] = None,
    keys: Annotated[Path | None, typer.Option(help=_help("keys"))] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=_help("insecure"))] = False,
    max_body_bytes: Annotated[int | None, typer.Option(help=_help("max_body_bytes"))] = None,
    engine_wait_s: Annotated[float | None, typer.Option(help=_help("engine_wait_s"))] = None,
    heartbeat_s: Annotated[float | None, typer.Option(help=_help("heartbeat_s"))] = None,
    deadline: Annotated[
        list[str] | None, typer.Option(help="KEY=SECONDS of the deadlines; may be repeated.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Route requests to prefill and decode engines and decide who reads what from the store."""
    given: dict[str, Any] = {
        "listen": listen,
        "control": control,
        "mode": mode,
        "split_fraction": split_fraction,
        "min_segment_blocks": min_segment_blocks,
        "max_readers": max_readers,
        "read_past_cache": read_past_cache,
        "short_prompt_tokens": short_prompt_tokens,
        "alpha_s": alpha_s,
        "beta_s": beta_s,
        "prefill_tokens_per_s": prefill_tokens_per_s,
        "profile": profile,
        "recompute": recompute,
        "queue_wait_s": queue_wait_s,
        "keys": keys,
        "insecure": insecure,
        "max_body_bytes": max_body_bytes,
        "engine_wait_s": engine_wait_s,
        "heartbeat_s": heartbeat_s,
        "deadlines": _deadlines(deadline or []),
    }
    config = parse_router_config({key: value for key, value in given.items() if value is not None})
    log_to_stderr(verbose=verbose)
    # Not at the top: other commands start faster without the router's imports.
    from vllm_dualpath.router.app import run_router

    run_router(config)


def _deadlines(flags: list[str]) -> dict[str, str]:
    parsed = {}
    for flag in flags:
        key, separator, seconds = flag.partition("=")
        if not separator:
            raise ConfigError(f"--deadline: expected KEY=SECONDS, found {flag!r}")
        parsed[key] = seconds
    return parsed
