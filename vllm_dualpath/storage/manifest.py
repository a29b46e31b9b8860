"""``MANIFEST.json``: what a store directory holds, for people and for the check at start.

The directory is named by the model fingerprint; the manifest adds the format version and geometry.
A store whose manifest disagrees is refused as a whole: every block in it would be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.format import FORMAT_VERSION, describe_geometry

MANIFEST_NAME = "MANIFEST.json"


def ensure_manifest(
    directory: Path,
    fingerprint: bytes,
    geometry: Geometry,
    extra: Mapping[str, str],
    *,
    create: bool,
) -> None:
    """Write the manifest unless it is there, then check the one that is there.

    ``extra`` is for readers only and is never compared. Raises ``ConfigError`` where the manifest
    disagrees, is unreadable, or is missing and ``create`` is false; ``OSError`` on I/O errors.
    """
    path = directory / MANIFEST_NAME
    expected: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint.hex(),
        "geometry": describe_geometry(geometry),
    }
    if not path.exists():
        if not create:
            raise ConfigError(f"store: {path} is missing: there is no store of this model here")
        _publish(path, json.dumps({**expected, "extra": dict(extra)}, indent=2) + "\n")
    _compare(path, expected)


def _publish(path: Path, text: str) -> None:
    """Make ``path`` appear whole; of two starting at once the first wins, both compare with it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.write_text(text)  # a full disk must not leave half a manifest under its name
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:
            # Some network and FUSE file systems have no hard links; the last of two wins there.
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _compare(path: Path, expected: Mapping[str, object]) -> None:
    try:
        found = json.loads(path.read_text())
        differences = _differences(expected, found, "")
    except (ValueError, AttributeError) as exc:
        raise ConfigError(
            f"store: {path} is not a manifest ({exc}): move its directory away, or restore the file"
        ) from exc
    if differences:
        raise ConfigError(
            f"store: {path} is of another model, geometry or format: {'; '.join(differences)}."
            " Use another store directory, or move this one away"
        )


def _differences(
    expected: Mapping[str, object], found: Mapping[str, object], prefix: str
) -> list[str]:
    lines: list[str] = []
    for key, value in expected.items():
        other = found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            lines += _differences(value, other, f"{prefix}{key}.")
        elif value != other:
            lines.append(f"{prefix}{key}: expected {value!r}, found {other!r}")
    return lines
