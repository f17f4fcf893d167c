"""Compression streams: reads of an adapter, and what is held of it, do not grow with their number."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_vlora.adapters.peft_folder import Adapter, Factors, open_adapter, write_adapter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.planning import survey

SHAPES = {"l.0.q_proj": (96, 80), "l.0.v_proj": (96, 40)}
RANK = 4


class Watch:
    """What was read: times by (adapter, module), and the most factors that were alive at once."""

    def __init__(self) -> None:
        self.reads = Counter[tuple[str, str]]()
        self.alive = self.most = 0

    def note(self, adapter: str, module: str, found: Factors) -> None:
        self.reads[adapter, module] += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(found[0], self._gone)

    def _gone(self) -> None:
        self.alive -= 1


WATCHES: list[Watch] = []


@dataclass(frozen=True)
class WatchedAdapter(Adapter):
    """Reports its reads to the last of ``WATCHES``."""

    def factors(self, name: str) -> Factors:
        found = super().factors(name)
        WATCHES[-1].note(self.name, name, found)
        return found

    def iter_factors(self, names: Any = None) -> Any:
        for name, found in super().iter_factors(names):
            WATCHES[-1].note(self.name, name, found)
            yield name, found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Related ones, in float32, so that what is held of them is the tensors as read."""
    folder, generator = tmp_path_factory.mktemp("adapters"), torch.Generator().manual_seed(0)
    parents = {
        name: (
            torch.randn(6, d_in, generator=generator),
            torch.randn(d_out, 6, generator=generator),
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    found: dict[str, Adapter] = {}
    for task in range(48):
        factors = {}
        for name, (a, b) in parents.items():
            mix = torch.randn(RANK, 6, generator=generator)
            noise = torch.randn(RANK, a.shape[1], generator=generator)
            factors[name] = mix @ a + 0.3 * noise, 0.01 * b[:, :RANK]
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        }  # fmt: skip
        write_adapter(folder / f"task{task}", config, factors)
        opened = open_adapter(folder / f"task{task}")
        values = {field.name: getattr(opened, field.name) for field in fields(opened)}
        found[f"task{task}"] = WatchedAdapter(**values)
    return found


def watched(
    adapters: dict[str, Adapter], count: int, output: Path, options: CompressOptions
) -> Watch:
    WATCHES.append(Watch())
    compress(dict(list(adapters.items())[:count]), output / str(count), options)
    return WATCHES.pop()


@pytest.mark.parametrize(
    ("options", "most_reads", "most_held"),
    [
        # Measured, then written. Held: a stack and the one before.
        (CompressOptions("private", ratio=3, executor="serial"), 2, 16),
        # Whether it can be fitted at once, three passes, curves, cores; then written.
        (CompressOptions("joint", num_components=6, executor="serial"), 7, 20),
        # The same, and the widths. A basis of k components is exact up to 2 (k + 8) rows, which are held.
        (CompressOptions("joint", ratio=8, executor="serial"), 8, 2 * (72 + 8) // RANK),
    ],
    ids=["private", "components", "joint"],
)
def test_reads_and_what_is_held_do_not_grow_with_the_adapters(
    options: CompressOptions,
    most_reads: int,
    most_held: int,
    adapters: dict[str, Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A module whose factors are few is read once; these are small, and are to be as many would.
    monkeypatch.setattr(survey, "_HELD_BYTES", 0)
    elements = 8 * RANK * min(map(sum, SHAPES.values()))
    monkeypatch.setattr(survey, "_BATCH_ELEMENTS", elements)
    monkeypatch.setattr(survey, "_METER_ELEMENTS", elements)
    few = watched(adapters, 24, tmp_path, options)
    many = watched(adapters, 48, tmp_path, options)
    assert len(many.reads) == 48 * len(SHAPES)
    # Of few, a basis is exact after two passes.
    assert max(few.reads.values()) <= max(many.reads.values()) <= most_reads
    assert many.most <= most_held
    assert many.alive == 0


def test_auto_reads_a_bounded_number_of_times(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    # All that joint does, private and flat measurements, sketches, and two rounds of fitting again
    # to some of the tasks.
    options = CompressOptions(ratio=8, executor="serial")
    for count in (12, 24, 48):
        assert max(watched(adapters, count, tmp_path, options).reads.values()) <= 60
