"""Configuration: the only place that parses dictionaries, environment and flags.

Everything is checked here or at start, in one message that says what, where, expected and found.
Frozen models, unknown keys refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ConfigError

GIB = 1 << 30

_DONOR_SLOTS = 16
"""Enough to keep a storage NIC busy: each slot is free again as soon as its block was pushed."""

_DECODE_PERSIST_SLOTS = 64
"""Enough for the generated blocks of a large batch: each is stored in a fraction of a second."""

EngineRole = Literal["prefill", "decode", "both"]
Mode = Literal["prefill_only", "dual", "split", "pool"]
StoreIo = Literal["auto", "io_uring", "threads"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_ModelT = TypeVar("_ModelT", bound=BaseModel)


class Deadlines(_Frozen):
    """Seconds without progress after which another way is taken. Queued time does not count."""

    attach_s: float = Field(60.0, gt=0, description="an engine waits for its mover to start")
    stage_s: float = Field(20.0, gt=0, description="a reader makes no progress on its segment")
    commit_s: float = Field(
        30.0, gt=0, description="decode staging is not complete after the prefill leg"
    )
    reserve_s: float = Field(
        120.0, gt=0, description="a reservation at the head of its queue gets no slots"
    )
    router_lost_s: float = Field(30.0, gt=0, description="a mover ends a lost router's transfers")
    stuck_warning_s: float = Field(30.0, gt=0, description="a transfer open this long is a WARNING")


class EngineConfig(_Frozen):
    """``kv_connector_extra_config`` of one engine."""

    role: EngineRole = Field(description="what this engine does; kv_role stays kv_both")
    store: str = Field(description="where Full Blocks live, e.g. file:///mnt/kv")
    router: str | None = Field(None, description="the router's control address, tcp://host:port")
    url: str | None = Field(
        None,
        description="this engine's HTTP address as the router reaches it; found from vLLM's flags",
    )
    name: str | None = Field(None, description="engine id shown in logs and metrics")
    block_tokens: int | None = Field(
        None, gt=0, description="tokens a Full Block; default 64, or vLLM's block size if larger"
    )
    staging_bytes: int = Field(2 * GIB, gt=0, description="staging memory of this engine's mover")
    persist_slots: int | None = Field(
        None,
        ge=0,
        description="staging slots for storing blocks that no transfer stores; default: 64,"
        " half of the staging for role both",
    )
    donor_slots: int | None = Field(
        None,
        ge=0,
        description="staging slots to read through for other engines' transfers; 0: never read for"
        " others; default: 16, at most an eighth of what the longest prompt leaves",
    )
    store_quota_bytes: int | None = Field(
        None, gt=0, description="evict least recently used blocks above this size"
    )
    store_io: StoreIo = Field(
        "auto",
        description="how blocks are moved: auto probes the store and takes io_uring with direct I/O"
        " where both work, threads otherwise; io_uring or threads insists",
    )
    store_threads: int | None = Field(
        None,
        ge=1,
        le=64,
        description="threads that read; as many write. Default 4 with io_uring, where they share"
        " store_depth; 16 with threads, where each moves one block at a time",
    )
    store_depth: int = Field(
        64,
        ge=1,
        le=4096,
        description="with io_uring, pieces of 1 MiB that are read at a time; as many are written",
    )
    verify_checksums: bool = Field(
        True, description="check every Layer Block read; off for tests only"
    )
    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto",
        description="how staging memories reach each other; auto: shared memory, RDMA or TCP",
    )
    require_rdma: bool = Field(
        False, description="refuse to start, or to reach other hosts, without RDMA"
    )
    service_level: int | None = Field(
        None, ge=0, le=15, description="InfiniBand service level of pushed KV; default: UCX's"
    )
    traffic_class: int | None = Field(
        None,
        ge=0,
        le=255,
        description="IP traffic class of pushed KV over RoCE and TCP, DSCP in its upper six bits",
    )
    listen: str = Field("127.0.0.1", description="address the mover's transport listens on")
    model_id: str | None = Field(
        None, description="identity of the weights; default: SHA-256 over the weight files"
    )
    index_capacity_blocks: int = Field(
        1 << 20,
        ge=1024,
        description="blocks the shared-memory index of a router-less engine can hold",
    )
    runtime_dir: Path | None = Field(
        None, description="sockets and locks; default under /tmp, by uid"
    )
    profile: Path | None = Field(
        None,
        description="what vllm-dualpath profile wrote: with --scheduler-cls of ours, steps are"
        " filled up to quota_s of attention",
    )
    quota_s: float = Field(
        0.3, gt=0, description="predicted seconds of attention a step; counts with a profile"
    )
    keys: Path | None = Field(None, description="CURVE key directory; required off loopback")
    insecure: bool = Field(False, description="allow unauthenticated control off loopback")
    deadlines: Deadlines = Field(default_factory=Deadlines)  # type: ignore[arg-type]

    @field_validator("store")
    @classmethod
    def _store_is_a_uri(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"expected file:///absolute/path, found {value!r}")
        return value

    @field_validator("router")
    @classmethod
    def _router_is_tcp(cls, value: str | None) -> str | None:
        return None if value is None else check_endpoint(value)

    @model_validator(mode="after")
    def _role_fits_router(self) -> EngineConfig:
        if self.router is None and self.role != "both":
            raise ValueError(
                f"role {self.role!r} needs the key router (--router tcp://host:port);"
                " without a router the role is 'both'"
            )
        if self.router is not None and self.role == "both":
            raise ValueError("role 'both' works without a router: use prefill or decode with one")
        chosen = self.require_rdma or (self.service_level, self.traffic_class) != (None, None)
        if chosen and self.transport != "auto":
            raise ValueError(
                "require_rdma, service_level and traffic_class need transport 'auto',"
                f" found {self.transport!r}"
            )
        require_security(self.router, self.keys, self.insecure, "router")
        if self.router is not None and not is_loopback(self.listen) and not self.insecure:
            raise ValueError(
                f"listen {self.listen!r} is not loopback; data-path authentication is not built"
                " yet: set insecure: true on a trusted network"
            )
        return self


class RouterConfig(_Frozen):
    """Flags of ``vllm-dualpath router``."""

    listen: str = Field("127.0.0.1:9000", description="HTTP address clients use")
    control: str = Field(
        "tcp://127.0.0.1:9100", description="control address that movers connect to"
    )
    mode: Mode = Field("dual", description="policy: who reads the hit blocks")
    split_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="split mode: share the prefill side reads; default: by queues and rates, so"
        " that both sides end together",
    )
    min_segment_blocks: int = Field(
        4,
        ge=1,
        description="split and pool mode: each reader reads at least so many blocks, or none",
    )
    max_readers: int = Field(
        4, ge=1, le=16, description="pool mode: at most so many engines read for one request"
    )
    short_prompt_tokens: int = Field(
        256,
        ge=0,
        description="a decode engine computes prompts of at most so many tokens itself: that costs"
        " it less than a transfer would; 0: none. Text counts as a token for each four bytes of"
        " the request",
    )
    alpha_s: float = Field(
        3.0, gt=0, description="a prefill engine with more seconds to read is avoided"
    )
    beta_s: float = Field(
        5.0, gt=0, description="a prefill engine with more seconds of tokens takes no request"
    )
    prefill_tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="what a prefill engine computes; default: the profile's; without either beta"
        " does not count",
    )
    profile: Path | None = Field(
        None, description="what vllm-dualpath profile wrote: rates of computing and of reading"
    )
    read_past_cache: bool = Field(
        True,
        description="do not read what the prefill engine still has in vLLM's own prefix cache",
    )
    recompute: bool = Field(
        False,
        description="do not read the end of a hit that is computed sooner than read; needs"
        " prefill_tokens_per_s or a profile",
    )
    queue_wait_s: float = Field(
        60.0,
        ge=0,
        description="a request waits this long for an engine below beta or with room; then it goes"
        " where the load is least",
    )
    keys: Path | None = Field(None, description="CURVE key directory; required off loopback")
    insecure: bool = Field(False, description="allow unauthenticated control off loopback")
    max_body_bytes: int = Field(8 << 20, gt=0, description="largest request body accepted")
    engine_wait_s: float = Field(
        5.0, ge=0, description="a request waits this long for a lost engine"
    )
    heartbeat_s: float = Field(2.0, gt=0, description="movers report this often")
    deadlines: Deadlines = Field(default_factory=Deadlines)  # type: ignore[arg-type]

    @field_validator("control")
    @classmethod
    def _control_is_tcp(cls, value: str) -> str:
        return check_endpoint(value)

    @model_validator(mode="after")
    def _consistent(self) -> RouterConfig:
        if self.recompute and self.prefill_tokens_per_s is None and self.profile is None:
            raise ValueError("recompute needs prefill_tokens_per_s or a profile")
        require_security(self.control, self.keys, self.insecure, "control")
        return self


def parse_engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """Parse ``kv_connector_extra_config``. Raises ``ConfigError`` naming every bad key at once."""
    return parse(EngineConfig, values, "kv_connector_extra_config")


def parse_router_config(values: Mapping[str, Any]) -> RouterConfig:
    """Parse the router's flags. Raises ``ConfigError`` naming every bad flag at once."""
    return parse(RouterConfig, values, "router")


@dataclass(frozen=True, slots=True)
class StagingDivision:
    """How an engine's staging slots are divided."""

    num_prompt_slots: int
    """For transfers and loads."""
    num_donor_slots: int
    """To read through for others."""
    num_persist_slots: int


def divide_staging(config: EngineConfig, geometry: Geometry, max_model_len: int) -> StagingDivision:
    """Divide the staging memory. Raises ``ConfigError`` if the longest prompt would not fit: its
    reservation would wait for ever.
    """
    num_slots = config.staging_bytes // geometry.slot_bytes
    num_prompt = geometry.num_blocks(max_model_len)
    num_persist = _num_persist_slots(config, num_slots, num_prompt)
    num_donor = _num_donor_slots(config, num_slots - num_prompt - num_persist)
    num_needed = num_prompt + num_persist + num_donor
    if num_slots < num_needed:
        raise ConfigError(
            f"kv_connector_extra_config.staging_bytes: a request of max_model_len {max_model_len}"
            f" tokens, {num_persist} persist and {num_donor} donor slots need {num_needed} slots of"
            f" {geometry.slot_bytes} bytes; expected at least {num_needed * geometry.slot_bytes},"
            f" found {config.staging_bytes} ({num_slots} slots); raise it or lower --max-model-len"
        )
    return StagingDivision(num_slots - num_persist - num_donor, num_donor, num_persist)


def _num_persist_slots(config: EngineConfig, num_slots: int, num_prompt: int) -> int:
    if config.role == "prefill":
        return 0
    if config.persist_slots is not None:
        return config.persist_slots
    # Without a router every block is stored this way, a whole prompt's at once.
    wanted = num_slots // 2 if config.role == "both" else _DECODE_PERSIST_SLOTS
    return max(1, min(wanted, num_slots - num_prompt))


def _num_donor_slots(config: EngineConfig, num_left: int) -> int:
    if config.role == "both":
        return 0
    if config.donor_slots is not None:
        return config.donor_slots
    return max(0, min(_DONOR_SLOTS, num_left // 8))


def check_endpoint(value: str) -> str:
    """Return ``value`` if it is ``tcp://host:port``; raise ``ValueError`` otherwise."""
    parts = urlsplit(value)
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None:
        raise ValueError(f"expected tcp://host:port, found {value!r}")
    return value


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_security(endpoint: str | None, keys: Path | None, insecure: bool, key: str) -> None:
    """Off loopback, CURVE keys or an explicit ``insecure`` are needed;
    raise ``ValueError`` if not.
    """
    if endpoint is None or keys is not None or insecure:
        return
    host = urlsplit(endpoint).hostname or ""
    if not is_loopback(host):
        raise ValueError(
            f"{key} {endpoint!r} is not loopback: set keys (vllm-dualpath keys makes them)"
            " or insecure: true on a trusted network"
        )


def parse(model: type[_ModelT], values: Mapping[str, Any], where: str) -> _ModelT:
    """A checked ``model``. Raises ``ConfigError`` naming every bad key at once."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as exc:
        errors = exc.errors()
        lines = [_line(error) for error in errors]
        if any(error["type"] == "extra_forbidden" for error in errors):
            lines.append(f"  known keys: {', '.join(sorted(model.model_fields))}")
        raise ConfigError("\n".join([f"{where}: {len(errors)} problem(s)", *lines])) from exc


def _line(error: ErrorDetails) -> str:
    """One problem; of keys that do not fit together the message itself says what was found."""
    if not error["loc"]:
        return f"  {error['msg']}"
    key = ".".join(str(part) for part in error["loc"])
    return f"  {key}: {error['msg']} (found {_short(error['input'])})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
