from __future__ import annotations

from typing import Any

import pytest

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import (
    divide_staging,
    is_loopback,
    parse_engine_config,
    parse_router_config,
)
from vllm_dualpath.errors import ConfigError

ENGINE: dict[str, Any] = {
    "role": "prefill",
    "store": "file:///mnt/kv",
    "router": "tcp://127.0.0.1:9100",
}


def test_the_shortest_engine_config_is_enough() -> None:
    config = parse_engine_config(ENGINE)
    assert (config.role, config.store, config.router) == tuple(ENGINE.values())
    assert config.verify_checksums
    assert config.deadlines.stage_s > 0


def test_without_a_router_the_role_is_both() -> None:
    assert parse_engine_config({"role": "both", "store": "file:///kv"}).router is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"role": "producer"}, r"role: .*found 'producer'"),
        ({"role": "both"}, "role 'both' works without a router"),
        ({"router": None}, "role 'prefill' needs the key router"),
        ({"store": "/mnt/kv"}, r"expected file:///absolute/path, found '/mnt/kv'"),
        ({"store": "file://host/kv"}, "expected file:///absolute/path"),
        ({"store": "redis://host"}, "expected file:///absolute/path"),
        ({"router": "127.0.0.1:9100"}, "expected tcp://host:port"),
        ({"router": "tcp://127.0.0.1"}, "expected tcp://host:port"),
        ({"router": "tcp://10.0.0.1:9100"}, "not loopback"),
        ({"listen": "0.0.0.0"}, "not loopback"),
        ({"staging_bytes": 0}, "staging_bytes"),
        ({"store_threads": 65}, "store_threads"),
        ({"deadlines": {"stage_s": 0}}, r"deadlines\.stage_s"),
        ({"deadlines": {"stage": 1}}, r"deadlines\.stage:"),
        ({"sotre": "x"}, "sotre.*(?s:.)*known keys:.*store"),
    ],
)
def test_a_bad_key_is_named_with_what_was_found(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_engine_config({**ENGINE, **change})


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match="3 problem") as raised:
        parse_engine_config({"role": "x", "store": "y", "unknown": "z" * 500})
    assert all(key in str(raised.value) for key in ("role", "store", "unknown"))
    assert "z" * 100 not in str(raised.value)


@pytest.mark.parametrize("permission", [{"keys": "/etc/keys"}, {"insecure": True}])
def test_off_loopback_keys_or_an_explicit_insecure_will_do(permission: dict[str, Any]) -> None:
    parse_engine_config({**ENGINE, "router": "tcp://10.0.0.1:9100", **permission})
    parse_router_config({"control": "tcp://0.0.0.0:9100", **permission})


def test_a_config_does_not_change() -> None:
    config = parse_engine_config(ENGINE)
    with pytest.raises(ValueError, match="frozen"):
        config.role = "decode"  # type: ignore[misc]


_SMALL = Geometry(64, 32, (1024,), "LBHNC", 1, "uint8")


@pytest.mark.parametrize(
    ("values", "num_slots", "expected"),
    [
        ({"role": "prefill"}, 400, (384, 16, 0)),
        ({"role": "prefill"}, 26, (24, 2, 0)),
        ({"role": "prefill"}, 10, (10, 0, 0)),
        ({"role": "prefill", "donor_slots": 0}, 400, (400, 0, 0)),
        ({"role": "decode"}, 400, (320, 16, 64)),
        ({"role": "decode", "donor_slots": 3, "persist_slots": 2}, 15, (10, 3, 2)),
        ({"role": "both", "router": None}, 400, (200, 0, 200)),
    ],
)
def test_how_staging_is_divided(
    values: dict[str, Any], num_slots: int, expected: tuple[int, int, int]
) -> None:
    """Donors get a few of what the longest prompt leaves, unless told otherwise."""
    staging_bytes = num_slots * _SMALL.slot_bytes
    config = parse_engine_config({**ENGINE, **values, "staging_bytes": staging_bytes})
    division = divide_staging(config, _SMALL, 640)
    found = (division.num_prompt_slots, division.num_donor_slots, division.num_persist_slots)
    assert found == expected


def test_donor_slots_that_do_not_fit_are_refused() -> None:
    """Also donors must leave room for the longest prompt."""
    values = {**ENGINE, "staging_bytes": 12 * _SMALL.slot_bytes, "donor_slots": 3}
    with pytest.raises(ConfigError, match="3 donor slots need 13 slots"):
        divide_staging(parse_engine_config(values), _SMALL, 640)


def test_the_routers_defaults_are_loopback_and_dual() -> None:
    config = parse_router_config({})
    assert (config.control, config.mode) == ("tcp://127.0.0.1:9100", "dual")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"mode": "fastest"}, "mode"),
        ({"max_readers": 17}, "max_readers"),
        ({"split_fraction": 1.5}, "split_fraction"),
        ({"control": "tcp://0.0.0.0:9100"}, "not loopback"),
        ({"control": "ipc:///x"}, "expected tcp://host:port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
    ],
)
def test_a_bad_router_flag_is_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_router_config(values)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "host",
    [
        "127.evil.example",
        "localhost.example",
    ],
)
def test_a_name_that_only_looks_like_loopback_is_not(host: str) -> None:
    assert not is_loopback(host)
