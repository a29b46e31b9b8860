"""``python -m vllm_dualpath.bench.mover.child ROLE FD [CORE]``: one end of a measurement.

The role's module is imported here and nowhere else, so that NIXL's UCX and ours never share a
process. Ends when the other end of the socket ``FD`` is closed.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import msgspec

ROLES = {
    "ours-target": "side_puts_ours:Target",
    "ours-initiator": "side_puts_ours:Initiator",
    "raw-target": "side_puts_raw:Target",
    "raw-initiator": "side_puts_raw:Initiator",
    "nixl-target": "side_puts_nixl:Target",
    "nixl-initiator": "side_puts_nixl:Initiator",
    "storage": "side_storage:Storage",
    "copies": "side_copies:Copies",
    "movers": "side_movers:Movers",
    "stalled-movers": "side_stalled:StalledMovers",
}


def make_role(name: str) -> Any:
    """Import and build the object whose methods are called."""
    module, _, class_name = ROLES[name].partition(":")
    return getattr(importlib.import_module(f"vllm_dualpath.bench.mover.{module}"), class_name)()


def serve(connection: Connection, role: str) -> None:
    """Answer calls until the benchmark closes its end."""
    # Built at once, so that many children start side by side; a failure is every call's answer.
    target, failure = _build(role)
    while True:
        try:
            method, arguments = msgspec.msgpack.decode(connection.recv_bytes())
        except EOFError:
            return
        if failure:
            answer: tuple[bool, Any] = (False, failure)
        else:
            answer = _call(target, method, arguments)
        connection.send_bytes(msgspec.msgpack.encode(answer))


def _build(role: str) -> tuple[Any, str]:
    try:
        return make_role(role), ""
    except Exception as exc:
        traceback.print_exc()
        return None, f"{type(exc).__name__}: {exc}"


def _call(target: Any, method: str, arguments: Any) -> tuple[bool, Any]:
    try:
        return True, getattr(target, method)(*arguments)
    except Exception as exc:  # told to the benchmark, which ends the run
        traceback.print_exc()
        return False, f"{type(exc).__name__}: {exc}"


def main() -> None:
    """Pin, then serve. Threads that libraries start inherit the affinity."""
    role, fd = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        os.sched_setaffinity(0, {int(sys.argv[3])})
    gc.disable()  # a collection in a timed part would be noise; a child makes little garbage
    try:
        serve(Connection(fd), role)
    except (BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
    # Not through interpreter shutdown: libraries' spinning threads and exit handlers may hang it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
