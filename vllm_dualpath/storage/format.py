"""The bytes of a stored Full Block: a 4 KiB header, then the payload padded to 4 KiB.

The header names the block (hash, parent), the store it belongs to (model and geometry) and a CRC32C
of every Layer Block, and carries a CRC32C of itself. Everything is little-endian and has one layout
a format version. Knows buffers only: no files, no directories.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass

from vllm_dualpath import native
from vllm_dualpath.blocks import ALIGNMENT_BYTES, HASH_BYTES, Geometry
from vllm_dualpath.errors import BlockCorrupt, ConfigError

FORMAT_VERSION = 1
HEADER_BYTES = ALIGNMENT_BYTES

_MAGIC = b"DUALPATH"
# magic, format version, tokens, hash, parent, store id, payload bytes, layers; then the CRCs.
_FIXED = struct.Struct("<8sII32s32s32sQI")
_CRC = struct.Struct("<I")
_HEADER_CRC_OFFSET = HEADER_BYTES - _CRC.size

MAX_LAYERS = (_HEADER_CRC_OFFSET - _FIXED.size) // _CRC.size


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a sound header says."""

    hash: bytes
    parent: bytes
    layer_crcs: tuple[int, ...]


class BlockFormat:
    """Builds and checks the headers of one store, that is of one fingerprint and geometry.

    Immutable, so any thread may call it. Raises ``ConfigError`` when the geometry has more layers
    than a header has room for.
    """

    def __init__(self, fingerprint: bytes, geometry: Geometry) -> None:
        if geometry.num_layers > MAX_LAYERS:
            raise ConfigError(
                f"store: the model has {geometry.num_layers} layers; format {FORMAT_VERSION}"
                f" holds at most {MAX_LAYERS} a block header"
            )
        self.geometry = geometry
        self.store_id = store_id(fingerprint, geometry)
        self.file_bytes = HEADER_BYTES + geometry.slot_bytes
        self._layer_bytes = geometry.layer_block_bytes
        self._crcs = struct.Struct(f"<{geometry.num_layers}I")

    def write_header(
        self, header: memoryview, block_hash: bytes, parent: bytes, payload: memoryview
    ) -> None:
        """Fill ``header`` (4 KiB, writable) for ``payload``."""
        for name, value in (("hash", block_hash), ("parent", parent)):
            if len(value) != HASH_BYTES:
                raise ValueError(f"block {name}: expected {HASH_BYTES} bytes, found {len(value)}")
        header[:] = bytes(HEADER_BYTES)
        _FIXED.pack_into(
            header,
            0,
            _MAGIC,
            FORMAT_VERSION,
            self.geometry.block_tokens,
            block_hash,
            parent,
            self.store_id,
            self.geometry.slot_bytes,
            self.geometry.num_layers,
        )
        self._crcs.pack_into(header, _FIXED.size, *self.payload_crcs(payload))
        _CRC.pack_into(header, _HEADER_CRC_OFFSET, _header_crc(header))

    def read_header(self, header: memoryview, block_hash: bytes) -> BlockHeader:
        """Parse ``header`` and check that it belongs to ``block_hash`` in this store.

        Raises ``BlockCorrupt`` naming the first field that is wrong, expected and found.
        """
        name = block_hash.hex()
        (magic, version, tokens, found_hash, parent, found_store, payload_bytes, num_layers) = (
            _FIXED.unpack_from(header)
        )
        # The CRC first: any other field of a damaged header would only mislead.
        (stated_crc,) = _CRC.unpack_from(header, _HEADER_CRC_OFFSET)
        _expect(name, "header CRC32C", f"{_header_crc(header):#010x}", f"{stated_crc:#010x}")
        _expect(name, "magic", _MAGIC, magic)
        _expect(name, "format version", FORMAT_VERSION, version)
        _expect(name, "hash", name, found_hash.hex())
        _expect(name, "store (model and geometry)", self.store_id.hex(), found_store.hex())
        _expect(name, "token count", self.geometry.block_tokens, tokens)
        _expect(name, "payload bytes", self.geometry.slot_bytes, payload_bytes)
        _expect(name, "layers", self.geometry.num_layers, num_layers)
        return BlockHeader(found_hash, parent, self._crcs.unpack_from(header, _FIXED.size))

    def payload_crcs(self, payload: memoryview) -> list[int]:
        """The CRC32C of each Layer Block; the padding after the last is not covered."""
        return native.crc32c_many(native.buffer_address(payload), self._layer_bytes)

    def check_payload(self, header: BlockHeader, payload: memoryview) -> None:
        """Raise ``BlockCorrupt`` naming the first layer whose bytes are not the stored ones."""
        found = self.payload_crcs(payload)
        for layer, (expected, actual) in enumerate(zip(header.layer_crcs, found, strict=True)):
            if expected != actual:
                raise BlockCorrupt(
                    f"block {header.hash.hex()}: layer {layer} CRC32C: expected {expected:#010x},"
                    f" found {actual:#010x}"
                )


def describe_geometry(geometry: Geometry) -> dict[str, object]:
    """``geometry`` as plain JSON values."""
    return {**asdict(geometry), "layer_page_bytes": list(geometry.layer_page_bytes)}


def store_id(fingerprint: bytes, geometry: Geometry) -> bytes:
    """A digest of model and geometry, so that a block copied in from elsewhere is recognised."""
    canonical = json.dumps(describe_geometry(geometry), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(hashlib.sha256(fingerprint).digest() + canonical.encode()).digest()


def _header_crc(header: memoryview) -> int:
    return native.crc32c(native.buffer_address(header), _HEADER_CRC_OFFSET)


def _expect(name: str, field: str, expected: object, found: object) -> None:
    if expected != found:
        raise BlockCorrupt(f"block {name}: {field}: expected {expected}, found {found}")
