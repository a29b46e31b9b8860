"""The router's benchmark: it measures what it says, and says what it could not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.bench.router.prompts import STORED, request_bytes, token_ids, tokenized
from vllm_dualpath.bench.router.report import make_record, result_table, within_goal
from vllm_dualpath.bench.router.run import OURS, OURS_HITS, THEIRS, Plan, measure
from vllm_dualpath.bench.router.wire import MessageReader, status_of

pytestmark = pytest.mark.timeout(120)


def test_every_request_is_transferred_and_what_is_missing_is_said(tmp_path: Path) -> None:
    """Without vllm-router the rest is measured; hits are hits, and nothing went another way."""
    plan = Plan(
        1,
        0.05,
        transfer_all=True,
        theirs_path=tmp_path,
        num_tokens=(100, 8000),
        connections=(2,),
    )
    record = make_record(measure(plan))
    assert "pip install" in record["missing"][THEIRS]
    assert within_goal(record)
    assert [name for name, number in record["outcomes"].items() if number] == ["transferred"]
    assert len(record["cells"]) == 6
    for cell in record["cells"]:
        assert cell["variants"].keys() == {OURS, OURS_HITS}
        assert all(each["cpu_ms"] > 0 for each in cell["variants"].values())
        assert cell["ratios"] == {}
    assert result_table(record).row_count == 6
    assert record["hit_tokens"] > 0


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_text_becomes_the_ids_of_its_number(kind: str) -> None:
    """The ids behind a text are those that a prompt of ids has under the same number."""
    for num_tokens in (100, 8000):
        whole = request_bytes(kind, num_tokens).numbered(STORED + 7)  # type: ignore[arg-type]
        ids = tokenized(whole.split(b"\r\n\r\n", 1)[1])
        assert ids.startswith(b'{"tokens":[%d,' % (STORED + 7))
        assert ids.count(b",") >= num_tokens
        assert token_ids(STORED + 7, num_tokens)[0] == STORED + 7


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"3\r\nabc\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 204 None\r\n\r\n", b""),
    ],
)
def test_messages_are_read_at_every_split(message: bytes, body: bytes) -> None:
    """However the bytes arrive, the message is whole once, and the next one too."""
    reader = MessageReader()
    for split in range(1, len(message)):
        assert reader.feed(message[:split]) is None
        whole = reader.feed(message[split:])
        assert whole is not None
        assert (status_of(whole[0]) // 100, whole[1]) == (2, body)


def test_what_is_no_answer_is_refused() -> None:
    """A second message where one is under way, or no HTTP at all, ends the connection."""
    with pytest.raises(ValueError, match="after the end"):
        MessageReader().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab")
    with pytest.raises(ValueError, match="expected an answer"):
        status_of(b"SSH-2.0\r\n")
