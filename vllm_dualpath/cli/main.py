"""The ``vllm-dualpath`` command: each group of commands has a module, here they come together."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from vllm_dualpath import __version__
from vllm_dualpath.cli import (
    bench,
    doctor,
    keys,
    model,
    mover,
    plan,
    profile,
    router,
    serve,
    simulate,
    testbed,
    up,
)
from vllm_dualpath.errors import ConfigError, DualPathError

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(
    name="vllm-dualpath",
    help="Loads stored KV over both the prefill and the decode nodes' storage NICs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of the command itself."""


app.command("up")(up.up)
app.command("router")(router.router)
app.command("serve", context_settings=PASS_ON)(serve.serve)
app.command("mover", hidden=True)(mover.mover)
app.command("keys")(keys.keys)
app.command("doctor")(doctor.doctor)
app.command("profile", context_settings=PASS_ON)(profile.profile)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate)
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(testbed.app, name="testbed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 2 for a wrong configuration, 1 for what failed, 0 otherwise."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="vllm-dualpath")
    except ConfigError as exc:
        _fail(exc, 2)
    except DualPathError as exc:
        _fail(exc, 1)


def _fail(exc: DualPathError, code: int) -> None:
    """One message and no traceback: these errors say what is wrong and what to do."""
    sys.stdout.flush()
    print(f"vllm-dualpath: {exc}", file=sys.stderr)
    raise SystemExit(code) from exc


if __name__ == "__main__":
    main()
