"""Copies that cannot be made: right tokens all the same, an end for every request, nothing kept."""

from __future__ import annotations

import pytest

from tests.connector.engine import Engine, key_of, use_copies
from vllm_dualpath.connector.copies import HostCopies
from vllm_dualpath.errors import SyncLoadFailed
from vllm_dualpath.messages import ReturnPersistSlots

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


class FailingCopies(HostCopies):
    """Fails where it is told to, as an engine does whose device refuses; copies nothing then."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self.num_failed = 0

    def _fail_at(self, where: str) -> None:
        if self._where == where:
            self.num_failed += 1
            raise RuntimeError(f"the device refuses: {where}")

    def rows(self, mapping, copies):
        self._fail_at("rows")
        return super().rows(mapping, copies)

    def now(self):
        self._fail_at("now")
        return super().now()

    def submit(self, *arguments, **options):
        self._fail_at("submit")
        return super().submit(*arguments, **options)

    def submit_layers(self, rows, *, load):
        self._fail_at("submit_layers")
        if self._where == "hold_forward":
            return [1] * rows.num_layers
        return super().submit_layers(rows, load=load)

    def submit_background(self, *arguments, **options):
        self._fail_at("submit_background")
        return super().submit_background(*arguments, **options)

    def hold_forward(self, mark):
        if mark is not None:
            self._fail_at("hold_forward")
        return super().hold_forward(mark)

    def wait(self, mark):
        if mark is not None:
            self._fail_at("wait")
        super().wait(mark)

    def wait_reports(self, seen):
        count, error = super().wait_reports(seen)
        failed = self._where == "wait_reports" and count > seen
        self.num_failed += failed
        return count, "the device refuses" if failed else error


@pytest.fixture
def failing(engine):
    """An engine whose worker's copies fail at one point, and those copies."""

    def make(role: str, where: str, **options: object) -> tuple[Engine, FailingCopies]:
        e = engine(role, **options)
        copies = FailingCopies(where)
        use_copies(e, copies)
        return e, copies

    return make


def check_answered(e: Engine, copies: FailingCopies, num_tokens: int) -> None:
    """A copy failed, the tokens are right, the request ended, the staging memory is unused."""
    assert copies.num_failed
    e.check_output("r", num_tokens)
    e.check_ended()
    staging = e.worker._worker.side._mover._staging
    e.wait(lambda: staging._num_users == 0)


@pytest.mark.parametrize("where", ["rows", "submit_layers", "hold_forward"])
def test_failed_synchronous_load_is_recomputed(failing, where):
    """Pages that were not filled are not read as if they were, nor those computed from them."""
    e, copies = failing("prefill", where)
    e.stage(PROMPT, SLOTS, 32)
    params = e.mover.publish(e.root, PROMPT, 4, SLOTS)
    e.add("r", PROMPT, 1, params)
    e.run(8000)
    check_answered(e, copies, 1)
    assert not e.mover.saved_pages(key_of(params)), "the decode side would commit them"


@pytest.mark.parametrize("where", ["rows", "submit_layers", "hold_forward"])
def test_failed_synchronous_load_ends_an_engine_that_would_use_it(failing, where):
    """With asynchronous scheduling vLLM accepts a token that was computed from invalid blocks."""
    e, _ = failing("prefill", where, is_async=True)
    e.stage(PROMPT, SLOTS, 32)
    e.add("r", PROMPT, 4, e.mover.publish(e.root, PROMPT, 4, SLOTS))
    with pytest.raises(SyncLoadFailed, match="no-async-scheduling"):
        e.run(8000)
    assert not e.outputs["r"]
    e.close()  # waits for whoever uses the staging memory


@pytest.mark.parametrize("where", ["rows", "now", "submit_background", "wait"])
def test_failed_asynchronous_load_is_recomputed(failing, where):
    """A request that waits for its load goes on without it."""
    e, copies = failing("decode", where)
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.add("r", PROMPT, 6, e.mover.publish(e.root, PROMPT, 6, SLOTS))
    e.run(8000)
    check_answered(e, copies, 6)


@pytest.mark.parametrize("where", ["rows", "submit", "wait_reports"])
def test_failed_save_ends_with_its_request(failing, where):
    """The prefill leg answers; nobody is told of pages that were not copied."""
    e, copies = failing("prefill", where)
    params = e.mover.publish(e.root, PROMPT, 0, SLOTS)
    e.add("r", PROMPT, 1, params)
    e.run(8000)
    assert not e.mover.saved_pages(key_of(params))
    check_answered(e, copies, 1)


@pytest.mark.parametrize("where", ["rows", "submit", "wait_reports"])
def test_slots_of_blocks_that_were_not_stored_go_back(failing, where):
    """The mover gets back every persist slot that no block was copied to."""
    e, copies = failing("decode", where)
    e.add("r", PROMPT, 8)
    e.run(8000)
    assert e.mover.wait_for(ReturnPersistSlots)
    check_answered(e, copies, 8)
