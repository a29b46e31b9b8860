"""``vllm-dualpath model``: models to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model

app = typer.Typer(help="Models to try things with.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``tiny`` a subcommand although it is the only one."""


@app.command()
def tiny(
    out: Annotated[Path, typer.Option(help="Directory to write; made if missing.")],
    arch: Annotated[str, typer.Option(help="llama or qwen3.")] = "llama",
    layers: Annotated[int, typer.Option()] = 4,
    hidden: Annotated[int, typer.Option()] = 128,
    heads: Annotated[int, typer.Option()] = 4,
    kv_heads: Annotated[int, typer.Option()] = 2,
    head_dim: Annotated[int, typer.Option()] = 32,
    vocab: Annotated[int, typer.Option(help="256 bytes, special tokens, reserved ones.")] = 320,
    max_len: Annotated[int, typer.Option(help="Longest prompt plus answer, in tokens.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write a random model whose greedy answers depend on the whole prompt.

    Serve it with `--dtype float32` where answers are compared: it is exact only there.
    """
    model = TinyModel(
        arch=cast(Any, arch),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_len=max_len,
        seed=seed,
        dtype=cast(Any, dtype),
    )
    write_tiny_model(model, out)
    typer.echo(f"{out}: {arch}, {layers} layers, {vocab} tokens, {dtype}")
