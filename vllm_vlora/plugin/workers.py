"""What an engine core asks its workers, and what it knows of them without asking.

Whatever asks them runs in the engine core's own loop, between two steps, since executors take one call at
a time. A question costs more than its answer: it waits for the step that is under way, and a worker that
was asked anything looks for the next message without sleeping for a second (``SpinCondition`` of vLLM's
message queue), which keeps a core of an idle machine busy where something is asked every second.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_vlora.checkpoint.aliases import encode_aliases
from vllm_vlora.checkpoint.router_files import encode_router
from vllm_vlora.plugin.arrivals import Answer, Brought
from vllm_vlora.plugin.following import WorkerState, folder_identity, pause
from vllm_vlora.plugin.residency import Held
from vllm_vlora.plugin.resident import BasesReport

# --- what they answer -------------------------------------------------------------------------------


def manager_of(worker: Any) -> Any:
    """A worker's ``TaskLoRAManager``."""
    return worker.model_runner.lora_manager._adapter_manager


def _hold(worker: Any, request: Any, instead_of: list[str]) -> Held:
    return manager_of(worker).hold(request, instead_of)


def _bring(
    worker: Any,
    requests: list[Any],
    hold: int,
    instead_of: list[str],
    drop: list[str],
    fetch: list[int],
) -> list[Brought]:
    manager = manager_of(worker)
    for path in drop:
        manager.forget(path, wholly=True)
    return manager.bring(requests, hold, instead_of, fetch)


def _is_direct(worker: Any, lora_id: int) -> bool:
    return manager_of(worker).is_direct(lora_id)


def _forget(worker: Any, path: str, wholly: bool) -> None:
    manager_of(worker).forget(path, wholly)


def _tidy(worker: Any) -> None:
    manager_of(worker).vlora_store.tidy()


def _held(worker: Any) -> dict[str, bool]:
    return manager_of(worker).held_paths()


def _freeze_heap(worker: Any) -> None:
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def _served(worker: Any) -> list[tuple[str, str]]:
    return manager_of(worker).vlora_store.served()


def _aliases(worker: Any) -> str:
    state = manager_of(worker).vlora_store.state
    return "" if state is None else encode_aliases(state.aliases).decode()


def _router(worker: Any) -> str:
    state = manager_of(worker).vlora_store.state
    router = None if state is None else state.router
    return "" if router is None else encode_router(router).decode()


def _state(worker: Any) -> WorkerState:
    return manager_of(worker).state()


def _adopt(worker: Any, digest: str) -> bool:
    return manager_of(worker).adopt(digest)


def _bases(worker: Any, in_use: list[str], awaited: list[str]) -> BasesReport:
    return manager_of(worker).vlora_store.bases(in_use, awaited)


def _hold_back(worker: Any, held_back: bool) -> list[str]:
    return manager_of(worker).vlora_store.hold_back(held_back)


def _keep_bases(worker: Any) -> None:
    manager_of(worker).vlora_store.keep_bases()


def _exchange_bases(worker: Any) -> list[str]:
    return manager_of(worker).exchange_bases()


def _settled(worker: Any, question: Callable[..., Any], *args: Any) -> Any:
    """What a worker says once all of its device's work for it is done.

    For vLLM's older executor on Ray, whose compiled graph runs steps on a thread of its own: that one's
    stream does not wait for this one's, and a task could be read before it has come.
    """
    answer = question(worker, *args)
    if current_platform.is_cuda_alike():
        torch.cuda.current_stream().synchronize()
    return answer


# --- asking them ------------------------------------------------------------------------------------


class States(NamedTuple):
    """What the workers serve, and what they could: digests of states, one of each where they agree."""

    served: set[str]
    offered: set[str]


class Workers:
    """The workers of an engine core.

    Attributes:
        count: how many there are, once ``held`` was asked.
        changes: how often something was done to what they hold, or they said something new of the folder.
    """

    def __init__(self, executor: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rpc = executor.collective_rpc
        # vLLM's older executor on Ray; workers of the newer one take messages as processes do.
        self._old_ray = executor.uses_ray and not isinstance(executor, MultiprocExecutor)
        self.count = self.changes = 0
        # What they said when they were last asked which state they serve, and since when they say so.
        self._said: set[WorkerState] = set()
        self._said_first = self._asked_at = 0.0
        # Whether this process sees the folder that they follow.
        self._same_folder = False

    def ask(self, question: Callable[..., Any], *args: Any) -> list[Any]:
        """What each says to ``question(worker, *args)``, which leaves what they hold as it is."""
        if self._old_ray:
            return self._rpc(_settled, args=(question, *args))
        return self._rpc(question, args=args)

    def ask_later(self, question: Callable[..., Any], *args: Any) -> Any:
        """A promise of the same, as ``arrivals.Answer``; it is kept with a step's, and no step waits."""
        if not self._old_ray:
            return self._rpc(question, args=args, non_block=True)
        # Its promise takes what workers say for a step's output and fails.
        kept: Future[list[Any]] = Future()
        kept.set_result(self.ask(question, *args))
        return kept

    def tell(self, order: Callable[..., Any], *args: Any) -> list[Any]:
        """Have each do ``order(worker, *args)``; what each says."""
        self.changes += 1
        return self.ask(order, *args)

    # What they hold.

    def held(self) -> dict[str, bool]:
        first, *others = answers = self.ask(_held)
        self.count = len(answers)
        everywhere = first.keys() & set.intersection(*map(set, others)) if others else first
        return {path: all(a[path] for a in answers) for path in first if path in everywhere}

    def freeze_heaps(self) -> None:
        """Have garbage collections pass over what is there now, which is to stay.

        vLLM does so in engine cores and in workers of GPUs once they are warm. In a worker of CPUs each
        task that came brought a collection of everything nearer: it held up all requests for 0.8 s.
        """
        self.ask(_freeze_heap)

    def are_direct(self, lora_id: int) -> bool:
        return all(self.ask(_is_direct, lora_id))

    def hold(self, request: Any, instead_of: Sequence[str]) -> list[Held]:
        return self.tell(_hold, request, list(instead_of))

    def forget(self, path: str, wholly: bool = False) -> None:
        self.tell(_forget, path, wholly)

    def tidy(self) -> None:
        self.tell(_tidy)

    def bring(
        self,
        requests: Sequence[Any],
        hold: int,
        instead_of: Sequence[str],
        drop: Sequence[str],
        fetch: Sequence[int],
    ) -> Answer:
        """As ``arrivals`` wants it."""
        self.changes += 1
        return self.ask_later(
            _bring, list(requests), hold, list(instead_of), list(drop), list(fetch)
        )

    # The state that they serve.

    def served(self) -> list[Any]:
        return self.ask(_served)

    def aliases(self) -> list[str]:
        return self.ask(_aliases)

    def routers(self) -> list[str]:
        return self.ask(_router)

    def states(self) -> States:
        """What they serve and could; asked for unless nothing can have changed since they said it."""
        now = self._clock()
        if self._may_say_more(now):
            said = {WorkerState(*answer) for answer in self.ask(_state)}
            if said != self._said:
                # What they refused, whoever counts it asks for.
                self._said, self._said_first = said, now
                self.changes += 1
            self._asked_at = now
        return States({one.served for one in self._said}, {one.offered for one in self._said})

    def _may_say_more(self, now: float) -> bool:
        """Whether they may offer something else than they said: have they seen the folder as it is now?

        That this process sees the same folder shows in its identity, which another machine's has not.
        """
        looked = {(one.folder, one.looked) for one in self._said}
        if len(looked) != 1:
            return True
        ((folder, identity),) = looked
        if not folder:
            return False
        as_they_saw_it = identity == (folder_identity(folder) or ())
        self._same_folder |= as_they_saw_it and bool(identity)
        if not (as_they_saw_it and self._same_folder):
            return True
        if any(one.refused for one in self._said):
            return now - self._asked_at >= pause(now - self._said_first)
        return not identity or len({one.offered for one in self._said}) != 1

    def adopt(self, digest: str) -> bool:
        """Whether all of them serve a state from now on; who lags behind is told again."""
        done = all(self.tell(_adopt, digest))
        self._said = set()
        return done

    # Their bases.

    def bases(self, in_use: Collection[str], awaited: Collection[str]) -> list[BasesReport]:
        return self.ask(_bases, list(in_use), list(awaited))

    def hold_back(self, held_back: bool) -> set[str]:
        return set().union(*self.tell(_hold_back, held_back))

    def keep_bases(self) -> None:
        self.tell(_keep_bases)

    def exchange_bases(self) -> set[str]:
        return set().union(*self.tell(_exchange_bases))
