"""The resident store: in which form it holds each task, and what that takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plugin_world import STORED, TASKS, Store, build, make_path

from vllm_vlora import snapshots
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import CheckpointError, ModelMismatchError
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.representations.decode import decode


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
    assert task.obstacle == "q has another basis than the engine started with"
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
    assert store.late_nbytes == 0
    later = build(tmp_path / "later", STORED, seed=1)
    paths = {name: task_path(later, name) for name in STORED}
    for path in paths.values():
        store.task(path)
        assert store.is_late(str(path))
        assert store.late_nbytes == store.nbytes - before
    assert {store.task(paths[name]).direct is None for name in STORED} == {True, False}
    with_all = store.late_nbytes
    # Of the checkpoint's bases each is held as long as one task needs it.
    bases = dict(later.bases())
    store.forget(str(paths["joint"]))
    assert store.late_nbytes == store.nbytes - before < with_all - bases["k"].u.nbytes
    again = store.task(paths["joint"])
    assert store.late_nbytes == with_all
    for name in TASKS["joint"]:
        a, b = decode(later.load_task("joint").modules[name], bases[name])
        source_a, source_b = again.sources[name]
        torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
    for path in paths.values():
        store.forget(str(path))
        store.forget(str(path))
        assert store.late_nbytes == store.nbytes - before
        assert not store.is_late(str(path))
    assert (store.nbytes, len(store), store.late_nbytes) == (before, held, 0)


def test_what_the_engine_started_with_is_never_forgotten(tmp_path: Path) -> None:
    made = Store()
    first = build(tmp_path / "ck", STORED)
    made.store.preload(first.path, make_path)
    before = made.store.nbytes
    for name in STORED:
        path = task_path(first, name)
        task = made.store.task(path)
        assert not made.store.is_late(str(path))
        made.store.forget(str(path))
        assert made.store.task(path) is task
    assert made.store.nbytes == before


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


def test_what_was_there_at_the_start_is_told_from_what_came_later(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    later = build(tmp_path / "later", seed=1)
    store = Store().store
    store.preload(checkpoint.path)
    store.task(task_path(later, "one"))
    assert store.preloaded() == [
        (task, str(task_path(checkpoint, task))) for task in checkpoint.tasks
    ]


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
