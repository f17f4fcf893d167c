"""The resident store: in which form it holds each task, and what that takes."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_world import STORED, TASKS, Store, build, make_path
from slow_images import hold_images

from vllm_vlora import snapshots
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import (
    CheckpointError,
    CheckpointReplacedError,
    MemoryBudgetError,
    ModelMismatchError,
    TaskLoadError,
)
from vllm_vlora.plugin import resident
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.identity import TaskPath, task_path
from vllm_vlora.plugin.images import make_image
from vllm_vlora.plugin.resident import ResidentStore, _HostImages
from vllm_vlora.plugin.settings import Budget
from vllm_vlora.quantize import unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.stored import Basis
from vllm_vlora.triton_kernels.direct import ADDRESS_FIELDS, SliceTask


def test_a_task_is_held_in_one_form(tmp_path: Path) -> None:
    copies = {"base_model.model.lm_head.base_layer.weight": torch.ones(2, 3)}
    checkpoint = build(tmp_path / "ck", STORED, basis="nf4", extra={"head": copies})
    made = Store()
    store = made.store
    store.preload(checkpoint.path, make_path)
    assert made.checked == [(list(TASKS), True), (["head", "plain head"], False)]
    assert [task.task_id for task in store.tasks()] == list(STORED)
    assert len(store) == len(STORED)
    for task in store.tasks():
        if task.task_id in TASKS:
            assert task.direct is not None
            assert (task.sources, task.extra, task.obstacle) == ({}, {}, "")
        else:
            assert task.direct is None
            assert set(task.sources) == set(STORED[task.task_id])
            assert task.obstacle == "module lm_head is the output head"
            # Copies of the base model's weights are in the base model.
            assert task.extra == {}
    # q alone: the direct tasks read the layers' own copies of theirs.
    bases = dict(checkpoint.bases())
    q = bases["q"]
    cores, factors = 4 * 2 * (6 + 5), (2 + 1) * ((64 + 8) + (64 + 8))
    assert store.materialized_nbytes == q.u.nbytes + q.v.nbytes + cores + factors
    assert store.direct is not None
    memory = store.direct.memory()
    assert store.nbytes == store.materialized_nbytes + (
        memory.bases + memory.cores + memory.factors + memory.table
    )


def test_without_a_path_every_task_is_materialized(tmp_path: Path) -> None:
    made = Store()
    made.store.preload(build(tmp_path / "ck", STORED).path)
    assert made.checked == [([], True), (list(STORED), False)]
    assert {task.obstacle for task in made.store.tasks()} == {"direct mode is off"}
    assert all(task.direct is None and task.sources for task in made.store.tasks())
    assert made.store.nbytes == made.store.materialized_nbytes > 0


def test_direct_tasks_alone_need_no_packed_basis(tmp_path: Path) -> None:
    made = Store(only_direct=True)
    made.store.preload(build(tmp_path / "ck").path, make_path)
    assert made.checked == [(list(TASKS), True), ([], False)]
    assert made.store.materialized_nbytes == 0


def test_direct_mode_refuses_what_auto_materializes(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", STORED)
    made = Store(only_direct=True)
    with pytest.raises(ModelMismatchError) as caught:
        made.store.preload(checkpoint.path, make_path)
    assert str(caught.value) == (
        f"{checkpoint.path}: task 'head' cannot run direct: module lm_head is the output head; use "
        "VLLM_VLORA_MODE=auto, which materializes such tasks"
    )
    assert made.checked == []
    assert len(made.store) == 0


def test_a_late_task_on_another_basis_is_materialized_from_it(tmp_path: Path) -> None:
    made = Store()
    store = made.store
    store.preload(build(tmp_path / "ck").path, make_path)
    assert store.direct is not None
    memory, before = store.direct.memory(), store.nbytes
    later = build(tmp_path / "later", seed=1)
    task = store.task(task_path(later, "joint"))
    assert task.direct is None
    assert task.obstacle == "q has another basis than the layers hold"
    assert made.checked[-2:] == [([], True), (["joint"], False)]
    bases = dict(later.bases())
    for name in TASKS["joint"]:
        stored = later.load_task("joint").modules[name]
        a, b = decode(stored, bases[name])
        source_a, source_b = task.sources[name]
        torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
    assert store.direct.memory() == memory
    assert store.nbytes == before + store.materialized_nbytes
    # A private one runs direct, whatever the basis.
    private = store.task(task_path(later, "private"))
    assert private.direct is not None
    assert store.direct.memory().factors > memory.factors
    assert store.task(task_path(later, "private")) is private


def test_forgetting_late_tasks_gives_all_their_bytes_back(tmp_path: Path) -> None:
    made = Store()
    store = made.store
    first = build(tmp_path / "ck", STORED)
    store.preload(first.path, make_path)
    before, held = store.nbytes, len(store)
    later = build(tmp_path / "later", STORED, seed=1)
    paths = {name: task_path(later, name) for name in STORED}
    for path in paths.values():
        store.task(path)
    assert {store.task(paths[name]).direct is None for name in STORED} == {True, False}
    with_all = store.nbytes
    # Of the checkpoint's bases each is held as long as one task needs it.
    bases = dict(later.bases())
    store.forget(str(paths["joint"]))
    assert before < store.nbytes < with_all - bases["k"].u.nbytes
    again = store.task(paths["joint"])
    assert store.nbytes == with_all
    for name in TASKS["joint"]:
        a, b = decode(later.load_task("joint").modules[name], bases[name])
        source_a, source_b = again.sources[name]
        torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
    for path in paths.values():
        store.forget(str(path))
        store.forget(str(path))
        assert store.held(str(path)) is None
    assert (store.nbytes, len(store)) == (before, held)


def test_what_the_engine_started_with_gives_way_and_comes_back_as_well(tmp_path: Path) -> None:
    store = Store().store
    first = build(tmp_path / "ck", STORED)
    store.preload(first.path, make_path)
    before, full = store.nbytes, _numbers(store)
    for name in STORED:
        store.forget(str(task_path(first, name)))
    assert len(store) == 0
    assert store.materialized_nbytes == 0
    for name in STORED:
        store.task(task_path(first, name))
    assert store.nbytes == before
    assert _numbers(store) == full


def _numbers(store: ResidentStore) -> dict[str, dict[str, list[float]]]:
    """The values of every task on the device, as the kernels would read them."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in store.tasks():
        values = found.setdefault(task.task_id, {})
        for name, (a, b) in task.sources.items():
            values[name] = (b.to_dense().T @ a.to_dense()).flatten().tolist()
        for number, part in task.direct.slices.items() if task.direct else ():
            _check_record(task.direct.records[number], part)  # type: ignore[union-attr]
            if part.core is not None:
                values[f"core {number}"] = part.core.flatten().tolist()
            if part.a is not None and part.b is not None:
                values[f"a {number}"] = unpack(part.a).flatten().tolist()
                values[f"b {number}"] = unpack(part.b).flatten().tolist()
    return found


def _check_record(record: torch.Tensor, part: SliceTask) -> None:
    """A record's addresses are those of the tensors that the task has now."""
    places = [
        *([part.core] if part.core is not None else []),
        *(p for m in (part.a, part.b) if m is not None for p in m.parts.values()),
    ]
    addresses = {address for field in ADDRESS_FIELDS if (address := int(record[field]))}
    assert addresses == {tensor.data_ptr() for tensor in places if tensor.numel()}


# --- budgets ---------------------------------------------------------------------------------------


def _of_one_size(folder: Path, count: int = 6, seed: int = 0) -> Checkpoint:
    tasks = {f"t{i}": {"q": ("private", 3), "o": ("private", 5)} for i in range(count)}
    return build(folder, tasks, seed=seed)


def _block_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of the device that each of ``_of_one_size`` takes."""
    store = Store().store
    store.preload(checkpoint.path, make_path)
    return store.arena_used // len(store)


def test_as_many_tasks_as_the_budget_holds_are_loaded_at_the_start(tmp_path: Path) -> None:
    checkpoint = _of_one_size(tmp_path / "ck")
    size = _block_nbytes(checkpoint)
    store = Store(budget=Budget(device=4 * size + size // 2, late=0, host=0)).store
    store.preload(checkpoint.path, make_path)
    assert [task.task_id for task in store.tasks()] == ["t0", "t1", "t2", "t3"]
    assert store.served() == [(task, str(task_path(checkpoint, task))) for task in checkpoint.tasks]
    fifth = task_path(checkpoint, "t4")
    assert store.place(fifth) > 0
    assert store.held(str(fifth)) is None
    with pytest.raises(MemoryBudgetError, match="no room"):
        store.task(fifth)
    store.forget(str(task_path(checkpoint, "t1")))
    taken = store.arena_nbytes
    assert store.place(fifth) == 0
    assert store.arena_nbytes == taken, "nothing more is taken from the device after the start"


@pytest.mark.parametrize("host", [0, 1 << 20])
def test_whatever_comes_and_goes_is_what_the_checkpoint_holds(tmp_path: Path, host: int) -> None:
    """Tasks of every form, more than fit, in an order that moves each to places of others."""
    checkpoint = build(tmp_path / "ck", STORED)
    later = build(tmp_path / "later", STORED, seed=1)
    whole = Store().store
    whole.preload(checkpoint.path, make_path)
    for name in STORED:
        whole.task(task_path(later, name))
    expected = {task.path: numbers for task, numbers in zip(whole.tasks(), _by_task(whole))}
    # Some are larger than all of the budget, with their bases.
    store = Store(budget=Budget(device=whole.arena_used // 4, late=2048, host=host)).store
    store.preload(checkpoint.path, make_path)
    random, seen = Random(0), set()
    paths = [task_path(ck, name) for ck in (checkpoint, later) for name in STORED]
    for _ in range(200):
        path = random.choice(paths)
        while store.place(path) and len(store):
            store.forget(random.choice(store.tasks()).path)
        if store.held(str(path)) is not None:
            seen.add(str(path))
        for task, numbers in zip(store.tasks(), _by_task(store)):
            assert numbers == expected[task.path]
        assert store.host_nbytes <= host
    assert len(seen) > len(STORED)
    for path in paths:
        store.drop(str(path))
    assert (store.arena_used, store.host_nbytes, len(store)) == (0, 0, 0)


def _by_task(store: ResidentStore) -> list[dict[str, list[float]]]:
    found = []
    for task in store.tasks():
        one: Any = SimpleNamespace(tasks=lambda task=task: [task])
        found.append(_numbers(one)[task.task_id])
    return found


def test_a_task_that_gave_way_comes_back_from_the_host_though_its_file_is_gone(
    tmp_path: Path,
) -> None:
    checkpoint = _of_one_size(tmp_path / "ck")
    size = _block_nbytes(checkpoint)
    store = Store(budget=Budget(device=0, late=size, host=3 * size)).store
    store.preload(checkpoint.path, make_path)
    paths = {name: task_path(checkpoint, name) for name in checkpoint.tasks}
    for name in ("t0", "t1", "t2", "t3"):
        store.place(paths[name])
        store.forget(str(paths[name]))
    for file in (checkpoint.path / "tasks").iterdir():
        file.unlink()
    for name in ("t1", "t3", "t2"):
        assert store.stage(paths[name])
        assert store.task(paths[name]).task_id == name
        store.forget(str(paths[name]))
    with pytest.raises(CheckpointError, match="the file is missing"):
        store.task(paths["t0"])


def test_staging_is_beside_everything_and_errors_come_when_it_is_placed(tmp_path: Path) -> None:
    checkpoint = _of_one_size(tmp_path / "ck")
    store = Store(budget=Budget(device=0, late=1 << 20, host=0)).store
    store.preload(checkpoint.path, make_path)
    good, bad = (task_path(checkpoint, name) for name in ("t0", "t1"))
    file = bad.checkpoint / bad.file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    deadline = time.monotonic() + 30
    while not (store.stage(good) and store.stage(bad)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(store) == 0, "only ``place`` touches the device"
    assert store.place(good) == 0
    with pytest.raises(CheckpointError):
        store.place(bad)
    file.write_bytes(whole)
    assert store.task(bad).task_id == "t1", "what failed is tried again"


def test_bases_stay_while_what_is_staged_needs_them(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", dict.fromkeys(("a", "b"), TASKS["joint"]))
    store = Store(budget=Budget(device=1 << 20, late=1 << 20, host=0)).store
    store.preload(checkpoint.path)
    paths = {name: task_path(checkpoint, name) for name in ("a", "b")}
    full = _numbers(store)
    store.forget(str(paths["b"]))
    while not store.stage(paths["b"]):
        time.sleep(0.001)
    # Staged beside a's bases on the device; another task may not get their place now.
    store.forget(str(paths["a"]))
    assert store.task(paths["b"]).task_id == "b"
    assert _numbers(store)["b"] == full["b"]
    store.forget(str(paths["b"]))
    assert store.arena_used == 0


def _check_joint(store: ResidentStore, checkpoint: Checkpoint, task_id: str) -> None:
    """A task that is materialized has the weights of the checkpoint."""
    task, bases = store.task(task_path(checkpoint, task_id)), dict(checkpoint.bases())
    for name, module in checkpoint.load_task(task_id).modules.items():
        a, b = decode(module, bases.get(name))
        source_a, source_b = task.sources[name]
        torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)


def _staged(store: ResidentStore, path: TaskPath) -> None:
    store.stage(path)
    store._staging[str(path)].result(30)


def _room_of(checkpoint: Checkpoint, task_id: str) -> int:
    """Bytes that a task takes on a device with its bases."""
    store = Store(budget=Budget(device=0, late=1 << 20, host=0)).store
    store.seal()
    store.task(task_path(checkpoint, task_id))
    return store.arena_used


@pytest.mark.parametrize("host", [0, 1 << 20])
def test_bases_that_only_the_host_needs_give_way_to_a_task(tmp_path: Path, host: int) -> None:
    tasks = dict.fromkeys(("a", "b"), TASKS["joint"])
    one, *others = (build(tmp_path / f"{n}", tasks, seed=n) for n in range(3))
    room = _room_of(one, "a")
    store = Store(budget=Budget(device=0, late=room + room // 2, host=host)).store
    store.seal()
    a, b = (task_path(one, name) for name in ("a", "b"))
    _check_joint(store, one, "a")
    _staged(store, b)  # Beside the bases that a brought.
    store.forget(str(a))
    for other in others:
        _check_joint(store, other, "a")
        store.forget(str(task_path(other, "a")))
    for task in ("b", "a", "b"):
        _check_joint(store, one, task)
    # Both are on the device now, and keep what they stand on.
    assert store.place(task_path(others[0], "a")) > 0
    assert len(store) == 2
    for task in ("a", "b"):
        _check_joint(store, one, task)
    for path in (a, b, *(task_path(other, "a") for other in others)):
        store.drop(str(path))
    assert (store.arena_used, store.host_nbytes, len(store)) == (0, 0, 0)


def test_a_task_that_was_read_beside_bases_which_left_is_read_again(tmp_path: Path) -> None:
    """As at sleep level 2, which keeps nothing of the device's memory."""
    checkpoint = build(tmp_path / "ck", dict.fromkeys(("a", "b", "c"), TASKS["joint"]))
    store = Store(budget=Budget(device=0, late=1 << 20, host=1 << 20)).store
    store.seal()
    paths = [task_path(checkpoint, name) for name in checkpoint.tasks]
    for path in paths[:2]:
        store.task(path)
    _staged(store, paths[2])
    for path in paths[:2]:
        store.forget(str(path))
    store.leave_bases()
    assert store.arena_used == 0
    for chunk in store._arena._chunks:
        chunk.fill_(0x7F)
    # The second stood beside what the first brought, and so did the third, which was only staged.
    assert [store.stage(path) for path in paths] == [True, False, False]
    for name in ("c", "b", "a"):
        _check_joint(store, checkpoint, name)
    for path in paths:
        store.drop(str(path))
    assert store.arena_used == 0


def test_a_task_is_read_again_where_bases_left_while_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path / "ck", dict.fromkeys(("a", "b"), TASKS["joint"]))
    store = Store(budget=Budget(device=0, late=1 << 20, host=0)).store
    store.seal()
    a, b = (task_path(checkpoint, name) for name in checkpoint.tasks)
    store.task(a)
    begun, go_on = hold_images(monkeypatch)
    store.stage(b)
    assert begun.wait(30)
    store.forget(str(a))
    store.leave_bases()
    go_on.set()
    for chunk in store._arena._chunks:
        chunk.fill_(0x7F)
    _check_joint(store, checkpoint, "b")


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_had_the_task_fails_and_is_read_once_when_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path / "ck")
    store = Store(budget=Budget(device=0, late=1 << 20, host=0)).store
    store.seal()
    path, read = task_path(checkpoint, "joint"), list[str]()
    load_task = Checkpoint.load_task

    def load(self: Checkpoint, task: str, *args: Any, **kwargs: Any) -> Any:
        read.append(task)
        return load_task(self, task, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "load_task", load)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _no_thread)
        for fetched in (False, True):
            assert store.stage(path, fetched), "what went wrong is told by ``place``"
            with pytest.raises(
                TaskLoadError, match=r"no thread to read it .can't start new thread"
            ):
                store.place(path)
    for fetched in (False, True):
        assert store.stage(path, fetched) is False
        assert store.place(path) == 0
        store.drop(str(path))
        # Done by the pool's one thread after whatever is left of what failed.
        pool = store._fetchers if fetched else store._readers
        pool.submit(int).result(30)
    assert read == ["joint", "joint"]
    assert store.arena_used == 0


def test_bases_that_no_thread_can_read_are_not_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store().store
    store.preload(build(tmp_path / "ck").path, make_path)
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    store.serve(State(build(tmp_path / "next", seed=1)))
    report = store.bases([], [])
    assert report.wanted
    assert "can't start new thread" in report.refused


def _updates(checkpoint: Checkpoint, task_id: str) -> dict[str, torch.Tensor]:
    bases = dict(checkpoint.bases())
    stored = checkpoint.load_task(task_id).modules
    factors = {name: decode(module, bases.get(name)) for name, module in stored.items()}
    return {name: b @ a for name, (a, b) in factors.items()}


def test_an_image_of_a_task_that_was_published_again_answers_for_its_own_weights_alone(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "ck"
    before = build(folder)
    store = Store(budget=Budget(device=0, late=1 << 20, host=1 << 20)).store
    store.preload(folder)
    updates = {}
    for name in TASKS:
        path = task_path(before, name)
        updates[path] = _updates(before, name)
        store.place(path)
        store.forget(str(path))
    folder.rename(tmp_path / "gone")
    after = build(folder, seed=1)
    store.serve(State(after))
    old = list(updates)
    for name in TASKS:
        updates[task_path(after, name)] = _updates(after, name)
    assert len(updates) == 2 * len(TASKS)
    # From the host those of before, which requests in flight name; from disk those of now.
    for path, wanted in updates.items():
        for module, (source_a, source_b) in store.task(path).sources.items():
            got = source_b.to_dense().T @ source_a.to_dense()
            torch.testing.assert_close(got, wanted[module], msg=f"{path}: {module}")
        store.forget(str(path))
    # Once nobody can ask for them any more nothing is kept of them.
    store.tidy()
    assert store.host_tasks(9)[0] == len(TASKS)
    for path in old:
        with pytest.raises(CheckpointReplacedError):
            store.task(path)


@pytest.mark.parametrize("basis", ["nf4", "float32"])
def test_tasks_that_are_read_side_by_side_share_one_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, basis: str
) -> None:
    """Each brings what no device has yet, wherever in memory it was read to, and one of it is kept."""
    names = ("a", "b", "c")
    checkpoint = build(tmp_path / "ck", dict.fromkeys(names, TASKS["joint"]), basis=basis)
    orders = itertools.cycle([1, -1])

    def image_of_moved(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tree, Basis):
            tree = _laid_out(tree, next(orders))
        return make_image(tree, *args, **kwargs)

    monkeypatch.setattr(resident, "make_image", image_of_moved)
    store = Store(budget=Budget(device=0, late=1 << 20, host=1 << 20)).store
    store.preload(checkpoint.path)
    paths = [task_path(checkpoint, name) for name in names]
    # Then from the host's images, of which the last one's basis is now the first to come.
    for order in (paths, paths[::-1]):
        while sum(store.stage(path) is True for path in paths) < len(paths):
            time.sleep(0.001)
        for path in order:
            assert store.place(path) == 0
        bases = dict(checkpoint.bases())
        for task in store.tasks():
            for name, module in checkpoint.load_task(task.task_id).modules.items():
                a, b = decode(module, bases[name])
                source_a, source_b = task.sources[name]
                torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
        for path in paths:
            store.forget(str(path))


@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_goes_and_comes_back_while_threads_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each reading ends, well or not, at a moment that is chosen among all other events."""
    checkpoint = build(tmp_path / "ck", dict.fromkeys("abcdef", TASKS["joint"]))
    store = Store(budget=Budget(device=0, late=1 << 20, host=2048)).store
    store.preload(checkpoint.path)
    for name in checkpoint.tasks:
        store.drop(str(task_path(checkpoint, name)))
    ends: queue.SimpleQueue[bool] = queue.SimpleQueue()
    load_task = Checkpoint.load_task

    def load(self: Checkpoint, task: str, *args: Any, **kwargs: Any) -> Any:
        if not ends.get(timeout=30):
            raise CheckpointError(f"{task} is damaged")
        return load_task(self, task, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "load_task", load)
    random, paths = Random(seed), [task_path(checkpoint, name) for name in checkpoint.tasks]
    seen: Counter[str] = Counter()
    for _ in range(400):
        event, path = random.choice(["ask", "ask", "ask", "go", "end", "end"]), random.choice(paths)
        reading = [one for one in store._staging.values() if not one.done()]
        # Two threads read, and are at it.
        deadline = time.monotonic() + 30
        while sum(one.running() for one in reading) < min(2, len(reading)):
            assert time.monotonic() < deadline
            time.sleep(0.0001)
        if event == "end":
            if reading:
                ends.put(random.random() < 0.7)
                assert wait(reading, 30, FIRST_COMPLETED).done
        elif event == "go":
            random.choice([store.drop, store.forget])(str(path))
        elif store.stage(path):
            try:
                assert store.place(path) == 0
                seen["held"] += 1
            except CheckpointError:
                seen["failed"] += 1
                assert store.held(str(path)) is None
        if store._given_up:
            seen["given up"] += 1
        assert store._given_up <= store._staging.keys()
    assert len(seen) == 3, seen
    for path in paths:
        store.drop(str(path))
    for _ in paths:
        ends.put(True)
    for reading in list(store._staging.values()):
        reading.exception(30)
    store.tidy()
    assert not store._staging
    assert (store.arena_used, store.host_nbytes, len(store)) == (0, 0, 0)
    assert not store._given_up


def _laid_out(basis: Basis, order: int) -> Basis:
    """The same basis, with its tensors one behind the other in this order."""
    parts = [p for matrix in (basis.u, basis.v) for p in matrix.parts.values()][::order]
    room = torch.empty(sum(-(-p.nbytes // 16) * 16 for p in parts), dtype=torch.uint8)
    moved, end = {}, 0
    for part in parts:
        moved[part.data_ptr()] = room[end : end + part.nbytes].view(part.dtype).view(part.shape)
        moved[part.data_ptr()].copy_(part)
        end += -(-part.nbytes // 16) * 16
    u, v = (
        replace(m, parts={n: moved[p.data_ptr()] for n, p in m.parts.items()})
        for m in (basis.u, basis.v)
    )
    return replace(basis, u=u, v=v)


def test_a_load_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    made = Store()
    made.store.preload(build(tmp_path / "ck").path, make_path)
    before = made.store.nbytes
    later = build(tmp_path / "later", seed=1)
    path = task_path(later, "joint")
    file = path.checkpoint / path.file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        made.store.task(path)
    made.store.forget(str(path))
    assert made.store.nbytes == before


def test_a_path_that_a_client_made_up_is_refused_and_nothing_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path / "ckpt")
    own = task_path(checkpoint, "one")
    store = Store().store

    def ask(*args: object, **kwargs: object) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(snapshots.huggingface_hub, "snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    for folder in ("org/name", "ckpt", "~/ckpt", ".", "org/name@main"):
        with pytest.raises(CheckpointError, match="not a path from the root"):
            store.task(replace(own, checkpoint=Path(folder)))
    for made_up in (checkpoint.path / ".." / "ckpt", checkpoint.path / "x" / ".."):
        (checkpoint.path / "x").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="give the task's own path"):
            store.task(replace(own, checkpoint=made_up))
    for name in ("\0", "x" * 5000):
        with pytest.raises(CheckpointError, match="no such folder"):
            store.task(replace(own, checkpoint=Path("/", name)))
    assert len(store) == 0
    assert store.task(own).task_id == "one"


def test_what_is_served_is_told_from_what_else_is_held(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    later = build(tmp_path / "later", seed=1)
    store = Store().store
    store.preload(checkpoint.path)
    store.task(task_path(later, "one"))
    assert store.served() == [(task, str(task_path(checkpoint, task))) for task in checkpoint.tasks]


def test_no_other_content_is_loaded_than_the_one_asked_for(tmp_path: Path) -> None:
    checkpoint, other = build(tmp_path / "ckpt"), build(tmp_path / "other", seed=1)
    store = Store().store
    with pytest.raises(CheckpointError, match="its content is"):
        store.preload(pinned(checkpoint.path, other.content_digest))
    store = Store().store
    store.preload(pinned(checkpoint.path, checkpoint.content_digest))
    with pytest.raises(CheckpointError, match="its content is"):
        store.task(task_path(other, "one"))
    checkpoint.path.rename(tmp_path / "copy")
    assert store.task(task_path(Checkpoint.open(tmp_path / "copy"), "one")).task_id == "one"


@pytest.mark.parametrize(
    ("pinned", "sizes", "held", "nbytes"),
    [
        (False, (100, 100, 100), "bc", 200),
        (True, (100, 65, 64, 0), "bcd", 192),
        (True, (129,), "", 0),
    ],
)
def test_pinned_images_count_as_what_their_allocator_takes(
    pinned: bool, sizes: tuple[int, ...], held: str, nbytes: int
) -> None:
    """torch rounds each block of pinned memory up to a power of two, and never gives it back."""
    images = _HostImages(250, pinned)
    for name, size in zip("abcd", sizes):
        images.put(name, SimpleNamespace(image=SimpleNamespace(size=size)))  # type: ignore[arg-type]
    assert ("".join(images.held), images.nbytes) == (held, nbytes)
    for name in held:
        images.pop(name)
    assert images.nbytes == 0


def test_images_that_gave_way_are_counted_and_those_that_were_replaced_are_not() -> None:
    images = _HostImages(250)
    for name, size in (("a", 100), ("a", 120), ("b", 100), ("c", 40), ("c", 300), ("d", 200)):
        images.put(name, SimpleNamespace(image=SimpleNamespace(size=size)))  # type: ignore[arg-type]
    # a went for the first c, b for the second, which then went itself: it is too large.
    assert (list(images.held), images.evictions) == (["d"], 2)
