"""Scrapes of ``/metrics``, read by Prometheus's own parser, and counters that saw everything happen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_vlora.errors import CheckpointError, MemoryBudgetError
from vllm_vlora.plugin.counters import CATALOGUE, DEVICE, DISK, HOST, REMOTE, ServingCounters

STATE = "0123456789abcdef" * 4

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """A text in Prometheus's format; a family that comes twice, or a series, is an error."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        families = list(text_string_to_metric_families(text))
        self.families = {family.name for family in families}
        assert len(self.families) == len(families), "a family comes twice"
        self._samples: dict[str, dict[Labels, float]] = {}
        for family in families:
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                series = self._samples.setdefault(sample.name, {})
                assert labels not in series, (sample.name, labels)
                series[labels] = sample.value

    @property
    def names(self) -> set[str]:
        """Names of samples, as queries have them."""
        return set(self._samples)

    def samples(self, name: str) -> dict[Labels, float]:
        """Series of a name, by their labels in order of name."""
        return self._samples.get(name, {})

    def labels(self, name: str) -> set[str]:
        """Names of the labels that a sample's series have."""
        return {label for series in self.samples(name) for label, _ in series}

    def value(self, name: str, **labels: str) -> float:
        """The one series of a name that has these labels among its own."""
        wanted = labels.items()
        found = [
            value for series, value in self.samples(name).items() if wanted <= dict(series).items()
        ]
        assert len(found) == 1, (name, labels, self.samples(name))
        return found[0]

    def numbers(self) -> Iterator[float]:
        for series in self._samples.values():
            yield from series.values()


def scrape_of(*collectors: Any) -> Scrape:
    """What a registry with these collectors alone shows."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return Scrape(generate_latest(registry).decode())


def busy_counters() -> ServingCounters:
    """Counters that have seen one of everything; the numbers are in the tests that use them."""
    counters = ServingCounters(tasks=10, listed=10)
    for _ in range(3):
        counters.requested("sql", DEVICE)
    counters.requested('odd "name"\\é', DISK)
    counters.loaded(DISK, 0.05, 20)
    counters.loaded(DISK, 0.3, 20)
    counters.loaded(HOST, 0.002, 20)
    counters.requested("far", REMOTE)
    counters.loaded(REMOTE, 1.5, 30)
    counters.evicted()
    counters.refused(MemoryBudgetError("no room"))
    counters.adopted(STATE)
    counters.state_refused(CheckpointError("torn"))
    counters.set_tier(DEVICE, 2, ["sql", 'odd "name"\\é'], pinned={"sql"}, nbytes=40, budget=100)
    counters.set_tier(HOST, 1, ["french"], nbytes=20)
    counters.set_tier(CATALOGUE, 100)
    counters.set_waiting(3)
    counters.set_direct(2, 1)
    return counters
