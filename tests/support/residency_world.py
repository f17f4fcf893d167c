"""Workers of given budgets that hold tasks of given sizes, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin import workers
from vllm_vlora.plugin.arrivals import FAR, Brought
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
        self.staged: list[set[str]] = [set() for _ in budgets]
        self.start = start
        self.broken: set[str] = set()
        # On no disk, and those of them that are being fetched.
        self.far: set[str] = set()
        self.fetched: list[str] = []
        self.told: list[str] = []
        self.used: set[str] = set()
        self.dropped: list[str] = []
        self.tidied = 0
        self.now = 0.0
        self.residency = Residency(self, lambda: set(map(path_of, self.used)), lambda: self.now)

    def nbytes(self, worker: int) -> int:
        return sum(self.sizes[name][worker] for name in self.on[worker])

    def held(self) -> dict[str, bool]:
        return {path_of(name): True for name in self.start}

    def hold(self, request: Any, instead_of: Sequence[str] = ()) -> list[Held]:
        self.told.append(request.lora_name)
        return [self.hold_on(worker, request, instead_of) for worker in range(len(self.budgets))]

    def hold_on(self, worker: int, request: Any, instead_of: Sequence[str]) -> Held:
        """What one of them does and says."""
        name, here, budget = request.lora_name, self.on[worker], self.budgets[worker]
        if name in self.broken and worker == len(self.budgets) - 1:
            return Held(error=CheckpointError(f"{name} is damaged"))
        size = 0 if name in here else self.sizes[name][worker]
        gave_way = 0
        while (over := self.nbytes(worker) + size - budget) > 0:
            if gave_way == len(instead_of):
                return Held(over=over, gave_way=gave_way)
            here.discard(name_of(instead_of[gave_way]))
            gave_way += 1
        here.add(name)
        return Held(nbytes=size, gave_way=gave_way)

    def stage(self, *names: str) -> None:
        """Let all of them have read these tasks."""
        self.far -= set(names)
        for staged in self.staged:
            staged |= set(names)

    def bring_to(
        self,
        worker: int,
        requests: Sequence[Any],
        hold: int,
        instead_of: Sequence[str],
        fetch: Sequence[int] = (),
    ) -> list[Brought]:
        """What one of them does and says, as ``TaskLoRAManager.bring``."""
        left, said = list(instead_of), list[Brought]()
        for number, request in enumerate(requests):
            if request.lora_name in self.far and number not in fetch:
                said.append(FAR)
                continue
            if request.lora_name in self.far and request.lora_name not in self.fetched:
                self.fetched.append(request.lora_name)
            read = request.lora_name in self.staged[worker] | self.on[worker]
            if not read or number >= hold:
                said.append(read)
                continue
            held = self.hold_on(worker, request, left)
            said.append(held)
            del left[: held.gave_way]
            hold = 0 if held.over else hold
        return said

    def forget(self, path: str, wholly: bool = False) -> None:
        if wholly:
            self.dropped.append(name_of(path))
        for held in self.on:
            held.discard(name_of(path))

    def tidy(self) -> None:
        self.tidied += 1


class Executor:
    """vLLM's executor over these managers of tasks, a worker each, that answers at once."""

    is_sleeping = False
    uses_ray = False

    def __init__(self, managers: Sequence[Any]) -> None:
        self._workers = [
            SimpleNamespace(
                model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
            )
            for manager in managers
        ]
        self.asked: list[str] = []

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        if method is workers._settled:
            method, *args = args  # type: ignore[assignment]
        self.asked.append(method.__name__)
        # Not of the tests' own process.
        answers = [
            None if method is workers._freeze_heap else method(worker, *args)
            for worker in self._workers
        ]
        if not non_block:
            return answers
        assert not self.uses_ray, "vLLM's promise would fail"
        promise: Future[Any] = Future()
        promise.set_result(answers)
        return promise
