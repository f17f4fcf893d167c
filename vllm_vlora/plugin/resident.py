"""Tasks that a worker has: on its device, in host memory, or on disk.

A task on the device is held in one of two forms: as a direct task, or as the sources from which it is
materialized. What lies there lies in an ``Arena``, whose size is settled at start-up; which tasks it
holds is the engine core's business (see ``residency``), which alone knows what is asked for. A task that
comes from disk is read and laid out in a thread (*staged*); as long as the host's budget has room, its
image stays there when the device's block is given up.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.blending.blended import with_named_blends
from vllm_vlora.checkpoint.manifest import task_file
from vllm_vlora.checkpoint.pinning import pinned, split_pin
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.checkpoint.task_entry import TaskTable, column, entries
from vllm_vlora.errors import (
    CheckpointError,
    CheckpointReplacedError,
    MemoryBudgetError,
    ModelMismatchError,
    TaskLoadError,
)
from vllm_vlora.plugin.arena import Arena, Block
from vllm_vlora.plugin.blend_paths import blended_checkpoint, is_made_of
from vllm_vlora.plugin.counters import HOST
from vllm_vlora.plugin.direct import DirectMemory, DirectPath, task_memory
from vllm_vlora.plugin.events import happened
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.held_bases import Bases
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path, task_path
from vllm_vlora.plugin.images import Image, Span, make_image
from vllm_vlora.plugin.reading import begin
from vllm_vlora.plugin.settings import LATE_VARIABLE, Budget
from vllm_vlora.quantize import PackedMatrix
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule
from vllm_vlora.triton_kernels.direct import ADDRESS_FIELDS, DirectTask

BasisKey = tuple[str, str, str]
"""Digest of all bases, module, representation of the tasks that share one."""
Check = Callable[[Checkpoint, Iterable[str], bool], None]
MakePath = Callable[[Checkpoint], DirectPath]
# Bytes beside its factors that a task never takes on a device.
_SMALL = 1 << 20
# Staged tasks that nobody has asked for; more are put aside.
_UNCLAIMED = 32
# Threads that stage tasks: one reads while the other lays out.
_READERS = 2
# And of those that come from the Hub or a URL, most of whose time is the way.
_FETCHERS = 8
# Room on the device for each byte of such a file: packed cores are unpacked there.
_FAR_SHARE = 2
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class ResidentTask:
    """One task on the device.

    Attributes:
        sources: the engine's module name -> sources of A and of B transposed; empty for a direct task.
        direct: the task as the direct kernels read it; None for one that is materialized.
        obstacle: why it is materialized; empty for a direct task.
    """

    task_id: str
    path: str
    rank: int
    sources: dict[str, tuple[SideSource, SideSource]]
    extra: dict[str, torch.Tensor]
    direct: DirectTask | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class _Staged:
    """A task on the host, ready to be copied.

    Attributes:
        bases: what of the bases it needs, all of which it keeps from being given up.
        brought: those of them that the device did not have. beside: those that it had, as they lay there.
        memory: of a direct task.
        stands_on: digest of the bases that the layers must hold where it runs direct; of a task that is
            materialized, those on which it will run direct. Empty where it needs none, or never will.
    """

    image: Image[ResidentTask]
    bases: frozenset[BasisKey]
    brought: dict[BasisKey, Image[Basis]]
    memory: DirectMemory | None
    stands_on: str = ""
    beside: dict[BasisKey, Basis] = field(default_factory=dict)


@dataclass(frozen=True)
class _Placed:
    """A task on the device, and what it takes there."""

    task: ResidentTask
    block: Block
    nbytes: int
    bases: frozenset[BasisKey]
    memory: DirectMemory | None
    stands_on: str


@dataclass
class _NextBases:
    """Bases of the state that is served, which the layers do not hold yet.

    Attributes:
        found: what they are and this rank's share of them, once it is read; why they have no room as an
            error; None where no task needs any.
        held_back: tasks that need them wait for them; otherwise they are materialized meanwhile.
    """

    digest: str
    found: Future[tuple[Bases, Image[dict[int, Basis]]] | None]
    held_back: bool = True

    @property
    def bases(self) -> Bases | None:
        """What they are, where that is known and they have room."""
        if not self.found.done() or self.found.exception() is not None:
            return None
        found = self.found.result()
        return None if found is None else found[0]


@dataclass(frozen=True)
class BasesReport:
    """How far a worker is with the bases of the state that is served.

    Attributes:
        wanted: they are others than its layers hold. ready: they are read.
        refused: why they cannot be exchanged; empty where they can.
        busy: of what was asked about something would lose its place by the exchange.
    """

    wanted: bool = False
    ready: bool = False
    refused: str = ""
    busy: bool = False


@dataclass(frozen=True)
class _PlacedBasis:
    basis: Basis
    block: Block
    nbytes: int


@dataclass
class _HostImages:
    """Images on the host, the least recently used first.

    Pinned, each takes the next power of two, as torch's allocator of such memory gives it.
    """

    limit: int
    pinned: bool = False
    held: OrderedDict[str, _Staged] = field(default_factory=OrderedDict)
    nbytes: int = 0
    # That gave way to others so far.
    evictions: int = 0

    def put(self, path: str, staged: _Staged) -> list[_Staged]:
        """Keep an image; what has to go for it, perhaps itself."""
        if self.held.get(path) is staged:
            self.held.move_to_end(path)
            return []
        gone = self.pop(path)
        self.held[path] = staged
        self.nbytes += self._takes(staged)
        while self.nbytes > self.limit:
            first = next(iter(self.held))
            gone += self.pop(first)
            # What is too large for all of it gives way to nobody.
            if first != path:
                self.evictions += 1
                happened("eviction", task=first, tier=HOST)
        return gone

    def pop(self, path: str) -> list[_Staged]:
        """Take an image out, if it is there."""
        staged = self.held.pop(path, None)
        if staged is None:
            return []
        self.nbytes -= self._takes(staged)
        return [staged]

    def _takes(self, staged: _Staged) -> int:
        size = staged.image.size
        return 1 << (size - 1).bit_length() if self.pinned and size else size


class ResidentStore:
    """The tasks of one worker by their ``lora_path``, which names their content.

    Bases and private factors keep their stored precision; only the cores of joint tasks, which are
    small, are unpacked.

    Args:
        device: where the tensors lie.
        engine_name: turns the adapters' name of a module into the engine's.
        check: called with a checkpoint, task ids and whether they run direct before these are loaded;
            raises when the served model cannot take them.
        only_direct: refuse tasks that cannot run direct.
        elsewhere: the engine's names of modules that other pipeline-parallel ranks have; what is stored
            for them is left out.
        narrow_rows: hold rows of 3 and 2 bits with no more, in tasks that are materialized.
        budget: what all of it may take; anything where it is None.
        exchanges: whether bases of another state take the place of those that the layers hold.
    """

    def __init__(
        self,
        device: torch.device,
        engine_name: Callable[[str], str],
        check: Check,
        only_direct: bool = False,
        elsewhere: Collection[str] = (),
        narrow_rows: bool = False,
        budget: Budget | None = None,
        exchanges: bool = True,
    ) -> None:
        self._device, self._exchanges = device, exchanges
        self._engine_name = engine_name
        self._check = check
        self._only_direct = only_direct
        self._elsewhere = elsewhere
        self._narrow_rows = narrow_rows
        self._budget = budget
        self.direct: DirectPath | None = None
        self.state: State | None = None
        self._arena = Arena(device, NO_LIMIT if budget is None else budget.device)
        self._growing = True
        self._placed: dict[str, _Placed] = {}
        self._bases: dict[BasisKey, _PlacedBasis] = {}
        # Tasks on the device and images on the host that need a basis, by basis.
        self._uses: Counter[BasisKey] = Counter()
        # Of these the tasks on the device alone.
        self._uses_there: Counter[BasisKey] = Counter()
        self._using = threading.Lock()
        # Of stagings that failed; taken back by the thread that has the arena.
        self._unused: deque[frozenset[BasisKey]] = deque()
        self._images = _HostImages(0 if budget is None else budget.host, self._pins)
        self._staging: dict[str, Future[_Staged]] = {}
        # Those of them that were given up while a thread was at them.
        self._given_up: set[str] = set()
        self._readers = ThreadPoolExecutor(_READERS, "vlora-stage")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "vlora-fetch")
        # Of what is in memory: who publishes it waits, and with him the engine, for no disk that hangs.
        self._takers = ThreadPoolExecutor(_READERS, "vlora-take")
        self._next: _NextBases | None = None
        # Tasks that are in no file, by path.
        self._in_memory: dict[str, Checkpoint] = {}
        self._pin: str | None = None
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._placed)

    def tasks(self) -> list[ResidentTask]:
        """Every task on the device, in the order of coming."""
        return [placed.task for placed in self._placed.values()]

    def held(self, path: str) -> ResidentTask | None:
        """The task of a path, if it is on the device."""
        placed = self._placed.get(path)
        return None if placed is None else placed.task

    # --- the start ---

    def preload(self, folder: str | Path, make_path: MakePath | None = None) -> Checkpoint:
        """Load a checkpoint's tasks while the budget lasts, with ``make_path`` what lets them run direct.

        Where its reference says which content it must have, no other is loaded later either.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ModelMismatchError: the served model cannot take it.
        """
        started = time.perf_counter()
        _, self._pin = split_pin(folder)
        checkpoint = Checkpoint.open(folder)
        if make_path is not None:
            # What its aliases name will come: for ranks and formats that no task has.
            self.direct = make_path(with_named_blends(checkpoint))
        self.state = State(checkpoint)
        self.check(checkpoint, checkpoint.tasks)
        far = checkpoint.far_tasks()
        for task_id in checkpoint.tasks:
            if task_id in far:
                continue
            staged = self._read(checkpoint, task_id, self._obstacle(checkpoint, task_id))
            placed = self._place(self.state.paths[task_id], staged)
            self._let_go(staged.bases)
            if not placed:
                break
        sizes = zip(checkpoint.tasks, column(checkpoint.tasks, "lora_nbytes")) if far else ()
        self.seal(sum(nbytes for task_id, nbytes in sizes if task_id in far))
        self.seconds = time.perf_counter() - started
        return checkpoint

    def seal(self, far: int = 0) -> None:
        """Take the memory for what comes later; from here on nothing is taken from the device.

        Args:
            far: bytes of the files of tasks of the checkpoint that are to be fetched.
        """
        if self._budget is not None:
            self._growing = False
            left = max(0, self._budget.device - self._arena.nbytes)
            self._arena.seal(self._budget.late + min(left, _FAR_SHARE * far))

    def check(self, checkpoint: Checkpoint, task_ids: Collection[str]) -> None:
        """Raise what loading these tasks would, as far as the manifest tells.

        Raises:
            ModelMismatchError: the served model cannot take them.
        """
        speak = _speakers(checkpoint, set(task_ids))
        bases = self._fitting(checkpoint) if self._only_direct and self._exchanges else None
        self._obstacles(checkpoint, [task for task in task_ids if task in speak], bases)

    def serve(self, state: State) -> None:
        """Take another state's tasks as what is served; what is held of the one before stays.

        Where it has other bases they are read, beside everything, to be exchanged; see ``bases``.
        """
        self.state, self._next = state, None
        checkpoint = state.checkpoint
        if (
            self._exchanges
            and self.direct is not None
            and checkpoint.basis_digest != self.direct.bases.digest
        ):
            # A thread of its own: tasks that need no bases are read meanwhile.
            reader = ThreadPoolExecutor(1, "vlora-bases")
            found = begin(reader, self._read_next, checkpoint)
            reader.shutdown(wait=False)
            self._next = _NextBases(checkpoint.basis_digest, found)

    def served(self) -> list[tuple[str, str]]:
        """(task id, path) of what is served, in the checkpoint's order."""
        return [] if self.state is None else list(self.state.paths.items())

    # --- the bases of another state ---

    def bases(self, in_use: Collection[str], awaited: Collection[str]) -> BasesReport:
        """How far it is with the bases of the state that is served.

        Args:
            in_use: paths of tasks of requests that run. awaited: of requests that wait for them.
        """
        following = self._next
        if following is None:
            return BasesReport()
        found = following.found
        if not found.done():
            return BasesReport(wanted=True)
        error = found.exception()
        if error is not None:
            return BasesReport(wanted=True, refused=str(error) or type(error).__name__)
        if found.result() is None:
            self._next = None
            return BasesReport()
        # Who waits for a task that is materialized until then waits for the exchange.
        busy = any(self._is_ended(self._find(path)) for path in in_use) or any(
            self._is_ended(self._find(path)) and not self._is_held_back(self._find(path))
            for path in awaited
        )
        return BasesReport(wanted=True, ready=True, busy=busy)

    def ended(self) -> list[str]:
        """Paths of the tasks whose form the exchange ends, on the device or the host."""
        known = {*self._placed, *self._images.held, *self._staging}
        return [path for path in known if self._is_ended(self._find(path))]

    def hold_back(self, held_back: bool) -> list[str]:
        """Whether tasks on the bases to come wait for them; otherwise they are materialized.

        Returns:
            Paths of those that are materialized on the device already, and whose requests wait as well.
        """
        if self._next is None:
            return []
        self._next.held_back = held_back
        return [path for path, task in self._placed.items() if self._is_held_back(task)]

    def keep_bases(self) -> None:
        """Give the exchange up: what stands on other bases than the layers hold is materialized."""
        self._next = None

    def exchange(self) -> None:
        """Put the bases of the state that is served into the layers.

        What is ``ended`` by it must have been dropped.
        """
        assert self._next is not None
        assert self.direct is not None
        found = self._next.found.result()
        assert found is not None
        bases, shares = found
        self.direct.exchange(bases, shares.tree)
        self._next = None

    def _read_next(self, checkpoint: Checkpoint) -> tuple[Bases, Image[dict[int, Basis]]] | None:
        assert self.direct is not None
        bases = self.direct.other_bases(checkpoint)
        if bases is None:
            return None
        why = self.direct.misfit(checkpoint, bases)
        if why is not None:
            raise ModelMismatchError(why)
        return bases, self.direct.read_bases(checkpoint, bases)

    def _fitting(self, checkpoint: Checkpoint) -> Bases | None:
        """A checkpoint's bases, where they are others than the layers hold and have room there."""
        bases = None if self.direct is None else self.direct.other_bases(checkpoint)
        if bases is None or self.direct is None:
            return None
        return bases if self.direct.misfit(checkpoint, bases) is None else None

    def _find(self, path: str) -> _Staged | _Placed | None:
        """A task where it is, the device first."""
        return (
            self._placed.get(path)
            or self._images.held.get(path)
            or _result(self._staging.get(path))
        )

    def _is_ended(self, task: _Staged | _Placed | None) -> bool:
        """Whether a task runs direct on what the layers hold, or is materialized until the exchange."""
        if task is None or not task.stands_on or self._next is None:
            return False
        return (task.stands_on == self._next.digest) == (task.memory is None)

    def _is_held_back(self, task: _Staged | _Placed | None) -> bool:
        following = self._next
        return (
            task is not None
            and following is not None
            and following.held_back
            and task.stands_on == following.digest
        )

    def _is_stale(self, staged: _Staged) -> bool:
        """Whether a task was read in a form that it is not to have, as the bases are by now."""
        if self._lost_bases(staged):
            return True
        if not staged.stands_on or self.direct is None:
            return False
        runs_direct = staged.memory is not None
        if staged.stands_on == self.direct.bases.digest:
            return not runs_direct
        if self._next is not None and staged.stands_on == self._next.digest:
            return runs_direct != self._next.held_back
        return runs_direct

    def _lost_bases(self, staged: _Staged) -> bool:
        """Whether bases that a task was read beside are no longer where they lay."""
        there = self._bases
        return any(
            key not in there or there[key].basis is not basis
            for key, basis in staged.beside.items()
        )

    def _waits_for_bases(self, path: TaskPath) -> bool:
        """Whether how a task is to be read depends on bases that are still being read."""
        following, state = self._next, self.state
        if following is None or state is None or following.found.done():
            return False
        task_id = state.tasks.get(str(path))
        if task_id is None:
            # A blend, most likely.
            return path.checkpoint == state.checkpoint.path.absolute()
        return any(not s.is_private for s in state.checkpoint.record(task_id).segments)

    # --- staging ---

    def stage(self, path: TaskPath, fetched: bool = False) -> bool | None:
        """Have a task read into host memory beside everything else; whether that is done.

        None where it waits for bases that are to be exchanged first. What went wrong is raised by
        ``place``.

        Args:
            fetched: it, or what it is a blend of, may be far; those that are here do not wait for it.
        """
        name = str(path)
        placed = self._placed.get(name)
        if placed is not None:
            return None if self._is_held_back(placed) else True
        self._reclaim(name)
        staged = self._images.held.get(name) or _result(self._staging.get(name))
        if staged is not None and self._is_stale(staged):
            self._discard(name)
            staged = None
        if staged is not None:
            return None if self._is_held_back(staged) else True
        future = self._staging.get(name)
        if future is None:
            if self._waits_for_bases(path):
                return None
            self._sweep()
            readers = self._readers_of(path, fetched)
            future = self._staging[name] = begin(readers, self._read_path, path)
        # Not True where it was read just now: in which form is seen at the next question.
        return _failed(future)

    def _readers_of(self, path: TaskPath, fetched: bool) -> ThreadPoolExecutor:
        if path.checkpoint == MEMORY:
            return self._takers
        return self._fetchers if fetched else self._readers

    def take(self, path: TaskPath, checkpoint: Checkpoint) -> None:
        """Have a task from a checkpoint in memory, which is kept until ``discard``, and stage it.

        Raises:
            ModelMismatchError: the served model cannot take it.
            MemoryBudgetError: the device has no room for it, whatever gives way.
        """
        self._obstacles(checkpoint, checkpoint.tasks)
        self._in_memory[str(path)] = checkpoint
        try:
            self.stage(path)
            self._check_room(path, checkpoint)
        except BaseException:
            self.discard(str(path))
            raise

    def _check_room(self, path: TaskPath, checkpoint: Checkpoint) -> None:
        """Refuse a task that is larger than all the room there is, as this rank lays it out."""
        (task_id,) = checkpoint.tasks
        name, room = str(path), self._arena.largest
        # Far below that, nobody need wait until it is laid out.
        likely = 2 * checkpoint.record(task_id).nbytes + _SMALL
        if self._growing or name in self._placed or likely <= room:
            return
        staged = self._images.held.get(name) or self._staging[name].result()
        nbytes = staged.image.size
        if nbytes > room:
            raise MemoryBudgetError(
                f"no room for task {task_id!r}: it takes {nbytes} bytes, more than the {room} that tasks "
                f"which come later may take on a device; set {LATE_VARIABLE} higher"
            )

    def discard(self, path: str) -> None:
        """Let go of a task from memory, and of what the host keeps of its blends."""
        self._in_memory.pop(path, None)
        self.drop(path)
        digest = path.rpartition("@")[2]
        for kept in [p for p in (*self._images.held, *self._staging) if is_made_of(p, digest)]:
            self._discard(kept)

    def _reclaim(self, path: str) -> None:
        """Have who comes back wait for the thread that reads, but not for what went wrong without him."""
        if path in self._given_up:
            self._given_up.discard(path)
            if _failed(self._staging[path]):
                del self._staging[path]

    def _sweep(self) -> None:
        """Put aside what was staged and is not asked for any more, and let go of what was given up."""
        for name in list(self._given_up):
            self._discard(name)
        done = [n for n, future in self._staging.items() if future.done()]
        for name in [n for n in done if n not in self._given_up][:-_UNCLAIMED]:
            future = self._staging.pop(name)
            if future.exception() is None:
                self._keep(name, future.result())

    def _keep(self, path: str, staged: _Staged) -> None:
        for gone in self._images.put(path, staged):
            self._let_go(gone.bases)

    def place(self, path: TaskPath) -> int:
        """Have a task on the device: 0, or how many bytes are not free for it there.

        Raises:
            CheckpointError: the checkpoint on disk no longer holds these weights, or is damaged.
            BlendError: the path is a blend's, of tasks that cannot be blended.
            ModelMismatchError: the served model cannot take the task.
        """
        name = str(path)
        if name in self._placed:
            return 0
        staged = self._read_now(path)
        if self._is_stale(staged) or self._is_held_back(staged):
            self._discard(name)
            raise _being_exchanged(path)
        if not self._place(name, staged):
            return staged.image.size
        self._staging.pop(name, None)
        self._keep(name, staged)
        return 0

    def _read_now(self, path: TaskPath) -> _Staged:
        """A task on the host, which is waited for; errors as of ``place``."""
        name = str(path)
        while True:
            staged = self._images.held.get(name)
            if staged is None:
                if self.stage(path) is None:
                    raise _being_exchanged(path)
                try:
                    staged = self._staging[name].result()
                except BaseException:
                    del self._staging[name]
                    raise
            if not self._lost_bases(staged):
                return staged
            # They may have gone while it was read. Nobody takes any while this thread waits.
            self._discard(name)

    def task(self, path: TaskPath) -> ResidentTask:
        """The task of a path, brought to the device if it is not there.

        Raises:
            MemoryBudgetError: there is no room.
            CheckpointError, ModelMismatchError: as of ``place``.
        """
        if self.place(path):
            raise MemoryBudgetError(
                f"{path}: the device has no room for it beside the tasks it holds"
            )
        return self._placed[str(path)].task

    def forget(self, path: str) -> None:
        """Give up a task's place on the device, if it has one, and bases that nothing needs."""
        placed = self._placed.pop(path, None)
        if placed is not None:
            self._arena.free(placed.block)
            if placed.memory is not None:
                assert self.direct is not None
                self.direct.count(-placed.memory)
            self._uses_there -= Counter(placed.bases)
            self._let_go(placed.bases)

    def drop(self, path: str) -> None:
        """Give up a task's place on the device and what is staged or kept of it on the host."""
        self.forget(path)
        self._discard(path)

    def _discard(self, path: str) -> None:
        """Give up what is staged or kept of a task on the host."""
        for image in self._images.pop(path):
            self._let_go(image.bases)
        future = self._staging.get(path)
        if future is None:
            return
        if not future.cancel() and not future.done():
            self._given_up.add(path)
            return
        del self._staging[path]
        self._given_up.discard(path)
        if not future.cancelled() and future.exception() is None:
            self._let_go(future.result().bases)

    def tidy(self) -> None:
        """Drop what the host keeps of tasks that the served folder has no more."""
        self._sweep()
        for path in [path for path in self._images.held if self._is_gone(path)]:
            for image in self._images.pop(path):
                self._let_go(image.bases)

    def _is_gone(self, path: str) -> bool:
        """Whether the served folder had a task and has it no more, so that nobody asks for it again."""
        if self.state is None or path in self.state.tasks:
            return False
        parsed = parse_task_path(path)
        return parsed is not None and parsed.checkpoint == self.state.checkpoint.path.absolute()

    # --- what it takes ---

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held on the device; what several share is counted once."""
        direct = 0 if self.direct is None else self.direct.memory().total
        return direct + self.materialized_nbytes

    @property
    def direct_tasks(self) -> int:
        """Tasks on the device that run direct."""
        return sum(placed.memory is not None for placed in self._placed.values())

    def nbytes_of(self, path: str) -> int:
        """Bytes of a task on the device, without what it shares."""
        return self._placed[path].nbytes

    @property
    def materialized_nbytes(self) -> int:
        """Bytes of what is not held for direct tasks."""
        bases = sum(held.nbytes for held in self._bases.values())
        return bases + sum(p.nbytes for p in self._placed.values() if p.memory is None)

    @property
    def arena_nbytes(self) -> int:
        """Bytes of the device's memory that tasks may fill."""
        return self._arena.nbytes

    @property
    def arena_used(self) -> int:
        """Bytes of it that tasks and bases take, rounded up as blocks are."""
        return self._arena.used

    @property
    def host_nbytes(self) -> int:
        """Bytes of images on the host."""
        return self._images.nbytes

    @property
    def host_limit(self) -> int:
        """Bytes that they may take."""
        return self._images.limit

    @property
    def host_evictions(self) -> int:
        """Images that gave way to others on the host so far."""
        return self._images.evictions

    def host_tasks(self, most: int) -> tuple[int, list[str]]:
        """How many tasks are on the host alone, and names of so many of them, the last used first."""
        held = self._images.held
        both = sum(path in held for path in self._placed)
        alone = (image for path, image in reversed(held.items()) if path not in self._placed)
        return len(held) - both, [staged.image.tree.task_id for staged in islice(alone, most)]

    # --- from disk to host ---

    def _read_path(self, path: TaskPath) -> _Staged:
        """Read a task, from memory, the served state or whatever its folder holds; in any thread."""
        in_memory = self._in_memory.get(str(path))
        if in_memory is not None:
            return self._read_checked(in_memory, next(iter(in_memory.tasks)))
        published = list(self._in_memory.values())
        if path.checkpoint == MEMORY:
            blended = blended_checkpoint(None, path, published, self._engine_name)
            if blended is not None:
                return self._read_checked(blended, blended.task_id)
            raise CheckpointReplacedError(
                f"{path}: this version of the task was published again or unpublished; use the request "
                "that vllm_vlora.publish returned last"
            )
        state = self.state
        task_id = None if state is None else state.tasks.get(str(path))
        if state is not None and task_id is not None:
            try:
                return self._read_checked(state.checkpoint, task_id)
            except CheckpointError:
                # Another state may lie there by now, which may have the same task.
                if not state.checkpoint.was_replaced:
                    raise
        if not path.checkpoint.is_absolute():
            # A client may have made it up; what is no path could be the name of a repository.
            raise CheckpointError(f"{path}: not a path from the root; give the task's whole path")
        checkpoint = Checkpoint.open(pinned(path.checkpoint, self._pin))
        blended = blended_checkpoint(checkpoint, path, published, self._engine_name)
        if blended is not None:
            return self._read_checked(blended, blended.task_id)
        for task_id in checkpoint.tasks:
            if task_file(task_id) == path.file and checkpoint.digest(task_id) == path.digest:
                own = task_path(checkpoint, task_id)
                if own != path:
                    raise CheckpointError(f"{path}: give the task's own path, {own}")
                return self._read_checked(checkpoint, task_id)
        raise CheckpointReplacedError(
            f"{path.checkpoint / path.file} was published again with other weights; make a new "
            "request with vllm_vlora.lora_request"
        )

    def _read_checked(self, checkpoint: Checkpoint, task_id: str) -> _Staged:
        # Once: the thread that has the arena may exchange them, or give that up, while this one reads.
        following, bases = self._next, None
        if following is not None and following.digest == checkpoint.basis_digest:
            bases = following.bases if following.held_back else None
        obstacles = self._obstacles(checkpoint, [task_id], bases)
        to_come = self._to_stand_on(checkpoint, task_id, following)
        return self._read(checkpoint, task_id, obstacles[task_id], to_come)

    def _obstacles(
        self, checkpoint: Checkpoint, task_ids: Iterable[str], bases: Bases | None = None
    ) -> dict[str, str | None]:
        """Task id -> why it is materialized, None when it runs direct; checked against the model.

        Args:
            bases: as if the layers held these.
        """
        obstacles = {task_id: self._obstacle(checkpoint, task_id, bases) for task_id in task_ids}
        for runs_direct in (True, False):
            chosen = [task for task, why in obstacles.items() if (why is None) == runs_direct]
            self._check(checkpoint, chosen, runs_direct)
        return obstacles

    def _obstacle(
        self, checkpoint: Checkpoint, task_id: str, bases: Bases | None = None
    ) -> str | None:
        if self.direct is None:
            return "direct mode is off"
        why = self.direct.obstacle(checkpoint, task_id, bases)
        if why is not None and self._only_direct:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} cannot run direct: {why}; use "
                "VLLM_VLORA_MODE=auto, which materializes such tasks"
            )
        return why

    def _read(
        self, checkpoint: Checkpoint, task_id: str, obstacle: str | None, to_come: str = ""
    ) -> _Staged:
        """A task in its form; ``to_come``: on which bases one that is materialized will run direct."""
        if obstacle is None:
            return self._read_direct(checkpoint, task_id)
        bases = self._needed(checkpoint, task_id)
        self._use(bases)
        try:
            staged = self._read_sources(checkpoint, task_id, obstacle, bases)
            return replace(staged, stands_on=to_come)
        except BaseException:
            self._unused.append(bases)
            raise

    def _read_direct(self, checkpoint: Checkpoint, task_id: str) -> _Staged:
        path = self.direct
        assert path is not None
        stored = self._load(checkpoint, task_id, path.narrow_rows)
        direct = path.describe(stored, torch.device("cpu"))
        memory = task_memory(direct)
        task = self._resident(checkpoint, task_id, {}, {}, direct)
        records = direct.records, ADDRESS_FIELDS
        image = make_image(task, (), records, self._pins, self._stays(checkpoint))
        joint = any(segment.is_joint for segment in checkpoint.record(task_id).segments)
        stands_on = checkpoint.basis_digest if joint else ""
        return _Staged(image, frozenset(), {}, memory, stands_on)

    def _read_sources(
        self, checkpoint: Checkpoint, task_id: str, obstacle: str, bases: frozenset[BasisKey]
    ) -> _Staged:
        narrow = self._narrow_rows and checkpoint.has_narrow_rows([task_id])
        stored = self._load(checkpoint, task_id, narrow)
        # At one moment: the thread that has the arena may take some away.
        there = dict(self._bases)
        beside = {key: there[key].basis for key in bases if key in there}
        brought = self._read_bases(checkpoint, bases - beside.keys())
        held = {**beside, **{key: image.tree for key, image in brought.items()}}
        digest = checkpoint.basis_digest
        sources = {
            self._engine_name(name): side_sources(
                self._lay_out(module), held.get((digest, name, module.representation))
            )
            for name, module in stored.modules.items()
        }
        # A copy of the base's embedding is larger than many tasks together, and nothing reads it.
        extra = {name: t for name, t in stored.extra.items() if not is_base_copy(name)}
        task = self._resident(checkpoint, task_id, sources, extra, None, obstacle)
        leave = [*extra.values(), *(t for basis in held.values() for t in _basis_tensors(basis))]
        image = make_image(task, leave, pin=self._pins, stay=self._stays(checkpoint))
        return _Staged(image, bases, brought, None, beside=beside)

    def _to_stand_on(
        self, checkpoint: Checkpoint, task_id: str, following: _NextBases | None
    ) -> str:
        """Digest of the bases to come, if a task that is materialized is to run direct on them."""
        if self.direct is None or following is None or following.bases is None:
            return ""
        if self.direct.obstacle(checkpoint, task_id, following.bases) is not None:
            return ""
        return following.digest

    def _resident(self, checkpoint: Checkpoint, task_id: str, *parts: Any) -> ResidentTask:
        record = checkpoint.record(task_id)
        # Not by the id: a blend's file has another name.
        path = TaskPath(checkpoint.path.absolute(), record.file, checkpoint.digest(task_id))
        return ResidentTask(task_id, str(path), record.max_rank, *parts)

    @property
    def _pins(self) -> bool:
        return self._device.type == "cuda"

    def _stays(self, checkpoint: Checkpoint) -> bool:
        """Whether a task is copied to the device from where it is: a GPU wants it pinned."""
        return checkpoint.is_in_memory and not self._pins

    def _needed(self, checkpoint: Checkpoint, task_id: str) -> frozenset[BasisKey]:
        """The bases that a task which is materialized needs here."""
        segments = checkpoint.record(task_id).segments
        names = [(checkpoint.modules[s.module].name, s) for s in segments if not s.is_private]
        return frozenset(
            (checkpoint.basis_digest, name, segment.representation)
            for name, segment in names
            if self._is_here(name)
        )

    def _read_bases(
        self, checkpoint: Checkpoint, keys: Collection[BasisKey]
    ) -> dict[BasisKey, Image[Basis]]:
        found = {}
        for name, kind, basis in checkpoint.shared() if keys else ():
            key = checkpoint.basis_digest, name, kind
            if key in keys:
                laid_out = replace(basis, u=self._by_slot(basis.u))
                found[key] = make_image(laid_out, pin=self._pins)
        return found

    def _is_here(self, module: str) -> bool:
        return not self._elsewhere or self._engine_name(module) not in self._elsewhere

    def _load(self, checkpoint: Checkpoint, task_id: str, narrow: bool) -> StoredTask:
        """A task on the host, without what other pipeline ranks have."""
        stored = checkpoint.load_task(task_id, narrow=narrow)
        if not self._elsewhere:
            return stored
        here = {name: module for name, module in stored.modules.items() if self._is_here(name)}
        return replace(stored, modules=here)

    def _lay_out(self, module: StoredModule) -> StoredModule:
        if not module.is_private:
            return module
        matrices = {**module.matrices, "B": self._by_slot(module.matrices["B"])}
        return replace(module, matrices=matrices)

    def _by_slot(self, matrix: PackedMatrix) -> PackedMatrix:
        """On CPU: the matrix laid out as a slot's B is, which is several times quicker to copy from.

        Elsewhere by rows, which kernels read: from memory it comes as it is in a slot.
        """
        return matrix.by_columns() if self._device.type == "cpu" else matrix.by_rows()

    # --- from host to device ---

    def _place(self, path: str, staged: _Staged) -> bool:
        """Copy a task, and what it needs of bases, to the device; False where that has no room."""
        new = [key for key in staged.brought if key not in self._bases]
        sizes = [*(staged.brought[key].size for key in new), staged.image.size]
        blocks = self._blocks(sizes)
        if not blocks and self.leave_bases(staged.bases):
            blocks = self._blocks(sizes)
        if not blocks:
            return False
        for key, block in zip(new, blocks):
            image = staged.brought[key]
            self._bases[key] = _PlacedBasis(image.on(block.memory), block, image.nbytes)
        # Tensor by tensor: the device may have the basis from another's image, which tasks that are read
        # side by side each make, and where in it a tensor lies is as memory was free.
        shared = [
            Span.between(host, there)
            for key, image in staged.brought.items()
            for host, there in zip(
                _basis_tensors(image.tree), _basis_tensors(self._bases[key].basis)
            )
            if host.numel()
        ]
        task = staged.image.on(blocks[-1].memory, shared)
        if staged.memory is not None:
            assert self.direct is not None
            self.direct.count(staged.memory)
        self._use(staged.bases)
        self._uses_there.update(staged.bases)
        self._placed[path] = _Placed(
            task,
            blocks[-1],
            staged.image.nbytes,
            staged.bases,
            staged.memory,
            staged.stands_on,
        )
        return True

    def leave_bases(self, kept: Collection[BasisKey] = ()) -> bool:
        """Take the bases off the device that no task there needs; whether there were any.

        What else needs them brings them, or was read beside them and is read again.

        Args:
            kept: those that stay nevertheless.
        """
        idle = [key for key in self._bases if key not in self._uses_there and key not in kept]
        for key in idle:
            self._arena.free(self._bases.pop(key).block)
        return bool(idle)

    def _blocks(self, sizes: Sequence[int]) -> list[Block]:
        """A block of each of these sizes, or none at all where there is no room for all."""
        blocks: list[Block] = []
        for size in sizes:
            block = self._allocate(size)
            if block is None:
                for taken in blocks:
                    self._arena.free(taken)
                return []
            blocks.append(block)
        return blocks

    def _allocate(self, nbytes: int) -> Block | None:
        grow = self._arena.allocate_growing if self._growing else self._arena.allocate
        return grow(nbytes)

    def _use(self, bases: frozenset[BasisKey]) -> None:
        """Count a use of each basis, which then stays on the device if it is there."""
        with self._using:
            self._uses.update(bases)

    def _let_go(self, bases: frozenset[BasisKey]) -> None:
        """Take back a use of each basis; those that nothing needs leave the device."""
        with self._using:
            self._unused.append(bases)
            while self._unused:
                self._uses.subtract(self._unused.popleft())
            for key in [key for key, uses in self._uses.items() if uses <= 0]:
                del self._uses[key]
                placed = self._bases.pop(key, None)
                if placed is not None:
                    self._arena.free(placed.block)


def _speakers(checkpoint: Checkpoint, tasks: set[str]) -> set[str]:
    """Of tasks with the same segments one, which speaks for all, and all that carry more than LoRA."""
    found: set[str] = set()
    for _, alike in checkpoint.alike():
        asked = [task for task in alike if task in tasks]
        found.update(asked[:1])
    known = checkpoint.tasks
    # Of an index all at once: one by one 100,000 take .7 s, and so .1.
    listed = entries(known if isinstance(known, TaskTable) else {t: known[t] for t in tasks})
    found.update(task for task, entry in listed if entry.carries and task in tasks)
    return found


def _being_exchanged(path: TaskPath) -> TaskLoadError:
    return TaskLoadError(f"{path}: its basis is being exchanged; ask again")


def _result(future: Future[_Staged] | None) -> _Staged | None:
    """What was read, if that is done and went well."""
    if future is None or not future.done() or _failed(future):
        return None
    return future.result()


def _failed(future: Future[_Staged]) -> bool:
    """Whether reading is done and went wrong."""
    return future.done() and future.exception() is not None


def _basis_tensors(basis: Basis) -> Iterable[torch.Tensor]:
    yield from basis.u.parts.values()
    yield from basis.v.parts.values()
