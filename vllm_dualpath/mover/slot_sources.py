"""Where a reader's blocks go: slots that its transfer holds anyway, or a window of donor slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_dualpath.mover.staging import SlotPool


class SlotSource(Protocol):
    """Gives a reader one slot a block. Owned by the loop's thread."""

    def try_take(self, block: int) -> int | None:
        """The slot for ``block``, or ``None`` while there is none."""

    def wait(self, granted: Callable[[int], None]) -> Callable[[], None]:
        """After ``None``: call ``granted`` with a slot once there is one; return what withdraws."""

    def give_back(self, slot: int) -> None:
        """The block in ``slot`` was pushed to everybody, or will not be."""


class OwnSlots:
    """One slot a block of the prompt, for as long as the transfer lasts."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = slots

    def try_take(self, block: int) -> int | None:
        return self._slots[block]

    def wait(self, granted: Callable[[int], None]) -> Callable[[], None]:  # noqa: ARG002
        raise AssertionError("own slots are always there")

    def give_back(self, slot: int) -> None:
        """The transfer keeps it."""


class DonorWindow:
    """Slots of the donor pool, each held while one block is read and pushed.

    Readers of several transfers take turns: each waits for one slot at a time. A slot waits for
    nothing but its read and its pushes, so donors cannot take part in a deadlock.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool

    def try_take(self, block: int) -> int | None:  # noqa: ARG002 # any slot will do
        slots = self._pool.try_take(1)
        return None if slots is None else slots[0]

    def wait(self, granted: Callable[[int], None]) -> Callable[[], None]:
        return self._pool.reserve(1, lambda slots: granted(slots[0]))

    def give_back(self, slot: int) -> None:
        self._pool.release((slot,))
