"""Which way of copying is used, and that none is used unseen."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_dualpath.connector.copies import HostCopies
from vllm_dualpath.connector.copy_self_test import self_test
from vllm_dualpath.connector.cuda_copies import DriverCopies, choose_engine
from vllm_dualpath.errors import ConfigError, TransferTimeout, TransportError

CPU = torch.device("cpu")


class Forgetful(HostCopies):
    """Never copies the second layer."""

    def submit_background(self, rows, _first_layer, _end_layer, after, *, load):
        return super().submit_background(rows, 0, 1, after, load=load)


class Lazy(HostCopies):
    """Says that it saved, and did not."""

    def submit(self, *_args, **_options):
        return None


class Hanging(HostCopies):
    """Never comes to an end."""

    def wait(self, _mark):
        threading.Event().wait()


def broken(_device):
    raise RuntimeError("no such driver")


def test_the_host_engine_passes():
    """A right engine is not refused, and nothing of the test is left over."""
    engine = HostCopies()
    self_test(engine, CPU)
    self_test(engine, CPU)
    engine.close()


@pytest.mark.parametrize("engine", [Forgetful, Lazy])
def test_wrong_bytes_are_noticed(engine):
    """An engine that leaves out a layer, or the save before a load, does not pass."""
    made = engine()
    with pytest.raises(TransportError, match="wrong bytes in layer"):
        self_test(made, CPU)
    made.close()


def test_an_engine_that_hangs_is_refused(monkeypatch):
    """The start of a server does not wait for it."""
    monkeypatch.setattr("vllm_dualpath.connector.copy_self_test._DEADLINE_S", 0.05)
    with pytest.raises(TransferTimeout, match="did not end"):
        self_test(Hanging(), CPU)


def test_the_first_way_that_passes_is_used(monkeypatch):
    """What cannot be made or copies wrongly is passed over, with a warning that says why."""
    warnings: list[str] = []
    monkeypatch.setattr(
        "vllm_dualpath.connector.cuda_copies.logger.warning",
        lambda text, *args: warnings.append(text % args),
    )
    ways = {"one": broken, "two": lambda _: Forgetful(), "three": lambda _: HostCopies()}
    engine = choose_engine(CPU, ways)
    assert type(engine) is HostCopies
    engine.close()
    assert "by one cannot be used: no such driver" in warnings[0]
    assert "wrong bytes in layer 1" in warnings[1] and len(warnings) == 2


def test_no_way_at_all_is_an_error_that_names_all():
    """Start is refused with every reason."""
    with pytest.raises(ConfigError, match=r"one: no such driver; two: .*wrong bytes"):
        choose_engine(CPU, {"one": broken, "two": lambda _: Forgetful()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has an NVIDIA driver")
def test_without_a_driver_it_says_so():
    """The driver's library is looked for at run time only."""
    with pytest.raises(RuntimeError, match="libcuda"):
        DriverCopies(torch.device("cuda", 0), "batch")
