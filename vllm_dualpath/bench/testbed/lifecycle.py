"""Up and down: a testbed is made in order, and unmade whatever is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from vllm_dualpath.bench.testbed import network
from vllm_dualpath.bench.testbed.commands import check_requirements, run
from vllm_dualpath.bench.testbed.gluster import Volume
from vllm_dualpath.bench.testbed.layout import (
    STATE_ROOT,
    TestbedSpec,
    check_name,
    directory,
    mount_point,
)
from vllm_dualpath.bench.testbed.places import keys_path, store_path
from vllm_dualpath.bench.testbed.state import write_spec
from vllm_dualpath.control.curve import create_keys
from vllm_dualpath.errors import ConfigError, LaunchError

_GRACE_S = 5.0
_KILL_S = 10.0
_POLL_S = 0.05
_STAT_S = 5.0
_SERVERS = ("glusterd", "glusterfsd")
_STORAGE_PROGRAMS = (*_SERVERS, "glusterfs")
_MODE = 0o700


def up(spec: TestbedSpec) -> None:
    """Build it; undone again if something fails.

    Raises ``ConfigError`` for missing requirements or a name that is taken, ``LaunchError``.
    """
    check_requirements()
    check_free(spec.name)
    STATE_ROOT.mkdir(mode=_MODE, parents=True, exist_ok=True)
    try:
        directory(spec.name).mkdir(mode=_MODE)
    except FileExistsError:
        raise _taken(spec.name) from None  # by another `up`, this moment
    try:
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


def check_free(name: str) -> None:
    """Raise ``ConfigError`` if there is a testbed of this name, or a part of one."""
    if network.namespaces(name) or directory(name).exists():
        raise _taken(name)


def _taken(name: str) -> ConfigError:
    return ConfigError(
        f"testbed {name}: there is one, or what is left of one:"
        f" vllm-dualpath testbed down --name {name}"
    )


def problems(spec: TestbedSpec) -> list[str]:
    """What is missing or does not answer, a phrase each; empty of a whole testbed."""
    found = []
    spaces = network.namespaces(spec.name)
    wanted = [node.namespace for node in spec.nodes()]
    found += [f"no namespace {space}" for space in wanted if space not in spaces]
    if spec.storage.namespace in spaces:
        running = {_program(pid) for pid in network.processes_in(spec.storage.namespace)}
        found += [f"no {program} runs" for program in _SERVERS if program not in running]
    mounted = mounts(spec.name)
    for node in spec.engine_nodes():
        path = mount_point(spec.name, node.name)
        if path not in mounted:
            found.append(f"{node.name}: the store is not mounted")
        elif not _answers(path):
            found.append(f"{node.name}: the store does not answer within {_STAT_S:g} s")
    return found


def _answers(path: Path) -> bool:
    stat = subprocess.Popen(
        ["stat", "-f", path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return stat.wait(_STAT_S) == 0
    except subprocess.TimeoutExpired:
        stat.kill()  # not waited for: a mount that hangs does not let it end
        return False


def down(name: str) -> list[str]:
    """Remove all of a testbed, also what a crash left of one; a line for each thing removed.

    Nothing here relies on what was written down: namespaces and mounts are found by name,
    processes by the namespace they run in, GlusterFS's also by their files. May be repeated.
    Raises ``LaunchError`` for what cannot be removed.
    """
    check_name(name)
    check_requirements()
    removed = []
    spaces = network.namespaces(name)
    removed += _end_processes(name, spaces, storage=False)
    removed += _unmount(name)
    removed += _end_processes(name, spaces, storage=True)
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


def _end_processes(name: str, spaces: list[str], *, storage: bool) -> list[str]:
    """Terminate, and kill after a while: engines and others first, the storage's own last."""
    removed: list[str] = []
    signum = signal.SIGTERM
    start_s = time.monotonic()
    while pids := _pids(name, spaces, storage=storage):
        waited_s = time.monotonic() - start_s
        if waited_s > _GRACE_S + _KILL_S:
            raise LaunchError(f"processes {pids} do not end, though killed")
        if not removed or (waited_s > _GRACE_S and signum == signal.SIGTERM):
            signum = signal.SIGKILL if removed else signal.SIGTERM
            removed += [] if removed else [f"process {pid}" for pid in pids]
            _signal(pids, signum)
        time.sleep(_POLL_S)
    return removed


def _pids(name: str, spaces: list[str], *, storage: bool) -> list[int]:
    found = {pid for space in spaces for pid in network.processes_in(space)} - {os.getpid()}
    if storage:
        found |= _storage_of(name)
    return sorted(pid for pid in found if _is_alive(pid) and (storage or not _is_storage(pid)))


def _storage_of(name: str) -> set[int]:
    """GlusterFS's processes that use the testbed's directory: their namespace may have been deleted
    under them.
    """
    below, root = f"{directory(name)}/".encode(), Path("/").stat().st_ino

    def uses_it(process: Path) -> bool:
        ours = (process / "root").stat().st_ino == root
        return ours and below in (process / "cmdline").read_bytes()

    return {pid for pid in network.processes(uses_it) if _is_storage(pid)}


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2][1] != "Z"
    except OSError:
        return False


def _is_storage(pid: int) -> bool:
    return _program(pid) in _STORAGE_PROGRAMS


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip()
    except OSError:
        return ""


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue  # it ended by itself


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
