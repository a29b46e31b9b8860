from __future__ import annotations

import logging
import os

import pytest

from tests.transport.contract import Pair, ProcessContract, RemoteContract
from vllm_dualpath import native
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.transport import make_transport

NO_SHARED_MEMORY = {"UCX_TLS": "tcp,self"}


class TestSameHost(ProcessContract):
    """Stores into the peer's memory."""

    kind = "auto"


class TestOtherHost(RemoteContract):
    """Our TCP where there is no RDMA."""

    kind = "auto"

    def test_tcp_is_a_warning(self, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
        """It says what is slow and what to install."""
        address, descriptor, _ = pair.hello
        with caplog.at_level(logging.WARNING):
            pair.transport.connect(address, descriptor, same_host=False)
        assert "no RDMA to a peer" in caplog.text
        assert "DUALPATH_UCX_LIBRARY" in caplog.text


class TestNoSharedMemory(ProcessContract):
    """Two processes of one host that are forbidden to share memory use TCP."""

    kind = "auto"
    environment = NO_SHARED_MEMORY

    def test_tcp_on_one_host_is_a_warning(
        self, pair: Pair, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It says that this host could do better."""
        address, descriptor, _ = pair.hello
        with caplog.at_level(logging.WARNING):
            pair.transport.connect(address, descriptor, same_host=True)
        assert "no shared memory with a peer on this host" in caplog.text


def test_require_rdma_refuses_to_start_without_it() -> None:
    """The refusal names the library, what it offers, and what to install."""
    if native.ucx_report().has_rdma:
        pytest.skip("this host has RDMA")
    with pytest.raises(ConfigError, match=r"require_rdma: UCX .* no RDMA transport"):
        make_transport("auto", require_rdma=True)


def test_lanes_reach_ucx_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service level and a traffic class win over what UCX would take; nothing minds them."""
    monkeypatch.setenv("UCX_IB_SL", "7")
    monkeypatch.setenv("UCX_IB_TRAFFIC_CLASS", "0")
    make_transport("auto", service_level=1, traffic_class=0x20).close()
    assert os.environ["UCX_IB_SL"] == "1"
    assert os.environ["UCX_IB_TRAFFIC_CLASS"] == "32"
