from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def crc32c(address: int, num_bytes: int, seed: int = 0) -> int: ...
def crc32c_portable(address: int, num_bytes: int, seed: int = 0) -> int: ...
def crc32c_many(address: int, sizes: Sequence[int]) -> list[int]: ...
def crc32c_implementation() -> str: ...
def stream_copy_implementation() -> str: ...
def atomic_load_u64(address: int) -> int: ...
def atomic_store_u64(address: int, value: int) -> None: ...
def atomic_fetch_add_u64(address: int, delta: int) -> int: ...
def atomic_compare_exchange_u64(address: int, expected: int, desired: int) -> tuple[bool, int]: ...

class UcxError(RuntimeError): ...
class PeerClosedError(RuntimeError): ...

class UcxLibrary:
    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> str: ...
    def context_info(self) -> str: ...

class TcpError(RuntimeError): ...

class TcpEngine:
    def __init__(
        self,
        listen_host: str,
        listen_port: int,
        token: bytes,
        max_put_bytes: int,
        first_id: int,
        traffic_class: int = -1,
    ) -> None: ...
    @property
    def listen_port(self) -> int: ...
    def fileno(self) -> int: ...
    def register_region(self, address: int, num_bytes: int, file: int) -> None: ...
    def connect(
        self,
        host: str,
        port: int,
        token: bytes,
        remote_address: int,
        remote_bytes: int,
        by_reference: bool,
    ) -> int: ...
    def put(self, peer_id: int, pieces: npt.NDArray[np.uint64], notice: bytes) -> int: ...
    def disconnect(self, peer_id: int) -> None: ...
    def poll(self) -> list[tuple[int, int, bool, bytes, bool]]: ...
    def close(self) -> None: ...

class PeerMemory:
    def __init__(
        self,
        pid: int,
        fd: int,
        device: int,
        inode: int,
        remote_address: int,
        num_bytes: int,
    ) -> None: ...

class UcxEngine:
    def __init__(
        self,
        library: UcxLibrary,
        listen_host: str,
        listen_port: int,
        max_inflight_bytes: int,
        max_put_bytes: int,
    ) -> None: ...
    @property
    def worker_address(self) -> bytes: ...
    @property
    def listen_port(self) -> int: ...
    def context_info(self) -> str: ...
    def fileno(self) -> int: ...
    def register_region(self, address: int, num_bytes: int) -> bytes: ...
    def connect(
        self,
        host: str,
        port: int,
        worker_address: bytes,
        remote_key: bytes,
        remote_address: int,
        remote_bytes: int,
        memory: PeerMemory | None = None,
    ) -> int: ...
    def put(self, peer_id: int, pieces: npt.NDArray[np.uint64], notice: bytes) -> int: ...
    def disconnect(self, peer_id: int) -> None: ...
    def poll(self) -> list[tuple[int, int, bool, bytes, bool]]: ...
    def close(self) -> None: ...

class RawPutTarget:
    def __init__(self, library: UcxLibrary, address: int, num_bytes: int) -> None: ...
    @property
    def worker_address(self) -> bytes: ...
    @property
    def packed_key(self) -> bytes: ...

class RawPutLoop:
    def __init__(
        self,
        library: UcxLibrary,
        address: int,
        num_bytes: int,
        remote_worker: bytes,
        remote_key: bytes,
        timeout_s: float,
    ) -> None: ...
    def put(
        self, pieces: npt.NDArray[np.uint64], progress_every: int, timeout_s: float
    ) -> float: ...

Outcome = tuple[int, int, int, int, int, int, int, bytes, bytes]
# id, status, step, errno, bytes moved, bytes found, mtime in seconds, header, CRCs (little-endian)

class BlockEngine:
    def __init__(
        self,
        *,
        io_uring: bool,
        direct: bool,
        num_threads: int,
        depth: int,
        piece_bytes: int,
        directory: str,
        header_bytes: int,
        payload_bytes: int,
        crc_table_offset: int,
        header_crc_offset: int,
        layer_bytes: Sequence[int],
    ) -> None: ...
    def fileno(self) -> int: ...
    def read(self, path: str, address: int, verify: bool) -> Outcome: ...
    def write(self, path: str, temporary: str, address: int, header: bytes) -> Outcome: ...
    def submit_read(self, path: str, address: int, verify: bool) -> int: ...
    def submit_write(self, path: str, temporary: str, address: int, header: bytes) -> int: ...
    def cancel(self, id: int) -> bool: ...  # noqa: A002  # the binding's name
    def started_s(self, id: int) -> float | None: ...  # noqa: A002  # the binding's name
    def poll(self) -> list[Outcome]: ...
    def close(self, timeout_s: float) -> bool: ...

class PageMap:
    def __init__(
        self,
        layers: Sequence[tuple[int, int, int, int, int, int]],
        num_blocks: int,
        address: int,
        slot_bytes: int,
        num_slots: int,
        pages_per_block: int,
    ) -> None: ...

class PageRows:
    def __init__(
        self, page_map: PageMap, copies: Iterable[tuple[int, Sequence[int], Sequence[int]]]
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    def __len__(self) -> int: ...

class CopyQueue:
    def __init__(self) -> None: ...
    def submit(
        self,
        rows: PageRows,
        load: bool,
        first_layer: int,
        end_layer: int,
        background: bool = False,
        reported: bool = False,
    ) -> int: ...
    def submit_barrier(self) -> int: ...
    def wait_reports(self, seen: int, timeout_s: float) -> tuple[int, str]: ...
    def submit_layers(self, rows: PageRows, load: bool) -> list[int]: ...
    def done_until(self, ticket: int) -> int: ...
    def wait(self, ticket: int, timeout_s: float) -> bool: ...
    def close(self, timeout_s: float) -> bool: ...

def leave_compute_cores() -> None: ...

class CudaMark: ...

class CudaCopies:
    def __init__(self, device: int, method: str) -> None: ...
    def submit(
        self,
        rows: PageRows,
        load: bool,
        first_layer: int,
        end_layer: int,
        after: CudaMark,
        background: bool = False,
        reported: bool = False,
    ) -> CudaMark: ...
    def submit_barrier(self) -> None: ...
    def wait_reports(self, seen: int, timeout_s: float) -> tuple[int, str]: ...
    def now(self, stream: int) -> CudaMark: ...
    def hold(self, stream: int, mark: CudaMark, timeout_s: float) -> bool: ...
    def wait(self, mark: CudaMark, timeout_s: float) -> bool: ...
    def close(self, timeout_s: float) -> bool: ...

class SimPrefillCost:
    step_s: float
    token_s: float
    pair_s: float
    selected_pair_s: float
    selected: int
    cache_tokens: int
    def attention_s(self, num_cached: int, num_new: int) -> float: ...

class SimDecodeCost:
    step_s: float
    request_s: float
    token_s: float
    selected_token_s: float
    selected: int
    cache_tokens: int
    def context_s(self, context: int) -> float: ...

class SimShape:
    num_prefill_nodes: int
    num_decode_nodes: int
    engines_per_node: int
    prefill_group_nodes: int
    decode_group_nodes: int
    storage_bytes_per_s: float
    engine_nic_bytes_per_s: float
    staging_bytes: int

class SimSwitches:
    oracle: bool
    layerwise: bool
    prefill_stages_all: bool
    persist: bool

class SimSettings:
    kv_bytes_per_token: int
    block_tokens: int
    quota_s: float
    tool_time_s: float
    window_s: float
    report_every_s: float
    stop_s: float
    measure_from_s: float
    measure_until_s: float
    seed: int
    policy: PolicyParameters
    def __init__(self) -> None: ...
    @property
    def shape(self) -> SimShape: ...
    @property
    def prefill(self) -> SimPrefillCost: ...
    @property
    def decode(self) -> SimDecodeCost: ...
    @property
    def switches(self) -> SimSwitches: ...
    def set_curve(self, tokens_per_s: float, s_per_token_pair: float) -> None: ...
    def add_fault(
        self, kind: str, node: int, at_s: float, factor: float, until_s: float
    ) -> None: ...

def simulate(
    settings: SimSettings,
    offsets: npt.NDArray[np.int64],
    append_tokens: npt.NDArray[np.int32],
    generated_tokens: npt.NDArray[np.int32],
    trajectory: npt.NDArray[np.int32],
    first_tokens: npt.NDArray[np.int32],
    arrival_s: npt.NDArray[np.float64],
) -> dict[str, Any]: ...

NO_LIMIT: int

class Role:
    PREFILL: Role
    DECODE: Role

class Placement:
    ROUND_ROBIN: Placement
    FEWEST_TOKENS: Placement
    PAPER: Placement
    BALANCED: Placement

class ReadPath:
    PREFILL: ReadPath
    ALTERNATE: ReadPath
    SHORTER_QUEUE: ReadPath
    SPLIT: ReadPath
    POOL: ReadPath

class NodeState:
    read_queue_tokens: int
    push_queue_tokens: int
    recent_read_tokens: float
    read_rate: float
    push_rate: float
    def __init__(self) -> None: ...

class EngineState:
    role: Role
    usable: bool
    donates: bool
    node: int
    group: int
    num_requests: int
    num_tokens: int
    num_compute_tokens: int
    free_kv_tokens: int
    free_staging_tokens: int
    max_request_tokens: int
    def __init__(self) -> None: ...

class PrefillCurve:
    def __init__(self, tokens_per_s: float, s_per_token_pair: float) -> None: ...
    def seconds(self, cached_tokens: float, new_tokens: float) -> float: ...

class ClusterView:
    nominal_read_rate: float
    def __init__(self, nodes: Sequence[NodeState], engines: Sequence[EngineState]) -> None: ...
    def node(self, index: int) -> NodeState: ...
    def engine(self, index: int) -> EngineState: ...
    def add_reads(self, node: int, num_tokens: int) -> None: ...
    def forget_reads(self, node: int, elapsed_s: float) -> None: ...
    def add_load(
        self,
        engine: int,
        num_requests: int,
        num_tokens: int,
        num_compute_tokens: int,
        room_tokens: int,
    ) -> None: ...
    def set_prefill_curve(self, tokens_per_s: float, s_per_token_pair: float) -> None: ...
    def check(self) -> None: ...

class WaitingLine:
    def __init__(self) -> None: ...
    def push(self, num_tokens: int) -> int: ...
    def pop(self) -> None: ...
    def cancel(self, ticket: int) -> bool: ...
    def head(self) -> int: ...
    def tokens_fitting(self, room: int) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def __len__(self) -> int: ...

class ReadRate:
    def __init__(self) -> None: ...
    def add(self, num_tokens: int, busy_s: float, elapsed_s: float, nominal: float) -> None: ...
    @property
    def rate(self) -> float: ...

class PrefixCacheModel:
    def __init__(self, room_tokens: int) -> None: ...
    @staticmethod
    def room_of(cache_tokens: int) -> int: ...
    def holds(self, earlier: int, shared_tokens: int, num_tokens: int) -> bool: ...
    def begin(
        self, key: int, num_tokens: int, earlier: int = 0, shared_tokens: int = 0
    ) -> None: ...
    def arrive(self, key: int) -> bool: ...
    def end(self, key: int, computed: bool) -> None: ...
    def missed(self, key: int) -> None: ...
    @property
    def open_tokens(self) -> int: ...

class PolicyParameters:
    placement: Placement
    read_path: ReadPath
    alpha_s: float
    beta_tokens: int
    z_slack: float
    min_segment_blocks: int
    max_readers: int
    evenness: float
    evenness_wait: float
    split_fraction: float
    near_tie: float
    prompt_token_work: float
    read_past_cache: bool
    cached_token_work: float
    recompute: bool
    recompute_price: float
    def __init__(self, mode: str) -> None: ...

class PolicyCore:
    def __init__(self, parameters: PolicyParameters) -> None: ...
    def decide(
        self,
        view: ClusterView,
        num_tokens: int,
        num_hit_blocks: int,
        block_tokens: int,
        reserve_tokens: int = 0,
        line: WaitingLine | None = None,
        ignore_load: bool = False,
        turn: int = 0,
        cached: Sequence[tuple[int, int]] = (),
    ) -> tuple[int, int, int, int, int, tuple[tuple[int, int, int], ...], float]: ...
    @property
    def divides_late(self) -> bool: ...
    def divide(
        self,
        view: ClusterView,
        prefill: int,
        decode: int,
        first_block: int,
        last_block: int,
        block_tokens: int,
    ) -> tuple[tuple[int, int, int], ...]: ...
