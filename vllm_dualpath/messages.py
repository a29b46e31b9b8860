"""Every message that crosses a process boundary, as typed msgpack.

Three conversations:

* router <-> mover, over ZeroMQ (``RouterMessage`` down, ``MoverMessage`` up);
* engine <-> mover, over the engine's Unix socket (``EngineMessage`` to the mover, ``LocalMessage``
  back);
* mover -> mover, as notices of the transport (``Notice``).

Decoding is strict: unknown types, missing or surplus fields and wrong types raise
``ProtocolError``. Nothing here is a pickle, and no message carries code. ``PROTOCOL_VERSION`` is
compared before anything else is believed.

Version history: 1 - first. 2 - donors: ``Donate``; ``Reserve`` names them, ``Hello`` says how many
slots there are for it, ``WriterStopped`` says who has stopped. 3 - ``Load``, ``Pong``, ``Hello``
and ``Welcome`` count messages, so that one that was lost is noticed; ``Hello.registration``. 4 -
``Stage.num_cached_blocks``, ``Hello.prefix_caching``, ``NotCached``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

import msgspec

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ProtocolError

PROTOCOL_VERSION = 4

MAX_MESSAGE_BYTES = 64 << 20

Id16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""Also of everything since a start: a mover moves terabytes within the hour."""
Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Address = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the class name is the wire tag."""


class TransferKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A transfer and its attempt. The transfer id is 128 random bits, drawn by the router."""

    transfer: Id16
    attempt: Index

    def __str__(self) -> str:
        return f"{self.transfer.hex()[:12]}/{self.attempt}"


# --- shared pieces -------------------------------------------------------------------------------


class GeometrySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``blocks.Geometry`` on the wire."""

    block_tokens: Count
    page_tokens: Count
    layer_page_bytes: tuple[int, ...]
    layout: str
    kv_heads: Count
    kv_dtype: str

    @classmethod
    def of(cls, geometry: Geometry) -> GeometrySpec:
        return cls(**{field: getattr(geometry, field) for field in cls.__struct_fields__})

    def to_geometry(self) -> Geometry:
        """The value that computes sizes. Raises ``ValueError`` for an impossible geometry."""
        return Geometry(**{field: getattr(self, field) for field in self.__struct_fields__})


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The other side of a transfer: how to reach its staging memory, and the slots it granted."""

    engine_id: str
    boot_id: Id16
    host_id: str
    pid: Index
    pid_start: Count
    """Start time of the process in clock ticks: a recycled pid is another process."""
    address: bytes
    region: bytes
    staging_address: Address
    """Where slot 0 lies in the peer's own address space, as one-sided writes name it."""
    slots: tuple[Index, ...]
    """The slots it granted; empty while they are not known."""


class SegmentSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``plan.Segment`` on the wire."""

    reader: str
    first_block: Index
    last_block: Index


class StoredBlock(msgspec.Struct, frozen=True, array_like=True):
    """One block of the store, for an index."""

    hash: Hash
    parent: Hash
    num_bytes: Bytes
    last_used_s: float


class MoverStats(Message, frozen=True, kw_only=True):
    """Counters of a mover since its start (cumulative), and gauges of the moment."""

    storage_read_bytes: Bytes = 0
    storage_read_busy_s: float = 0.0
    """Seconds with at least one read under way."""
    donated_bytes: Bytes = 0
    """Of the bytes read, those for transfers between two other engines."""
    storage_write_bytes: Bytes = 0
    push_to_prefill_bytes: Bytes = 0
    push_to_decode_bytes: Bytes = 0
    blocks_stored: Count = 0
    blocks_not_stored: Count = 0
    corrupt_blocks: Count = 0
    rejected_messages: Count = 0
    load_failures: dict[str, Count] = {}
    """By reason: ``corrupt``, ``missing``, ``io_error``, ``stalled``, ``peer_lost``,
    ``cancelled``, ``not_cached``.
    """
    stage_seconds: tuple[float, ...] = ()
    """Durations of stagings that ended since the last report; not cumulative."""
    slots_used: Count = 0
    slots_free: Count = 0
    slots_quarantined: Count = 0
    donor_slots_used: Count = 0
    donor_slots_stuck: bool = False
    """Every donor slot waits for a read or a push that makes no progress."""
    read_queue_tokens: Count = 0
    open_transfers: Count = 0


# --- router -> engine, in a leg's kv_transfer_params ---------------------------------------------


class LegParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a leg tells the connector: which published transfer is its own. Nothing else crosses."""

    version: int
    boot_id: str
    transfer: str
    attempt: Index
    num_hit_blocks: Index
    num_tokens: Count

    PARAMS_KEY: ClassVar[str] = "dualpath"

    @property
    def key(self) -> TransferKey:
        return TransferKey(bytes.fromhex(self.transfer), self.attempt)

    @classmethod
    def make(
        cls, boot_id: bytes, key: TransferKey, num_hit_blocks: int, num_tokens: int
    ) -> LegParams:
        return cls(
            PROTOCOL_VERSION,
            boot_id.hex(),
            key.transfer.hex(),
            key.attempt,
            num_hit_blocks,
            num_tokens,
        )

    def to_params(self) -> dict[str, object]:
        """The entry of ``kv_transfer_params``, as plain JSON types."""
        return {self.PARAMS_KEY: msgspec.to_builtins(self)}

    @classmethod
    def from_params(cls, params: object) -> LegParams | None:
        """``None`` when there is no entry of ours. Raises ``ProtocolError`` for a bad one."""
        if not isinstance(params, dict) or cls.PARAMS_KEY not in params:
            return None
        try:
            leg = msgspec.convert(params[cls.PARAMS_KEY], cls)
            if len(bytes.fromhex(leg.transfer)) != 16 or len(bytes.fromhex(leg.boot_id)) != 16:
                raise ValueError("ids must be 16 bytes of hex")
        except (msgspec.MsgspecError, ValueError) as exc:
            raise ProtocolError(f"kv_transfer_params.{cls.PARAMS_KEY} rejected: {exc}") from exc
        if leg.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"kv_transfer_params.{cls.PARAMS_KEY} has version {leg.version},"
                f" expected {PROTOCOL_VERSION}"
            )
        return leg


# --- router -> mover -----------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The mover is registered."""

    version: int
    router_boot_id: Id16
    heartbeat_s: float
    send_snapshot: bool
    """This mover shall send the store's content, then ``SnapshotEnd``."""
    num_sent: Count = 0
    """Messages sent to this mover in this registration, this one included. Heartbeats (``Load``,
    ``Ping``, ``Pong``) do not count: nothing depends on one that is lost.
    """


class Refused(Message, frozen=True):
    """The mover may not join; it logs ``reason`` as an error and tries again much later."""

    reason: str


class Reserve(Message, frozen=True):
    """Grant slots for a whole prompt from one pool, FIFO, all or nothing."""

    key: TransferKey
    pool: str
    """``decode`` or ``prefill``."""
    num_tokens: Count
    peer: Peer
    """The other side. The decode side reserves first, so it learns the prefill side without
    slots.
    """
    donors: tuple[Peer, ...] = ()
    """Further readers of the plan, without slots: once staged, they write to the slots as well."""


class Stage(Message, frozen=True, kw_only=True):
    """Start: read the own segments, push what is good, expect the rest from ``peer``."""

    key: TransferKey
    pool: str
    num_tokens: Count
    num_hit_blocks: Index
    root: Hash
    block_hashes: tuple[Hash, ...]
    """Every full block of the prompt, hits first."""
    digest: Hash
    segments: tuple[SegmentSpec, ...]
    peer: Peer
    num_cached_blocks: Index = 0
    """Leading hit blocks that nobody reads: the prefill engine has them in its own prefix cache
    and saves them like new pages.
    """
    num_releases: Index = 1
    """How many requests of the engine will take the slots (``n`` of the client's request)."""


class Donate(Message, frozen=True, kw_only=True):
    """Read for a transfer between two others: push every block to both, through donor slots."""

    key: TransferKey
    block_hashes: tuple[Hash, ...]
    """Of the prompt's blocks, up to the end of the last segment."""
    segments: tuple[SegmentSpec, ...]
    """The donor's own."""
    prefill: Peer
    decode: Peer


class Cut(Message, frozen=True):
    """The hit ends at ``num_hit_blocks``: stop reading and pushing blocks at or beyond it."""

    key: TransferKey
    num_hit_blocks: Index


class End(Message, frozen=True):
    """The transfer is over for the router. With ``drain`` pages already saved are still pushed."""

    key: TransferKey
    drain: bool
    reason: str
    staged: bool = True
    """Whether a ``Stage`` was sent to anybody: then a mover that got none cannot know if its peer
    has one, and writes.
    """


class PeerDied(Message, frozen=True):
    """A mover's connection is gone: transfers with it need proof that its writes have ended."""

    engine_id: str
    boot_id: Id16


class Evict(Message, frozen=True):
    """Remove these blocks from the store."""

    hashes: tuple[Hash, ...]


class Ping(Message, frozen=True):
    """Answer with ``Load`` now."""


class Pong(Message, frozen=True):
    """The answer to every ``Load``, and to anything from a mover that is not registered.

    A boot id other than the one in ``Welcome`` means a new router: say ``Hello`` again.
    """

    router_boot_id: Id16
    num_sent: Count = 0
    """As in ``Welcome``; a mover that has heard another number has lost messages and says ``Hello``
    again. 0: not counted.
    """


RouterMessage = (
    Welcome | Refused | Reserve | Stage | Donate | Cut | End | PeerDied | Evict | Ping | Pong
)

# --- mover -> router -----------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """A mover introduces itself and its engine."""

    version: int
    engine_id: str
    role: str
    boot_id: Id16
    url: str
    model: str
    fingerprint: Hash
    root: Hash
    """Chain root without a cache salt."""
    geometry: GeometrySpec
    max_model_len: Count
    store: str
    store_quota_bytes: Bytes | None
    host_id: str
    pid: Index
    pid_start: Count
    address: bytes
    region: bytes
    staging_address: Address
    num_slots: Count
    """Slots of the pool that transfers use."""
    num_donor_slots: Count = 0
    """Slots to read through for other engines' transfers; 0: it is no donor."""
    kv_tokens: Count = 0
    """Tokens that fit the engine's KV cache; 0: not known."""
    prefix_caching: bool = False
    """Whether vLLM keeps the KV of finished prompts in that cache."""
    registration: Count = 0
    """Grows when the mover has ended its transfers and begins anew, though its boot id stays."""
    num_sent: Count = 0
    """Messages that this mover has sent so far, this one included, heartbeats not; 0: not
    counted.
    """
    registered: bool = False
    """Whether it has heard ``Welcome`` in this registration."""


class Goodbye(Message, frozen=True):
    """The mover ends in order."""

    reason: str


class Load(Message, frozen=True):
    """The heartbeat."""

    stats: MoverStats
    num_sent: Count = 0
    """As in ``Hello``; if the router has heard another number, messages were lost."""


class Reserved(Message, frozen=True):
    """Slots for ``Reserve``, one a block of the prompt, in order."""

    key: TransferKey
    slots: tuple[Index, ...]


class TransferFailed(Message, frozen=True):
    """The attempt cannot go on at this mover. The router ends it and tries another way."""

    key: TransferKey
    reason: str


class SegmentDone(Message, frozen=True):
    """The mover reads no more: all its blocks before ``good_until`` were good and pushed."""

    key: TransferKey
    first_block: Index
    last_block: Index
    good_until: Index
    error: str
    """Empty when ``good_until == last_block``."""


class CutDone(Message, frozen=True):
    """Nothing at or beyond the cut is read or pushed by this mover any more."""

    key: TransferKey
    num_hit_blocks: Index


class Ready(Message, frozen=True):
    """Prefill side: the leading ``num_hit_blocks`` are good and published to the engine."""

    key: TransferKey
    num_hit_blocks: Index


class NotCached(Message, frozen=True):
    """The prefill engine did not have the blocks that the plan left to its own prefix cache, and
    computes the prompt from there on. From its scheduler side through its mover to the router.
    """

    key: TransferKey


class Committed(Message, frozen=True):
    """Decode side: every page of the prompt is good and published to the engine."""

    key: TransferKey


class Ended(Message, frozen=True):
    """All slots of the transfer are free again."""

    key: TransferKey


class Stored(Message, frozen=True):
    """Blocks that the store has now."""

    blocks: tuple[StoredBlock, ...]


class Dropped(Message, frozen=True):
    """Blocks that cannot be read from the store."""

    hashes: tuple[Hash, ...]
    gone: bool
    """They are not there any more (corrupt, missing); else reading them failed and they are."""


class SnapshotEnd(Message, frozen=True):
    """Everything in the store has been sent as ``Stored``."""

    num_blocks: Count


MoverMessage = (
    Hello
    | Goodbye
    | Load
    | Reserved
    | TransferFailed
    | SegmentDone
    | CutDone
    | Ready
    | NotCached
    | Committed
    | Ended
    | Stored
    | Dropped
    | SnapshotEnd
)

# --- engine -> mover, at start -------------------------------------------------------------------


class MoverSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All a mover needs to start; written by the engine's worker to a private file."""

    version: int
    engine_id: str
    socket_path: str
    config: dict[str, object]
    """The engine's ``kv_connector_extra_config``, already checked."""
    url: str
    model: str
    fingerprint: Hash
    root: Hash
    geometry: GeometrySpec
    max_model_len: Count
    kv_tokens: Count = 0
    """As in ``Hello``."""
    prefix_caching: bool = False
    """As in ``Hello``."""


# --- engine -> mover (Unix socket) ---------------------------------------------------------------


class Attach(Message, frozen=True):
    """First message of each connection. ``kind`` is ``worker`` or ``scheduler``."""

    version: int
    kind: str
    pid: Index


class Mapped(Message, frozen=True):
    """The worker has mapped the staging memory: from now on loads from it cannot fail."""


class Saved(Message, frozen=True):
    """Pages ``[first_page, last_page)`` of the prompt, one layer, lie in the outgoing slots."""

    key: TransferKey
    layer: Index
    first_page: Index
    last_page: Index


class Release(Message, frozen=True):
    """One claim of the transfer's slots is over: no copy of it runs or will start."""

    key: TransferKey


class Persist(Message, frozen=True):
    """Store the block that the engine copied into persist slot ``slot``."""

    slot: Index
    hash: Hash
    parent: Hash


class ReturnPersistSlots(Message, frozen=True):
    """Persist slots that will not be used."""

    slots: tuple[Index, ...]


class LocalLoad(Message, frozen=True):
    """Without a router: read these blocks into slots."""

    load_id: Id16
    hashes: tuple[Hash, ...]


class LocalLoadDone(Message, frozen=True):
    """The slots of a local load were copied, or will not be."""

    load_id: Id16


class RootChanged(Message, frozen=True):
    """The engine's weights or cache were reset: earlier blocks are another model's."""

    root: Hash


EngineMessage = (
    Attach
    | Mapped
    | Saved
    | NotCached
    | Release
    | Persist
    | ReturnPersistSlots
    | LocalLoad
    | LocalLoadDone
    | RootChanged
)

# --- mover -> engine (Unix socket) ---------------------------------------------------------------


class Attached(Message, frozen=True, kw_only=True):
    """The answer to ``Attach``; comes with descriptors: staging, slot table, claims, shared index.

    The shared index descriptor is there only when ``index_capacity_blocks`` > 0.
    """

    version: int
    boot_id: Id16
    pid: Index
    staging_bytes: Bytes
    slot_bytes: Bytes
    num_slots: Count
    table_capacity: Count
    table_max_blocks: Count
    index_capacity_blocks: Count


class PersistSlots(Message, frozen=True):
    """Persist slots the scheduler side may use now (in addition to those it has)."""

    slots: tuple[Index, ...]


class LocalLoaded(Message, frozen=True):
    """The leading ``num_good`` blocks of a local load lie in ``slots``."""

    load_id: Id16
    num_good: Index
    slots: tuple[Index, ...]


class LocalStats(Message, frozen=True):
    """Counters for the engine's own metrics; sent to the scheduler side after activity."""

    stats: MoverStats
    idle: bool
    """Nothing is open in the mover: no further report will follow without new work."""


LocalMessage = Attached | PersistSlots | LocalLoaded | LocalStats

# --- mover -> mover (transport notices) ----------------------------------------------------------


class BlocksGood(Message, frozen=True):
    """Hit blocks ``[first_block, last_block)`` lie, checked, in the receiver's slots."""

    key: TransferKey
    receiver_boot_id: Id16
    first_block: Index
    last_block: Index


class PagesGood(Message, frozen=True):
    """Pages ``[first_page, last_page)`` of one layer lie in the receiver's decode slots."""

    key: TransferKey
    receiver_boot_id: Id16
    layer: Index
    first_page: Index
    last_page: Index


class WriterStopped(Message, frozen=True):
    """The sender will write nothing more into the receiver's slots of this attempt.

    Proof by the transport's ordering rule: everything sent before is visible when this arrives.
    """

    key: TransferKey
    receiver_boot_id: Id16
    sender_boot_id: Id16


class StopQuery(Message, frozen=True):
    """The sender has ended the transfer and cannot know that the receiver does not write to its
    slots: it was never staged itself, or the receiver is a donor that has not said so.

    The receiver answers ``WriterStopped`` to ``contact``: at once, and for good, if it does not
    know the transfer; else when it has ended it. A donor ends it for that.
    """

    key: TransferKey
    receiver_boot_id: Id16
    contact: Peer


Notice = BlocksGood | PagesGood | WriterStopped | StopQuery

# --- encoding ------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_router_decoder: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
_mover_decoder: msgspec.msgpack.Decoder[MoverMessage] = msgspec.msgpack.Decoder(MoverMessage)
_engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
_local_decoder: msgspec.msgpack.Decoder[LocalMessage] = msgspec.msgpack.Decoder(LocalMessage)
_notice_decoder: msgspec.msgpack.Decoder[Notice] = msgspec.msgpack.Decoder(Notice)

_T = TypeVar("_T")


def encode(message: Message) -> bytes:
    """Return the wire form of any message."""
    return _encoder.encode(message)


def decode_router_message(payload: bytes | memoryview) -> RouterMessage:
    """Decode what a router sent. Raises ``ProtocolError``."""
    return _decode(_router_decoder, payload)


def decode_mover_message(payload: bytes | memoryview) -> MoverMessage:
    """Decode what a mover sent to the router. Raises ``ProtocolError``."""
    return _decode(_mover_decoder, payload)


def decode_engine_message(payload: bytes | memoryview) -> EngineMessage:
    """Decode what an engine sent to its mover. Raises ``ProtocolError``."""
    return _decode(_engine_decoder, payload)


def decode_local_message(payload: bytes | memoryview) -> LocalMessage:
    """Decode what a mover sent to its engine. Raises ``ProtocolError``."""
    return _decode(_local_decoder, payload)


def decode_notice(payload: bytes | memoryview) -> Notice:
    """Decode a peer mover's notice. Raises ``ProtocolError``."""
    return _decode(_notice_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_T], payload: bytes | memoryview) -> _T:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(payload)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise ProtocolError(f"message rejected: {exc}") from exc
