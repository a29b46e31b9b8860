"""Every exception this package raises on purpose.

    DualPathError
     |-- ConfigError               a key, flag or combination that cannot work; raised at start
     |-- StorageError              a Full Block store could not do what was asked
     |    |-- BlockNotFound        the block is not (or no longer) there: a short hit
     |    |-- BlockCorrupt         the bytes are not the block they claim to be
     |    |-- StoreFull            no space left; the block is not stored
     |    `-- OutOfDescriptors     no file could be opened now; nothing is wrong with the block
     |-- TransportError            bytes could not be moved to a peer
     |    |-- PeerLost             the peer's process or connection is gone
     |    |-- TransferTimeout      no progress for longer than the deadline
     |    `-- IncompatiblePeer     another protocol version, model or geometry
     |-- ProtocolError             a message that breaks the wire rules; rejected and counted
     |-- StagingFull               no slots now and the caller asked not to wait
     |-- SyncLoadFailed            a forward pass reads KV that was not loaded; ends the engine
     |-- LaunchError               a process of a local cluster did not start or ended early
     |-- SimulationStalled         faults left agents that no simulated engine can serve
     |-- RequestError              a server refused a request or answered something else
     `-- NativeUnavailable         the compiled core or a library it needs is missing

A message says what failed, for which key or peer, what was expected and found, and what to do.
Foreign exceptions are translated once, where the foreign library is called, with ``from exc``.
"""


class DualPathError(Exception):
    """Base of every exception raised on purpose by vllm-dualpath."""


class ConfigError(DualPathError):
    """A configuration that cannot work. Raised while starting, never while serving."""


class StorageError(DualPathError):
    """A Full Block store could not do what was asked."""


class BlockNotFound(StorageError):
    """The block is not in the store, or was evicted between plan and open."""


class BlockCorrupt(StorageError):
    """Short, foreign or damaged bytes where a block should be."""


class StoreFull(StorageError):
    """The store has no space left for another block."""


class OutOfDescriptors(StorageError):
    """The process or the host has no file descriptor left: the same call may succeed later."""


class TransportError(DualPathError):
    """Bytes could not be moved to a peer."""


class PeerLost(TransportError):
    """The peer's process or its connection is gone."""


class TransferTimeout(TransportError):
    """A transfer made no progress for longer than its deadline."""


class IncompatiblePeer(TransportError):
    """The peer speaks another protocol version or serves another model or geometry."""


class ProtocolError(DualPathError):
    """A message that breaks the wire rules. It is rejected and counted, never acted on."""


class StagingFull(DualPathError):
    """No staging slots are free and the caller did not ask to wait."""


class SyncLoadFailed(DualPathError):
    """A forward pass reads KV that could not be loaded, and vLLM would use what it computes.

    The one error that may leave a hook: an engine that ends gives no wrong token.
    """


class LaunchError(DualPathError):
    """A process of a local cluster did not become ready, or ended before it was told to."""


class SimulationStalled(DualPathError):
    """Agents of a simulation are left that nothing will ever wake: no usable engine for them."""


class RequestError(DualPathError):
    """A server refused a request, or its answer is not what was asked for."""


class NativeUnavailable(DualPathError):
    """The compiled core, or a shared library that it needs, could not be loaded."""
