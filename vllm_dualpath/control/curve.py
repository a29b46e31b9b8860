"""CURVE keys: who may talk on the control network.

One key directory a cluster: ``server.key`` (router only), ``client.key`` (movers), and both public
halves. A router accepts only the client key of its directory; a mover talks only to the server key
of its own. Files are ZeroMQ certificate files; secret ones have mode 0600.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from vllm_dualpath.errors import ConfigError


def create_keys(directory: Path) -> list[Path]:
    """Make a new key directory; return the files. Raises ``ConfigError`` if keys are there
    already.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.glob("*.key*")):
        raise ConfigError(f"keys {directory}: already holds keys; choose another directory")
    for name in ("server", "client"):
        zmq.auth.create_certificates(directory, name)
    files = sorted(directory.glob("*.key*"))
    for path in files:
        path.chmod(0o600 if path.suffix == ".key_secret" else 0o644)
    return files


def secure_server(
    context: zmq.Context[Any], socket: zmq.Socket[Any], directory: Path
) -> ThreadAuthenticator:
    """Make ``socket`` a CURVE server that accepts only the directory's client key.

    The caller stops the returned authenticator when it closes the socket.
    """
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    allowed = directory / "allowed"
    allowed.mkdir(mode=0o700, exist_ok=True)
    public, _ = _load(directory / "client.key", secret=False)
    (allowed / "client.key").write_bytes((directory / "client.key").read_bytes())
    authenticator.configure_curve(domain="*", location=str(allowed))
    socket.curve_publickey, socket.curve_secretkey = _load(directory / "server.key_secret")
    socket.curve_server = True
    if not public:
        raise ConfigError(f"keys {directory}: client.key holds no public key")
    return authenticator


def secure_client(socket: zmq.Socket[Any], directory: Path) -> None:
    """Make ``socket`` a CURVE client of the directory's server key."""
    socket.curve_serverkey, _ = _load(directory / "server.key", secret=False)
    socket.curve_publickey, socket.curve_secretkey = _load(directory / "client.key_secret")


def _load(path: Path, *, secret: bool = True) -> tuple[bytes, bytes]:
    try:
        public, private = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"keys: cannot read {path}: {exc}; make them with vllm-dualpath keys"
        ) from exc
    if secret and private is None:
        raise ConfigError(f"keys: {path} holds no secret key")
    return public, private or b""
