"""Runs the connector's timing of a real engine's steps, in a process of its own.

The connector alone may import vllm: here its lines are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from vllm_dualpath.bench.profiling.fit import Sample
from vllm_dualpath.bench.vllm_command import gpus
from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.profile import LINE_TAG

_MODULE = "vllm_dualpath.connector.step_timing"
_START_S = 900.0
"""An engine loads its weights, and the last round may be a long one."""
_MAX_ERROR_CHARS = 4000
_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is stepped by hand
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # hooks go to workers of our own as functions
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What the engine said."""

    samples: tuple[Sample, ...]
    tokens_per_s: float
    """Of a prompt as long as the model takes, in steps as large as vLLM makes them."""
    model: str
    device: str
    vllm: str
    geometry: Geometry | None
    """None for models whose KV the connector does not cover."""


def time_steps(
    model: str,
    seconds: float,
    block_tokens: int | None,
    engine_args: Sequence[str],
    progress: Callable[[float], None] = lambda _: None,
) -> StepTimes:
    """Start an engine and time its steps for ``seconds``. Raises ``LaunchError``.

    ``progress`` gets the share that is done, 0 once the engine runs.
    """
    command = [sys.executable, "-m", _MODULE, "--profile-seconds", str(seconds), "--model", model]
    if block_tokens is not None:
        command += ["--profile-block-tokens", str(block_tokens)]
    if not gpus():
        command += ["--distributed-executor-backend", "uni"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        result = _run([*command, *engine_args], log, _START_S + 3 * seconds, progress)
    geometry = result["geometry"]
    if geometry is not None:
        geometry = Geometry(**geometry | {"layer_page_bytes": tuple(geometry["layer_page_bytes"])})
    return StepTimes(
        samples=tuple(Sample(*sample) for sample in result["samples"]),
        tokens_per_s=result["tokens_per_s"],
        model=result["model"],
        device=result["device"],
        vllm=result["vllm"],
        geometry=geometry,
    )


def _run(
    command: Sequence[str], log: IO[str], timeout_s: float, progress: Callable[[float], None]
) -> dict[str, Any]:
    """The last line of the process; its errors go to ``log`` and from there into ours."""
    result: dict[str, Any] | None = None
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | _ENV,
    ) as child:
        assert child.stdout is not None
        deadline = threading.Timer(timeout_s, child.kill)
        deadline.start()
        try:
            for line in child.stdout:
                if not line.startswith(LINE_TAG):
                    continue
                message = json.loads(line[len(LINE_TAG) :])
                if "samples" in message:
                    result = message
                else:
                    progress(message["progress"])
        except BaseException:
            child.kill()
            raise
        finally:
            deadline.cancel()
    if result is None or child.returncode:
        log.seek(0)
        raise LaunchError(
            f"profile: {' '.join(command)} ended with exit code {child.returncode}"
            f" (it gets {timeout_s:.0f} s); the end of what it said:\n"
            f"{log.read()[-_MAX_ERROR_CHARS:]}"
        )
    return result
