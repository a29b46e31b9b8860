"""Start: what is registered, what is refused, and what identifies a model."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec

from tests.connector.engine import make_cache_config, make_vllm_config, write_model
from vllm_dualpath.connector import plugin, weights
from vllm_dualpath.connector.facade import DualPathConnector
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.unsupported import check_supported
from vllm_dualpath.errors import ConfigError

ROUTED = {"role": "prefill", "router": "tcp://127.0.0.1:9100", "url": "http://127.0.0.1:1"}


@pytest.fixture
def make_config(tmp_path: Path):
    """Makes a vLLM config from connector settings."""
    model = write_model(tmp_path / "model")
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)

    def make(**extra):
        return make_vllm_config(model, runtime, {"role": "both", **extra})

    return make


def setup(config) -> EngineSetup:
    return EngineSetup.make(config, make_cache_config(32))


# --- plugin
# ----------------------------------------------------------------------------------------


def test_registers_once_and_again(monkeypatch):
    """The entry point may run many times; vLLM then knows the connector by its name."""
    monkeypatch.setattr("sys.argv", ["pytest"])
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name("DualPathConnector") is DualPathConnector


@pytest.mark.parametrize(
    ("found", "accepted"),
    [("0.32.0", True), ("0.33.1rc1", True), ("0.31.9", False), ("0.34.0", False), ("dev", False)],
)
def test_version_range(monkeypatch, found, accepted):
    """Other versions of vLLM are refused with both versions in the message."""
    monkeypatch.setattr(plugin, "_installed_version", lambda: found)
    if accepted:
        assert plugin.check_vllm_version() == found
    else:
        with pytest.raises(ConfigError, match=rf"expected version >=0\.32,<0\.34, found {found}"):
            plugin.check_vllm_version()


def test_unsupported_vllm_is_logged_not_raised(monkeypatch, caplog):
    """A server that does not use the connector must not fail because of it."""
    monkeypatch.setattr(plugin, "_installed_version", lambda: "0.1.0")
    monkeypatch.setattr("sys.argv", ["pytest"])
    plugin.register()
    assert "is not registered: vLLM: expected version" in caplog.text


@pytest.mark.parametrize(
    ("argv", "url"),
    [
        (["/bin/vllm", "serve", "m"], "http://127.0.0.1:8000"),
        (["vllm", "serve", "m", "--port", "8101", "--host", "0.0.0.0"], "http://127.0.0.1:8101"),
        (["vllm", "serve", "m", "--host=10.0.0.2", "--port=81"], "http://10.0.0.2:81"),
        (["x/openai/api_server.py", "--port", "9"], "http://127.0.0.1:9"),
        (["pytest", "--port", "9"], None),
        (["vllm", "bench"], None),
        ([], None),
    ],
)
def test_engine_url_from_the_command_line(monkeypatch, argv, url):
    """The API server's address is noted for the processes it starts; other programs note
    nothing.
    """
    monkeypatch.delenv(plugin.URL_VARIABLE, raising=False)
    plugin.note_engine_url(argv)
    import os

    assert os.environ.pop(plugin.URL_VARIABLE, None) == url


# --- configuration
# -----------------------------------------------------------------------------------


def test_both_sides_agree(make_config):
    """Scheduler and worker process work out the same identity, and the same socket."""
    config = make_config()
    assert setup(config) == setup(copy.deepcopy(config))


def test_url_comes_from_config_then_environment(make_config, monkeypatch):
    """With a router an address is needed; the config wins over what was noted."""
    monkeypatch.setenv(plugin.URL_VARIABLE, "http://noted:1")
    assert setup(make_config(**ROUTED)).url == "http://127.0.0.1:1"
    settings = {k: v for k, v in ROUTED.items() if k != "url"}
    assert setup(make_config(**settings)).url == "http://noted:1"
    monkeypatch.delenv(plugin.URL_VARIABLE)
    with pytest.raises(ConfigError, match=r"url: expected this server's address"):
        setup(make_config(**settings))


def test_too_small_staging_names_what_it_needs(make_config):
    """256 tokens are 32 blocks, and 4 persist slots: 36 slots of a page each."""
    with pytest.raises(ConfigError, match=r"need 36 slots of 4096 bytes; expected at least 147456"):
        setup(make_config(staging_bytes=35 * 4096))
    setup(make_config(staging_bytes=36 * 4096))


def test_block_tokens_must_fit_pages(make_config):
    """A Full Block is whole pages."""
    with pytest.raises(ConfigError, match=r"multiple of vLLM's block size 4, found 10"):
        setup(make_config(block_tokens=10))
    assert (
        setup(make_config(block_tokens=None, staging_bytes=1 << 20)).identity.geometry.block_tokens
        == 64
    )


def test_unknown_key_is_named(make_config):
    """A typo in the extra config is an error at start."""
    with pytest.raises(ConfigError, match="stagin_bytes"):
        setup(make_config(stagin_bytes=1))


def test_errors_leave_the_constructor(make_config):
    """VLLM shows the user what the constructor raises, on either side."""
    config = make_config(block_tokens=10)
    for role in KVConnectorRole:
        with pytest.raises(ConfigError):
            DualPathConnector(config, role, make_cache_config(32))


def test_only_prefill_needs_piecewise_graphs():
    """The layer hooks cost the others their full graphs for nothing."""
    needs = DualPathConnector.requires_piecewise_for_cudagraph
    assert [needs({"role": role}) for role in ("prefill", "decode", "both")] == [True, False, False]


# --- what is not covered
# -------------------------------------------------------------------------------


def _set(path: str, value: object):
    def change(config) -> None:
        *parents, name = path.split(".")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        object.__setattr__(target, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_set("kv_transfer_config.kv_load_failure_policy", "fail"), "kv_load_failure_policy"),
        (_set("kv_transfer_config.kv_role", "kv_producer"), "kv_role"),
        (_set("parallel_config.tensor_parallel_size", 2), "tensor parallelism"),
        (_set("parallel_config.pipeline_parallel_size", 2), "pipeline parallelism"),
        (_set("parallel_config.data_parallel_size", 2), "data parallelism"),
        (_set("parallel_config.decode_context_parallel_size", 2), "context parallelism"),
        (_set("speculative_config", type("S", (), {"method": "ngram"})()), "speculative decoding"),
        (_set("lora_config", object()), "LoRA"),
        (_set("model_config.multimodal_config", object()), "multimodal"),
        (_set("model_config.is_encoder_decoder", True), "encoder-decoder"),
        (_set("model_config.is_diffusion", True), "token by token"),
        (_set("model_config.runner_type", "pooling"), "token by token"),
        (_set("model_config.hf_text_config.index_topk", 8), "indexer"),
        (_set("cache_config.kv_sharing_fast_prefill", True), "fast prefill"),
    ],
)
def test_refused_by_name(make_config, change, name):
    """Each kind of engine that is not covered is refused with what, where, expected, found."""
    config = make_config()
    check_supported(config, make_cache_config(32))
    change(config)
    with pytest.raises(ConfigError, match=name) as caught:
        check_supported(config, make_cache_config(32))
    assert "1 problem(s)" in str(caught.value)


def test_failure_policy_of_a_multi_connector(make_config):
    """VLLM goes by what stands around several connectors, so that is looked at as well."""
    around = make_config()
    object.__setattr__(around.kv_transfer_config, "kv_load_failure_policy", "fail")
    with (
        set_current_vllm_config(around),
        pytest.raises(ConfigError, match=r"kv_load_failure_policy.*found 'fail'"),
    ):
        check_supported(make_config(), make_cache_config(32))


def test_several_groups_and_other_attention_are_refused(make_config):
    """Two groups and a sliding window are two problems in one message."""
    cache = make_cache_config(32)
    window = SlidingWindowSpec(
        block_size=4, num_kv_heads=2, head_size=4, dtype=torch.float32, sliding_window=8
    )
    cache.kv_cache_groups.append(KVCacheGroupSpec(["other"], window))
    with pytest.raises(ConfigError, match=r"(?s)2 problem.*several KV cache.*SlidingWindowSpec"):
        check_supported(make_config(), cache)


# --- identity
# ------------------------------------------------------------------------------------------


def test_random_weights_need_a_name(make_config):
    """--load-format dummy without model_id would mix the KV of different random models."""
    with pytest.raises(ConfigError, match="model_id"):
        setup(make_config(model_id=None))


def _real(config, tmp_path: Path):
    config.load_config.load_format = "auto"
    (tmp_path / "model" / "a.safetensors").write_bytes(b"weights")
    return config


def test_weights_and_config_make_the_fingerprint(make_config, tmp_path):
    """Another byte in the weights, dtype, KV dtype, layout or block size is another model."""
    config = _real(make_config(model_id=None), tmp_path)
    seen = {setup(config).identity.fingerprint}
    same = setup(copy.deepcopy(config)).identity.fingerprint
    assert same in seen

    def differs(changed, cache=None) -> None:
        print_ = EngineSetup.make(changed, cache or make_cache_config(32)).identity.fingerprint
        assert print_ not in seen
        seen.add(print_)

    other = copy.deepcopy(config)
    other.cache_config.cache_dtype = "fp8"
    differs(other)
    other = copy.deepcopy(config)
    other.model_config.hf_config.rope_theta = 5
    differs(other)
    differs(config, dataclasses.replace(make_cache_config(32), kv_cache_layout="LBNHC"))
    other = copy.deepcopy(config)
    other.kv_transfer_config.kv_connector_extra_config["block_tokens"] = 4
    other.kv_transfer_config.kv_connector_extra_config["staging_bytes"] = 1 << 20
    differs(other)
    (tmp_path / "model" / "a.safetensors").write_bytes(b"weightz")
    differs(config)


def test_files_are_hashed_once(make_config, tmp_path, monkeypatch):
    """The digest of a file that did not change is remembered; a damaged memory is rebuilt."""
    config = _real(make_config(model_id=None), tmp_path)
    first = setup(config).identity
    monkeypatch.setattr(weights, "_hash_file", lambda path: pytest.fail(f"hashed {path} again"))
    assert setup(config).identity == first
    (cache,) = (tmp_path / "run").glob("digests.json")
    assert list(json.loads(cache.read_text()).values())
    cache.write_text("{")
    monkeypatch.undo()
    assert setup(config).identity == first


def test_blob_names_of_the_hugging_face_cache_are_digests(make_config, tmp_path, monkeypatch):
    """A link to a file named by its SHA-256 is not read."""
    config = make_config(model_id=None)
    config.load_config.load_format = "auto"
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"x")
    (tmp_path / "model" / "a.safetensors").symlink_to(blob)
    monkeypatch.setattr(weights, "_hash_file", lambda path: pytest.fail(f"hashed {path}"))
    setup(config)


def test_a_model_without_weight_files_needs_a_name(make_config):
    """No files, no identity."""
    config = make_config(model_id=None)
    config.load_config.load_format = "auto"
    with pytest.raises(ConfigError, match=r"found none; set kv_connector_extra_config\.model_id"):
        setup(config)
