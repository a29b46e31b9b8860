"""The storage node's GlusterFS volume, and its mount on each node.

One brick, and no cache between brick and reader: every byte of a hit crosses the reader's storage
NIC. The brick's own page cache stays, in front of its disk: the NICs are to be the bottleneck.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from vllm_dualpath.bench.testbed.commands import in_namespace, run, run_unchecked
from vllm_dualpath.bench.testbed.layout import VOLUME, Node, TestbedSpec, directory, mount_point
from vllm_dualpath.errors import LaunchError

_START_S = 30.0
_POLL_S = 0.1

_OPTIONS = {
    # No cache at the client, in which a second node's or turn's read could be served.
    "performance.io-cache": "off",
    "performance.quick-read": "off",
    "performance.read-ahead": "off",
    "performance.readdir-ahead": "off",
    "performance.open-behind": "off",
    "performance.stat-prefetch": "off",
    "performance.write-behind": "off",
    # Direct I/O ends at the client: the brick may use its page cache.
    "network.remote-dio": "enable",
    "performance.strict-o-direct": "off",
    # A shaped NIC delays a ping behind megabytes of data.
    "network.ping-timeout": "300",
}

_MOUNT_FLAGS = (
    "--direct-io-mode=enable",
    "--attribute-timeout=0",
    "--entry-timeout=0",
    "--negative-timeout=0",
)

_GLUSTERD_VOLFILE = """volume management
    type mgmt/glusterd
    option working-directory {directory}/glusterd
    option run-directory {directory}/run
    option logging-directory {directory}/log
    option glusterd-sockfile {directory}/run/glusterd.socket
    option transport-type socket
    option transport.socket.listen-port 24007
    option ping-timeout 0
    option event-threads 1
end-volume
"""

# glusterd also writes to directories of the system, whatever it is told: it gets its own in their
# place, in a mount namespace of its own that ends with it.
_PRIVATE_DIRECTORIES = {
    "/var/lib/glusterd": "lib",
    "/var/log/glusterfs": "log",
    "/run/gluster": "sockets",
}


class Volume:
    """The volume of one testbed. ``start`` once, then ``mount`` for each node."""

    def __init__(self, spec: TestbedSpec) -> None:
        self._spec = spec
        self._storage = spec.storage
        self._directory = directory(spec.name) / "gluster"
        self._log = self._directory / "log"
        self._glusterd_pid = 0

    def start(self) -> None:
        """Start glusterd, make the volume, start its brick. Raises ``LaunchError``."""
        for name in ("glusterd", "run", "lib", "log", "sockets", "brick"):
            (self._directory / name).mkdir(parents=True)
        volfile = self._directory / "glusterd.vol"
        volfile.write_text(_GLUSTERD_VOLFILE.format(directory=self._directory), encoding="utf-8")
        self._start_glusterd(volfile)
        address = self._storage.address("storage")
        self._gluster("volume", "create", VOLUME, f"{address}:{self._directory / 'brick'}", "force")
        options = [part for option in _OPTIONS.items() for part in option]
        self._gluster("volume", "set", VOLUME, *options)
        self._gluster("volume", "start", VOLUME)

    def _start_glusterd(self, volfile: Path) -> None:
        for path in _PRIVATE_DIRECTORIES:
            Path(path).mkdir(parents=True, exist_ok=True)
        binds = [
            f"mount --bind {self._directory / name} {path}"
            for path, name in _PRIVATE_DIRECTORIES.items()
        ]
        glusterd = f"exec glusterd -N -f {volfile} -l {self._log / 'glusterd.log'}"
        script = " && ".join([*binds, glusterd])
        with (self._log / "glusterd.out").open("ab") as log:
            # Not waited for: it and the brick stay. No pipe of ours goes to them.
            process = subprocess.Popen(
                [
                    *in_namespace(self._storage.namespace),
                    *("unshare", "--mount", "--propagation", "private", "sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )

        self._glusterd_pid = process.pid

        def answers() -> bool:
            if process.poll() is not None:
                raise LaunchError(
                    f"glusterd ended with exit code {process.returncode}; see {self._log}"
                )
            return run_unchecked(self._gluster_command("pool", "list")).returncode == 0

        _wait(answers, f"glusterd does not answer; see {self._log}")

    def mount(self, node: Node) -> None:
        """Mount the volume for a node, through its storage NIC. Raises ``LaunchError``."""
        path = mount_point(self._spec.name, node.name)
        path.mkdir(parents=True)
        log = self._log / f"mount-{node.name}.log"
        run(
            *in_namespace(node.namespace),
            *("glusterfs", f"--volfile-server={self._storage.address('storage')}"),
            *(f"--volfile-id={VOLUME}", f"--log-file={log}", *_MOUNT_FLAGS, path),
        )
        _wait(lambda: _usable(path), f"{path}: the volume does not come up; see {log}")

    def _gluster(self, *arguments: str) -> None:
        run(*self._gluster_command(*arguments))

    def _gluster_command(self, *arguments: str) -> list[str]:
        # In glusterd's own mount namespace too: the command writes to directories of the system.
        return [
            *("nsenter", f"--target={self._glusterd_pid}", "--net", "--mount"),
            *("gluster", f"--glusterd-sock={self._directory / 'run' / 'glusterd.socket'}"),
            *(f"--log-file={self._log / 'cli.log'}", "--mode=script", *arguments),
        ]


def _usable(path: Path) -> bool:
    """Whether the mount is there and its brick answers."""
    try:
        return path.is_mount() and not list(path.glob(".no-such-file"))
    except OSError:
        return False


def _wait(condition: Callable[[], bool], message: str) -> None:
    deadline_s = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise LaunchError(f"{message} (waited {_START_S:.0f} s)")
        time.sleep(_POLL_S)
