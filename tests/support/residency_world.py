"""Workers of given budgets that hold tasks of given sizes, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.residency import Held, Residency

DIGEST = "0123456789abcdef" * 2


def path_of(name: str) -> str:
    return f"/ck/tasks/{name}.safetensors@{DIGEST}"


def name_of(path: str) -> str:
    return path.removeprefix("/ck/tasks/").removesuffix(f".safetensors@{DIGEST}")


def lora(name: str) -> Any:
    return SimpleNamespace(lora_name=name, lora_path=path_of(name), lora_int_id=ord(name[0]))


class Workers:
    """Workers that hold tasks of given sizes, and what they were told; some tasks cannot be read."""

    def __init__(
        self, budgets: list[int], sizes: dict[str, list[int]], start: tuple[str, ...] = ()
    ) -> None:
        self.budgets, self.sizes = budgets, sizes
        self.on: list[set[str]] = [set(start) for _ in budgets]
        self.start = start
        self.broken: set[str] = set()
        self.told: list[str] = []
        self.used: set[str] = set()
        self.dropped: list[str] = []
        self.tidied = 0
        self.now = 0.0
        self.residency = Residency(self, lambda: set(map(path_of, self.used)), lambda: self.now)

    def nbytes(self, worker: int) -> int:
        return sum(self.sizes[name][worker] for name in self.on[worker])

    def held(self) -> list[str]:
        return [path_of(name) for name in self.start]

    def hold(self, request: Any, instead_of: Sequence[str] = ()) -> list[Held]:
        for path in instead_of:
            self.forget(path)
        name = request.lora_name
        self.told.append(name)
        answers = []
        for worker, budget in enumerate(self.budgets):
            if name in self.broken and worker == len(self.budgets) - 1:
                answers.append(Held(error=CheckpointError(f"{name} is damaged")))
                continue
            size = 0 if name in self.on[worker] else self.sizes[name][worker]
            over = max(0, self.nbytes(worker) + size - budget)
            if not over:
                self.on[worker].add(name)
            answers.append(Held(over=over, nbytes=size))
        return answers

    def forget(self, path: str, wholly: bool = False) -> None:
        if wholly:
            self.dropped.append(name_of(path))
        for held in self.on:
            held.discard(name_of(path))

    def tidy(self) -> None:
        self.tidied += 1
