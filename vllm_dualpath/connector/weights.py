"""SHA-256 over the content of a model's weight files.

Hashing terabytes twice would be silly: files in a Hugging Face cache carry their SHA-256 as their
name, and other digests are remembered by (device, inode, size, mtime) in a small file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dualpath.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""In the order of vLLM's preference: the first that matches something is what is loaded."""
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")
_SHA256_NAME = re.compile(r"[0-9a-f]{64}")
_HASH_THREADS = 8
_CHUNK_BYTES = 8 << 20


def weights_digest(vllm_config: VllmConfig, digest_cache: Path) -> str:
    """Hex SHA-256 over the names and contents of the weight files.

    Raises ``ConfigError`` for weights that are not files: there ``model_id`` must say what they
    are.
    """
    if vllm_config.load_config.load_format == "dummy":
        raise ConfigError(
            "kv_connector_extra_config.model_id: expected an identity of the weights, found none;"
            " --load-format dummy makes random weights: set model_id to a name of your choice"
        )
    files = _weight_files(vllm_config)
    known = _read_cache(digest_cache)
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="dualpath-hash") as pool:
        digests = list(pool.map(lambda path: _digest(path, known), files))
    _write_cache(digest_cache, dict(zip(map(_file_key, files), digests, strict=True)), known)
    total = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        total.update(f"{path.name}\0{digest}\n".encode())
    return total.hexdigest()


def _weight_files(vllm_config: VllmConfig) -> Sequence[Path]:
    model = Path(vllm_config.model_config.model)
    if model.is_file():
        return [model]
    directory = model if model.is_dir() else _cached_snapshot(vllm_config)
    for pattern in _PATTERNS:
        files = sorted(p for p in directory.glob(pattern) if p.name not in _NOT_WEIGHTS)
        if files:
            return files
    raise ConfigError(
        f"model {vllm_config.model_config.model}: expected weight files ({', '.join(_PATTERNS)}) in"
        f" {directory}, found none; set kv_connector_extra_config.model_id"
    )


def _cached_snapshot(vllm_config: VllmConfig) -> Path:
    """The directory of a model that vLLM has downloaded already."""
    from huggingface_hub import snapshot_download

    name = vllm_config.model_config.model
    try:
        return Path(
            snapshot_download(
                name,
                revision=vllm_config.model_config.revision,
                cache_dir=vllm_config.load_config.download_dir,
                local_files_only=True,
            )
        )
    except (OSError, ValueError) as exc:  # huggingface_hub's errors are subclasses of these
        raise ConfigError(
            f"model {name}: expected a directory or a model in the Hugging Face cache, found"
            f" neither ({exc}); set kv_connector_extra_config.model_id"
        ) from exc


def _digest(path: Path, known: dict[str, str]) -> str:
    blob = path.resolve().name
    if _SHA256_NAME.fullmatch(blob):
        return blob
    return known.get(_file_key(path)) or _hash_file(path)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)  # releases the GIL
    return digest.hexdigest()


def _file_key(path: Path) -> str:
    info = path.stat()
    return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"


def _read_cache(digest_cache: Path) -> dict[str, str]:
    try:
        values = json.loads(digest_cache.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # nothing remembered, or a file to be replaced: hash again
    return {key: value for key, value in values.items() if _SHA256_NAME.fullmatch(str(value))}


def _write_cache(digest_cache: Path, new: dict[str, str], known: dict[str, str]) -> None:
    if new.items() <= known.items():
        return
    temporary = digest_cache.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**known, **new}), "utf-8")
    temporary.replace(digest_cache)
