"""Where a process of a cluster runs, and how the others reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_dualpath.bench.vllm_command import HOST


@dataclass(frozen=True, slots=True)
class Place:
    """A host, or what stands for one on this machine."""

    host: str = HOST
    """The address that HTTP and control listen on."""
    prefix: tuple[str, ...] = ()
    """What its commands begin with to run there."""
    extra_config: Mapping[str, object] = field(default_factory=dict)
    """What an engine there has in its ``kv_connector_extra_config`` besides."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What an engine there has in its environment besides."""


LOOPBACK = Place()
