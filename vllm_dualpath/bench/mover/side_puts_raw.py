"""Puts by a plain ``ucp_put_nbx`` loop and one flush: what UCX itself can do."""

from __future__ import annotations

from typing import Any

from vllm_dualpath import native
from vllm_dualpath.bench.mover.side_puts_memory import InitiatorMemory, TargetMemory, make_pieces
from vllm_dualpath.transport.base import PutArray

_TIMEOUT_S = 20.0


class Target(TargetMemory):
    """A worker whose thread does nothing but progress it: it spins, as fast as a target can be."""

    def __init__(self) -> None:
        super().__init__()
        self._target = native.RawPutTarget(
            native.load_ucx(), self.memory.address, self.memory.num_bytes
        )

    def hello(self) -> dict[str, Any]:
        return {
            "worker": self._target.worker_address,
            "key": self._target.packed_key,
            "address": self.memory.address,
        }


class Initiator(InitiatorMemory):
    """The loop; it is timed in C++."""

    def __init__(self) -> None:
        super().__init__()
        self._loop: native.RawPutLoop | None = None
        self._remote_address = 0
        self._pieces: dict[int, PutArray] = {}
        self.progress_every = 0

    def connect(self, hello: dict[str, Any], same_host: bool) -> str:
        del same_host  # always by worker address
        self._loop = native.RawPutLoop(
            native.load_ucx(),
            self.memory.address,
            self.memory.num_bytes,
            hello["worker"],
            hello["key"],
            _TIMEOUT_S,
        )
        self._remote_address = hello["address"]
        return f"ucx {native.load_ucx().version}"

    def prepare(self, piece_bytes: int, seed: int) -> None:
        self._pieces[piece_bytes] = make_pieces(
            self.memory, self._remote_address, piece_bytes, seed
        )

    def set_progress_every(self, num_puts: int) -> None:
        self.progress_every = num_puts

    def put(self, piece_bytes: int) -> float:
        assert self._loop is not None, "connect comes first"
        return self._loop.put(self._pieces[piece_bytes], self.progress_every, _TIMEOUT_S)
