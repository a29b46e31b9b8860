"""The system programs that make a testbed, and whether they are here."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vllm_dualpath.bench.testbed.layout import NETNS_ROOT
from vllm_dualpath.errors import ConfigError, LaunchError

_PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "umount": "mount",
    "glusterd": "glusterfs-server",
    "gluster": "glusterfs-server",
    "glusterfs": "glusterfs-client",
}
_TIMEOUT_S = 60.0


def missing_requirements() -> list[str]:
    """What this host or user lacks for a testbed, a phrase each; empty if nothing."""
    missing = [] if os.geteuid() == 0 else ["root (namespaces and mounts need it)"]
    packages = {package for program, package in _PACKAGES.items() if shutil.which(program) is None}
    missing += [f"the package {package}" for package in sorted(packages)]
    if not Path("/dev/fuse").exists():
        missing.append("/dev/fuse (modprobe fuse)")
    return missing


def check_requirements() -> None:
    """Raise ``ConfigError`` that names all that is missing."""
    missing = missing_requirements()
    if missing:
        raise ConfigError(
            f"testbed: missing: {'; '.join(missing)}. On Debian: apt-get install iproute2"
            " util-linux glusterfs-server glusterfs-client"
        )


def in_namespace(namespace: str) -> list[str]:
    """What a command begins with to run there.

    Not ``ip netns exec``: that makes a private mount namespace, and a mount made in it is lost.
    """
    return ["nsenter", f"--net={NETNS_ROOT / namespace}"]


def run(*command: str | Path, check: bool = True) -> str:
    """Run to the end and return the output. Raises ``LaunchError`` if it fails, unless told not to.

    Its output goes through files, not pipes: a daemon that it leaves behind would hold a pipe open.
    """
    done = run_unchecked(command)
    if check and done.returncode:
        text = f"{done.stdout}{done.stderr}".strip()
        raise LaunchError(
            f"{' '.join(map(str, command))}: exit code {done.returncode}: {text or 'no output'}"
        )
    return done.stdout


def run_unchecked(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run to the end. Raises ``LaunchError`` only if it cannot start or does not end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise LaunchError(f"{' '.join(map(str, command))}: {exc}") from exc
        return subprocess.CompletedProcess(done.args, done.returncode, _content(out), _content(err))


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
