"""A client's body in fields: what is passed on is what came, what is read is what it says."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from vllm_dualpath.router.body import Body, TokenIds, parse_body
from vllm_dualpath.router.legs import forges_params, without_params


def test_what_nobody_looks_at_passes_byte_for_byte() -> None:
    """Numbers keep their digits and text its escapes; only what stands between fields is ours."""
    data = b'{ "prompt" : [1 , 2],"temperature":1.0e-1, "stop":"\\u00e9\\u2028", "n":null }'
    body = Body(data)
    assert body["prompt"] == [1, 2]
    assert (
        body.encode(body.fields())
        == b'{"prompt":[1 , 2],"temperature":1.0e-1,"stop":"\\u00e9\\u2028","n":null}'
    )
    assert (body["n"], body.get("n", 3), body.get("absent", 3)) == (None, None, 3)
    assert list(body) == ["prompt", "temperature", "stop", "n"]


@pytest.mark.parametrize(
    "data",
    [
        b'{"top":NaN,"prompt":[1,2],"x":"\\ud800"}',
        b'{"top":{"deep":[NaN]},"prompt":[1,2],"x":"\\ud83d"}',
        b'{"top":1e999,"prompt":[1,2],"x":-Infinity}',
    ],
)
def test_what_only_python_takes_is_passed_on_as_python_would(data: bytes) -> None:
    """No NaN becomes null and no half of a pair is lost, in any field."""
    body = Body(data)
    assert isinstance(body["prompt"], list)
    body["top"]
    ids = body.token_ids()
    assert ids.ids == [1, 2]
    sent = body.encode(body.fields() | {"prompt": ids.raw})
    assert json.dumps(json.loads(sent)) == json.dumps(json.loads(data))
    assert not math.isfinite(json.loads(b'{"x":1e999}')["x"])


def test_a_field_that_only_python_takes_does_not_break_a_leg() -> None:
    """A number beyond a float is found late, when the fields were taken as bytes already."""
    body = Body(b'{"prompt":[1,2],"tools":[1e400]}')
    fields = body.fields()
    assert body.get("tools") == [math.inf]
    assert json.loads(body.encode(fields)) == {"prompt": [1, 2], "tools": [math.inf]}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b'{"a":01}', b'{"a":"\xff"}', b"\xff"])
def test_what_is_no_json_object_is_none(data: bytes) -> None:
    """VLLM's to refuse."""
    assert parse_body(data) is None


@pytest.mark.parametrize("ids", [b"[]", b"[true]", b"[1.0]", b'["1"]', b"[null]", b"[[1]]", b"{}"])
def test_token_ids_are_integers_and_nothing_else(ids: bytes) -> None:
    """A truth value or a float is no token id, whatever Python makes of it."""
    assert TokenIds.decode(msgspec.Raw(ids)) is None
    found = TokenIds.decode(msgspec.Raw(b"[3, 4]"))
    assert found is not None
    assert (found.ids, len(found)) == ([3, 4], 2)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"kv_transfer_params":{"x":1}}',
        b'{"a":1,"kv_transfer_params":null,"kv_transfer_params":{"x":1}}',
        b'{"a":1,"\\u006bv_transfer_params":{"x":1}}',
        b'{"a":1,"vllm_xargs":{"kv_transfer_params":1}}',
        b'{"a":1,"sampling_params":{"extra_args":{"\\u006bv_transfer_params":1}}}',
        b'{"a":1,"vllm_xargs":{"\\u006bv_transfer_params":{"x":[NaN]}}}',
    ],
)
def test_forged_parameters_are_found_however_they_are_written(data: bytes) -> None:
    """As a field, twice, escaped, or in the dictionary that vLLM merges with it."""
    body = Body(data)
    assert forges_params(body)
    clean = json.loads(body.encode(without_params(body)))
    assert clean in (
        {"a": 1},
        {"a": 1, "vllm_xargs": {}},
        {"a": 1, "sampling_params": {"extra_args": {}}},
    )
