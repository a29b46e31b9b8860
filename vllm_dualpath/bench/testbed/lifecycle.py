"""Up and down: a testbed is made in order, and unmade whatever is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from vllm_dualpath.bench.testbed import network
from vllm_dualpath.bench.testbed.commands import check_requirements, run
from vllm_dualpath.bench.testbed.gluster import Volume
from vllm_dualpath.bench.testbed.layout import STATE_ROOT, TestbedSpec, check_name, directory
from vllm_dualpath.bench.testbed.places import keys_path, store_path
from vllm_dualpath.bench.testbed.state import write_spec
from vllm_dualpath.control.curve import create_keys
from vllm_dualpath.errors import ConfigError, LaunchError

_GRACE_S = 5.0
_KILL_S = 10.0
_POLL_S = 0.05
_STORAGE_PROGRAMS = ("glusterd", "glusterfsd", "glusterfs")
_MODE = 0o700


def up(spec: TestbedSpec) -> None:
    """Build it; undone again if something fails.

    Raises ``ConfigError`` for missing requirements or a name that is taken, ``LaunchError``.
    """
    check_requirements()
    if network.namespaces(spec.name) or directory(spec.name).exists():
        raise ConfigError(
            f"testbed {spec.name}: there is one, or what is left of one:"
            f" vllm-dualpath testbed down --name {spec.name}"
        )
    try:
        directory(spec.name).mkdir(mode=_MODE, parents=True)
        network.build(spec)
        volume = Volume(spec)
        volume.start()
        for node in spec.engine_nodes():
            volume.mount(node)
        store_path(spec.name).mkdir()
        create_keys(keys_path(spec.name))
        write_spec(spec)
    except BaseException:
        down(spec.name)
        raise


def down(name: str) -> list[str]:
    """Remove all of a testbed, also what a crash left of one; a line for each thing removed.

    Nothing here relies on what was written down: namespaces and mounts are found by name,
    processes by the namespace they run in. May be repeated. Raises ``LaunchError`` for what cannot
    be removed.
    """
    check_name(name)
    check_requirements()
    removed = []
    spaces = network.namespaces(name)
    removed += _end_processes(spaces, storage=False)
    removed += _unmount(name)
    removed += _end_processes(spaces, storage=True)
    network.delete(name)
    removed += [f"namespace {space}" for space in spaces]
    if directory(name).exists():
        shutil.rmtree(directory(name))
        removed.append(f"directory {directory(name)}")
    _remove_if_empty(STATE_ROOT)
    return removed


def _unmount(name: str) -> list[str]:
    removed = []
    for path in mounts(name):
        # Lazily: a FUSE mount whose client or brick was killed does not answer any more.
        run("umount", "--lazy", path)
        removed.append(f"mount {path}")
    return removed


def mounts(name: str) -> list[Path]:
    """Mount points below the testbed's directory."""
    below = f"{directory(name)}/"
    lines = Path("/proc/self/mounts").read_text("utf-8").splitlines()
    return [Path(point) for line in lines if (point := line.split()[1]).startswith(below)]


def _end_processes(spaces: list[str], *, storage: bool) -> list[str]:
    """Terminate, and kill after a while: engines and others first, the storage's own last."""
    removed: list[str] = []
    signum = signal.SIGTERM
    start_s = time.monotonic()
    while pids := _pids(spaces, storage=storage):
        waited_s = time.monotonic() - start_s
        if waited_s > _GRACE_S + _KILL_S:
            raise LaunchError(f"processes {pids} do not end, though killed")
        if not removed or (waited_s > _GRACE_S and signum == signal.SIGTERM):
            signum = signal.SIGKILL if removed else signal.SIGTERM
            removed += [] if removed else [f"process {pid}" for pid in pids]
            _signal(pids, signum)
        time.sleep(_POLL_S)
    return removed


def _pids(spaces: list[str], *, storage: bool) -> list[int]:
    found = {pid for space in spaces for pid in network.processes_in(space)} - {os.getpid()}
    return sorted(pid for pid in found if _is_alive(pid) and (storage or not _is_storage(pid)))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2][1] != "Z"
    except OSError:
        return False


def _is_storage(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip() in _STORAGE_PROGRAMS
    except OSError:
        return False


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue  # it ended by itself


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
