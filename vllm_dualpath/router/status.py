"""What ``/dualpath/status`` shows: engines, loads and open transfers, for people and tools."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.flow import Core
from vllm_dualpath.router.transfer import Transfer


def status_of(core: Core) -> dict[str, Any]:
    """Plain JSON types. Ids only: no tokens, no keys, no addresses of memory."""
    cluster = core.cluster
    return {
        "mode": core.config.mode,
        "engines": [_engine(engine) for engine in cluster.engines],
        "transfers": [_transfer(transfer) for transfer in cluster.transfers.values()],
        "index": {
            "num_blocks": cluster.stores.num_blocks,
            "total_bytes": cluster.stores.total_bytes,
            "snapshots_pending": cluster.stores.num_pending,
        },
        "rejected_messages": cluster.rejected_messages,
    }


def _engine(engine: Engine) -> dict[str, Any]:
    hello = engine.hello
    return {
        "engine_id": engine.engine_id,
        "role": engine.role,
        "url": hello.url,
        "model": hello.model,
        "boot_id": hello.boot_id.hex(),
        "host_id": hello.host_id,
        "pid": hello.pid,
        "serving": engine.serving,
        "store": hello.store,
        "block_tokens": hello.geometry.block_tokens,
        "max_model_len": hello.max_model_len,
        "slots": {
            "total": hello.num_slots,
            "used": engine.stats.slots_used,
            "free": engine.stats.slots_free,
            "quarantined": engine.stats.slots_quarantined,
            "donor": hello.num_donor_slots,
            "donor_used": engine.stats.donor_slots_used,
        },
        "load": {
            "num_requests": engine.num_requests,
            "num_tokens": engine.num_tokens,
            "read_queue_tokens": engine.read_queue_tokens,
        },
        "stats": msgspec.to_builtins(engine.stats),
    }


def _transfer(transfer: Transfer) -> dict[str, Any]:
    return {
        "key": str(transfer.key),
        "state": transfer.describe(),
        "prefill": transfer.prefill.engine_id,
        "decode": transfer.decode.engine_id,
        "donors": [donor.engine_id for donor in transfer.donors],
        "num_tokens": transfer.prompt.num_tokens,
        "num_hit_blocks": transfer.num_hit_blocks,
    }
