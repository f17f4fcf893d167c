"""What is compared: names, and the engine that each of them needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from serving.loads import Load
from serving.world import CHECKPOINTS

BASE, BASE_COMPILED, STOCK, PUNICA_RUNS = "base", "base-compiled", "stock-N", "punica-runs"
# Stock's adapters as they are: what the comparison with stock leaves different is the loading.
MATERIALIZED_CHECKPOINT = "bf16"
DIRECT = tuple(f"direct-{name}" for name in CHECKPOINTS)
OVERLAP = "-overlap"
DEFAULT_CPU = (
    *(BASE, "stock-1", "stock-8", STOCK, PUNICA_RUNS),
    *("materialize-8", "direct-k32", "direct-k64", "direct-nf4"),
)
FULL = (
    *(BASE, "stock-1", "stock-8", "stock-32", STOCK, PUNICA_RUNS),
    *("materialize-8", "materialize-32", *DIRECT),
)
QUICK = (BASE, STOCK, PUNICA_RUNS, "direct-k32")
CPU_ONLY = (PUNICA_RUNS, BASE_COMPILED)


@dataclass(frozen=True)
class Configuration:
    """One line of the tables.

    Attributes:
        name: as the user gives it.
        engine: name of the engine that runs it; two configurations may share one.
        slots: ``max_loras``; None for as many as there are tasks, 0 without LoRA.
        checkpoint: of ``CHECKPOINTS``, for the plugin; None for stock vLLM.
        mode: the plugin's ``VLLM_VLORA_MODE``.
        overlap: the plugin's ``VLLM_VLORA_OVERLAP``.
        punica_runs: whether the comparator replaces stock punica.
        compiled: whether the base model may be compiled on CPU.
    """

    name: str
    engine: str
    slots: int | None
    checkpoint: str | None = None
    mode: str = ""
    overlap: bool = False
    punica_runs: bool = False
    compiled: bool = False

    @property
    def uses_tasks(self) -> bool:
        """Whether requests name tasks; the base model is asked as it is."""
        return self.slots != 0

    @property
    def reference(self) -> str:
        """What its tasks' weights are: the adapters, or a checkpoint's name."""
        return self.checkpoint or "adapters"

    def runs(self, load: Load) -> bool:
        """Whether a load is for it: one slot is for one task."""
        return self.slots != 1 or load.tasks == 1

    def engine_arguments(self, tasks: int, rank: int) -> dict[str, object]:
        """The part of ``vllm.LLM``'s arguments that makes the difference.

        Stock vLLM gets room for every task in host memory, so that a swap costs a copy and no read.
        """
        if not self.uses_tasks:
            return {}
        return {
            "enable_lora": True,
            "max_loras": self.slots or tasks,
            "max_cpu_loras": max(tasks, self.slots or 0),
            "max_lora_rank": rank,
        }

    def environment(self, checkpoints: Mapping[str, str]) -> dict[str, str]:
        """The plugin's environment; without a checkpoint vLLM runs without plugins."""
        if self.checkpoint is None:
            return {"VLLM_PLUGINS": "", "VLLM_VLORA_CHECKPOINT": ""}
        return {
            "VLLM_PLUGINS": "vlora",
            "VLLM_VLORA_CHECKPOINT": checkpoints[self.checkpoint],
            "VLLM_VLORA_MODE": self.mode,
            "VLLM_VLORA_OVERLAP": "on" if self.overlap else "off",
        }


def configuration(name: str) -> Configuration:
    """The configuration of a name; ValueError says which names there are."""
    if name in (BASE, BASE_COMPILED):
        return Configuration(name, name, slots=0, compiled=name == BASE_COMPILED)
    if name in (STOCK, PUNICA_RUNS):
        return Configuration(name, STOCK, slots=None, punica_runs=name == PUNICA_RUNS)
    direct = name.removesuffix(OVERLAP)
    if direct in DIRECT:
        checkpoint = direct.removeprefix("direct-")
        return Configuration(
            name, name, None, checkpoint, mode="direct", overlap=name.endswith(OVERLAP)
        )
    found = re.fullmatch(r"(stock|materialize)-([1-9]\d*)", name)
    if found is None:
        known = ", ".join([BASE, BASE_COMPILED, STOCK, PUNICA_RUNS, *DIRECT])
        raise ValueError(
            f"no configuration {name!r}; use {known}, direct-...{OVERLAP}, stock-SLOTS or "
            "materialize-SLOTS"
        )
    kind, slots = found[1], int(found[2])
    if kind == "stock":
        return Configuration(name, name, slots)
    return Configuration(name, name, slots, checkpoint=MATERIALIZED_CHECKPOINT, mode="materialize")
