"""Puts by NIXL, a baseline that users have: WRITE with prepared descriptor lists.

NIXL brings a UCX of its own, so this runs in processes that never load ours. The transfer handle is
made outside the timed part: NIXL is asked for nothing but posting and completing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import time
from typing import Any

import numpy as np

from vllm_dualpath.bench.mover.side_puts_memory import InitiatorMemory, TargetMemory, permutation
from vllm_dualpath.errors import TransportError

_PUT_S = 20.0
_WHEELS = ("nixl_cu12", "nixl_cu13")


def find_nixl() -> str:
    """The wheel that holds NIXL. Its ``nixl`` package only picks one, and imports torch for that.

    NIXL is no dependency: it is imported only here. Raises ``ModuleNotFoundError``.
    """
    for name in _WHEELS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ModuleNotFoundError(f"none of {', '.join(_WHEELS)} is installed")


def make_agent(name: str, progress_thread: bool) -> Any:
    """An agent with the UCX backend."""
    api = importlib.import_module(f"{find_nixl()}._api")
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress_thread))


class Target(TargetMemory):
    """An agent whose progress thread receives; NIXL's spins, about a core."""

    def __init__(self) -> None:
        super().__init__()
        self._agent = make_agent("target", progress_thread=True)
        self._registered = self._agent.register_memory(
            [(self.memory.address, self.memory.num_bytes, 0, "")], "DRAM"
        )

    def hello(self) -> dict[str, Any]:
        return {"metadata": self._agent.get_agent_metadata(), "address": self.memory.address}


class Initiator(InitiatorMemory):
    """An agent that writes, driven by polling.

    Without a progress thread: that was faster everywhere than one that competes with the poller.
    """

    def __init__(self) -> None:
        super().__init__()
        self._agent = make_agent("initiator", progress_thread=False)
        self._agent.register_memory([(self.memory.address, self.memory.num_bytes, 0, "")], "DRAM")
        self._transfers: dict[int, Any] = {}
        self._remote_name = ""
        self._remote_address = 0

    def connect(self, hello: dict[str, Any], same_host: bool) -> str:
        del same_host  # UCX_TLS decides
        self._remote_name = self._agent.add_remote_agent(hello["metadata"])
        self._remote_address = hello["address"]
        wheel = find_nixl()
        return f"{wheel} {importlib.metadata.version(wheel)}"

    def prepare(self, piece_bytes: int, seed: int) -> None:
        order = permutation(self.memory.num_bytes, piece_bytes, seed)
        local = self._agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _descriptors(self.memory.address, piece_bytes, len(order)), "DRAM"
        )
        remote = self._agent.prep_xfer_dlist(
            self._remote_name, _descriptors(self._remote_address, piece_bytes, len(order)), "DRAM"
        )
        self._transfers[piece_bytes] = self._agent.make_prepped_xfer(
            "WRITE", local, np.arange(len(order), dtype=np.int32), remote, order.astype(np.int32)
        )

    def put(self, piece_bytes: int) -> float:
        """Seconds from posting to DONE, polled without a pause."""
        handle = self._transfers[piece_bytes]
        start = time.perf_counter()
        state = self._agent.transfer(handle)
        while state == "PROC" and time.perf_counter() - start < _PUT_S:
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - start
        if state != "DONE":
            raise TransportError(f"NIXL transfer: expected DONE in {_PUT_S} s, found {state}")
        return seconds


def _descriptors(address: int, piece_bytes: int, num_pieces: int) -> Any:
    """(address, bytes, device) of every piece, in order."""
    rows = np.zeros((num_pieces, 3), dtype=np.uint64)
    rows[:, 0] = np.uint64(address) + np.arange(num_pieces, dtype=np.uint64) * np.uint64(
        piece_bytes
    )
    rows[:, 1] = piece_bytes
    return rows
