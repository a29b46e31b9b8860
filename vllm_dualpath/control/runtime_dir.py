"""Where sockets, locks and specs of one host's engines lie:
a directory only its owner can enter.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from vllm_dualpath.errors import ConfigError

_NAME_CHARS = 24
"""Unix socket paths hold about 107 bytes; engine ids are longer than what is left."""


def runtime_dir(configured: Path | None) -> Path:
    """Make and return the runtime directory. Raises ``ConfigError`` if another user could enter
    it.
    """
    path = configured or Path(f"/tmp/vllm-dualpath-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as exc:
        raise ConfigError(f"runtime_dir {path}: cannot be made with mode 0700: {exc}") from exc
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"runtime_dir {path}: expected a directory of uid {os.getuid()} with mode 0700,"
            f" found uid {info.st_uid} mode {stat.S_IMODE(info.st_mode):#o}; remove it or set"
            " runtime_dir"
        )
    return path


def mover_socket_path(directory: Path, engine_key: str) -> Path:
    """The Unix socket of the mover of one engine; ``engine_key`` is engine id and data-parallel
    rank.
    """
    name = hashlib.sha256(engine_key.encode()).hexdigest()[:_NAME_CHARS]
    return directory / f"{name}.sock"
