"""What an engine has counted: vLLM's own metrics, and its mover's statistics."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_LABELS = ("source", "state", "reason")
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"


@dataclass(frozen=True)
class Counters:
    """Cumulative; two readings are subtracted to see what happened between them."""

    computed: int
    """Prompt tokens that vLLM computed."""
    local: int
    """Prompt tokens found in vLLM's own prefix cache."""
    external: int
    """Prompt tokens that the connector loaded."""
    external_hits: int
    """The same from vLLM's prefix cache statistics of connectors."""
    preemptions: int
    blocks_read: float
    corrupt: int
    stored: int

    def __sub__(self, earlier: Counters) -> Counters:
        names = self.__dataclass_fields__
        return Counters(**{n: getattr(self, n) - getattr(earlier, n) for n in names})

    @property
    def prompt(self) -> tuple[int, int, int]:
        """Computed, local, external."""
        return self.computed, self.local, self.external


@dataclass(frozen=True)
class Samples:
    """One scrape of ``/metrics``."""

    values: Mapping[tuple[str, str], float]
    """By sample name and the label of ours that tells samples apart, if there is one."""

    def value(self, name: str, label: str = "") -> int | float:
        """Raises ``KeyError`` when the engine does not export it."""
        value = self.values[name, label]
        return int(value) if value.is_integer() else value


def scrape(url: str) -> Samples:
    """Read ``/metrics`` of one engine."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next((sample.labels[each] for each in _LABELS if each in sample.labels), "")
            values[sample.name, label] = sample.value
    return Samples(values)


def counters_of(samples: Samples, stats: Mapping[str, Any], block_file_bytes: int) -> Counters:
    """Put both together; ``stats`` is the mover's, as the router shows it."""
    return Counters(
        computed=int(samples.value(_BY_SOURCE, "local_compute")),
        local=int(samples.value(_BY_SOURCE, "local_cache_hit")),
        external=int(samples.value(_BY_SOURCE, "external_kv_transfer")),
        external_hits=int(samples.value("vllm:external_prefix_cache_hits_total")),
        preemptions=int(samples.value("vllm:num_preemptions_total")),
        blocks_read=stats["storage_read_bytes"] / block_file_bytes,
        corrupt=stats["corrupt_blocks"],
        stored=stats["blocks_stored"],
    )
