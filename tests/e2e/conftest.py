"""Servers that tests share: a start takes seconds, so that each is started once and left clean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench.servers import PlainServer
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model

from .deployment import Deployment
from .models import COMMON_ARGS, LLAMA, NO_PREFIX_CACHING, PREFIX_CACHING, QWEN3
from .reference import Reference


@pytest.fixture(scope="session")
def log_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def _model_dir(factory: pytest.TempPathFactory, model: TinyModel) -> Path:
    directory = factory.mktemp(model.arch)
    write_tiny_model(model, directory)
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model_dir(tmp_path_factory, LLAMA)


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model_dir(tmp_path_factory, QWEN3)


def _plain(model_dir: Path, log_root: Path) -> PlainServer:
    server = PlainServer(
        model_dir,
        engine_args=(*COMMON_ARGS, *NO_PREFIX_CACHING),
        log_dir=log_root / f"plain-{model_dir.name}",
    )
    server.launch()
    return server


@pytest.fixture(scope="session")
def llama_plain(llama_dir: Path, log_root: Path) -> Iterator[PlainServer]:
    """Launched, not waited for: it starts together with the cluster it is compared with."""
    server = _plain(llama_dir, log_root)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def qwen3_plain(qwen3_dir: Path, log_root: Path) -> Iterator[PlainServer]:
    server = _plain(qwen3_dir, log_root)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def llama_running(
    llama_plain: PlainServer,
    llama_dir: Path,
    log_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """Without vLLM's own prefix cache: every hit is ours."""
    store = tmp_path_factory.mktemp("llama-store")
    deployment = Deployment(
        LLAMA,
        llama_dir,
        store,
        log_root / "llama",
        engine_args=NO_PREFIX_CACHING,
        # A read of a FIFO, which stands for a store that hangs, hangs in a thread alone.
        extra_config={"store_io": "threads"},
    )
    with deployment:
        yield deployment


@pytest.fixture(scope="module")
def prefix_caching_running(
    llama_plain: PlainServer,
    llama_dir: Path,
    log_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """With vLLM's own prefix cache on both sides, which tests may reset."""
    store = tmp_path_factory.mktemp("prefix-caching-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        deployment = Deployment(
            LLAMA,
            llama_dir,
            store,
            log_root / "prefix-caching",
            engine_args=PREFIX_CACHING,
            router_args=("--read-past-nothing",),
        )
    with deployment:
        yield deployment


@pytest.fixture(scope="module")
def small_cache_running(
    qwen3_plain: PlainServer,
    qwen3_dir: Path,
    log_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """Qwen3, vLLM's default processes, and a KV cache that six requests do not fit into."""
    store = tmp_path_factory.mktemp("qwen3-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        deployment = Deployment(
            QWEN3,
            qwen3_dir,
            store,
            log_root / "qwen3",
            engine_args=(
                *NO_PREFIX_CACHING,
                *("--distributed-executor-backend", "mp"),
                *("--num-gpu-blocks-override", "40"),
                # Prompts are admitted before there is room for all of them, and advance together.
                "--no-scheduler-reserve-full-isl",
                *("--long-prefill-token-threshold", "64"),
            ),
        )
    with deployment:
        yield deployment


@pytest.fixture(scope="session")
def llama_reference(llama_plain: PlainServer) -> Reference:
    llama_plain.wait_ready()
    return Reference(llama_plain.url)


@pytest.fixture(scope="session")
def qwen3_reference(qwen3_plain: PlainServer) -> Reference:
    qwen3_plain.wait_ready()
    return Reference(qwen3_plain.url)


@pytest.fixture
def llama(llama_running: Deployment) -> Iterator[Deployment]:
    yield llama_running
    llama_running.expect_clean()


@pytest.fixture
def prefix_caching(prefix_caching_running: Deployment) -> Iterator[Deployment]:
    yield prefix_caching_running
    prefix_caching_running.expect_clean()


@pytest.fixture
def small_cache(small_cache_running: Deployment) -> Iterator[Deployment]:
    yield small_cache_running
    small_cache_running.expect_clean()
