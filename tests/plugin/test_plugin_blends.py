"""Blends in a worker: the path that names one, and the direct and materialized forms of it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plugin_world import LAYERS, MODULES, Store, build, make_path

from vllm_vlora.blend_names import Blend, Term, parse_blend
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.errors import BlendError, CheckpointError, ModelMismatchError
from vllm_vlora.plugin.blend_paths import blend_of, blend_path, is_blend_path
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.identity import TaskPath, parse_task_path, task_path, task_paths
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.representations.decode import decode
from vllm_vlora.triton_kernels.direct import add_direct

# Two private tasks of rank 5 and 2 in o, and one above both, so that the layers take their sum.
TASKS = {
    "sql": {"q": ("private", 3), "o": ("private", 5)},
    "french": {"v": ("private", 1), "o": ("private", 2)},
    "wide": {"q": ("private", 8), "v": ("private", 8), "o": ("private", 8)},
    "joint": {"q": ("joint", 1), "k": ("joint", 9), "o": ("joint", 3)},
    "other joint": {"q": ("joint", 4), "o": ("joint", 1)},
}


def path_of(checkpoint: Checkpoint, text: str) -> TaskPath:
    return blend_path(task_paths(checkpoint), parse_blend(text, checkpoint.tasks))


def wanted(checkpoint: Checkpoint, blend: Blend) -> dict[str, torch.Tensor]:
    """The sum of the updates in float64."""
    bases = dict(checkpoint.bases())
    total: dict[str, torch.Tensor] = {}
    for task, weight in blend:
        for name, module in checkpoint.load_task(task).modules.items():
            a, b = decode(module, bases.get(name))
            total[name] = total.get(name, 0) + float(weight) * (b.double() @ a.double())
    return total


def added(store: Store, task: ResidentTask) -> dict[str, torch.Tensor]:
    """The update of each module that the direct path adds, asked for with unit vectors."""
    path = store.store.direct
    assert path is not None
    assert task.direct is not None
    slots = DirectSlots(path)
    slots.activate(1, task.direct)
    found = {}
    for name, modules in LAYERS.items():
        layer = path.layers[name]
        columns = []
        for start in range(0, layer.d_in, 64):
            x = torch.eye(layer.d_in)[start : start + 64]
            slots.route(np.ones(len(x), dtype=np.int64))
            y = torch.zeros(len(x), layer.width)
            add_direct(y, x, layer, path.table, path.routing)
            columns.append(y)
        widths = [MODULES[module][1] for module in modules]
        found.update(zip(modules, torch.cat(columns).T.split(widths)))
    return found


@pytest.mark.parametrize("private", ["float32", "int8", "nf4", "nf4-dq", "narrow"])
@pytest.mark.parametrize("text", ["sql*0.7+french*0.3", "sql-french", "joint*0.6+other joint*0.4"])
def test_a_blend_runs_direct(tmp_path: Path, private: str, text: str) -> None:
    checkpoint = build(tmp_path / "ck", TASKS, private=private)
    store = Store(only_direct=True)
    narrow = private == "narrow"
    store.store.preload(checkpoint.path, lambda opened: make_path(opened, narrow_rows=narrow))
    task = store.store.task(path_of(checkpoint, text))
    right = wanted(checkpoint, parse_blend(text, checkpoint.tasks))
    for name, update in added(store, task).items():
        expected = right.get(name, torch.zeros_like(update))
        torch.testing.assert_close(update.double(), expected.double(), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("text", ["sql*0.7+joint*0.3", "joint+other joint-wide*0.25"])
def test_a_blend_of_cores_and_rows_is_materialized(tmp_path: Path, text: str) -> None:
    checkpoint = build(tmp_path / "ck", TASKS)
    store = Store()
    store.store.preload(checkpoint.path, make_path)
    task = store.store.task(path_of(checkpoint, text))
    assert task.obstacle in (
        "o is float32, a format that no task had when the engine started",
        "q is float32, a format that no task had when the engine started",
        "o has rank 12, more than the private tasks that the engine started with",
        "q has rank 13, more than the private tasks that the engine started with",
    )
    right = wanted(checkpoint, parse_blend(text, checkpoint.tasks))
    assert task.sources.keys() == right.keys()
    for name, (a, b) in task.sources.items():
        found = b.to_dense().double().T @ a.to_dense().double()
        torch.testing.assert_close(found, right[name].double(), rtol=1e-6, atol=1e-6)


def test_the_same_blend_is_made_once_and_forgotten_like_a_late_task(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", TASKS)
    store = Store().store
    store.preload(checkpoint.path, make_path)
    before = store.nbytes
    path = path_of(checkpoint, "sql*0.70+french*.3")
    made = store.task(path)
    assert store.task(path_of(checkpoint, "french*0.3+sql*0.7")) is made
    assert made.task_id == "french*0.3+sql*0.7"
    assert [task.path for task in store.tasks()].count(str(path)) == 1
    # Nobody lists it.
    assert str(path) not in dict(map(reversed, store.served()))
    assert store.nbytes > before
    store.drop(str(path))
    assert store.nbytes == before
    assert str(path) not in [task.path for task in store.tasks()]


def test_a_rank_above_the_engines_is_said(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", {name: TASKS[name] for name in ("sql", "french")})
    store = Store(only_direct=True).store
    store.preload(checkpoint.path, make_path)
    with pytest.raises(ModelMismatchError, match=r"o has rank 7, more than the private tasks"):
        store.task(path_of(checkpoint, "sql+french"))


def test_ranks_of_blends_that_aliases_name_are_known_from_the_start(tmp_path: Path) -> None:
    tasks = {name: TASKS[name] for name in ("sql", "french", "joint")}
    checkpoint = build(tmp_path / "ck", tasks)
    set_alias(checkpoint.path, "mix", "sql*0.7+french*0.3")
    # Of cores and rows: floats, which no task has.
    set_alias(checkpoint.path, "new", "sql 9, sql+joint 1")
    store = Store(only_direct=True)
    store.store.preload(checkpoint.path, make_path)
    assert [task.task_id for task in store.store.tasks()] == list(tasks)
    for text in ("sql*0.7+french*0.3", "french-sql", "sql+joint"):
        task = store.store.task(path_of(checkpoint, text))
        right = wanted(checkpoint, parse_blend(text, checkpoint.tasks))
        for name, update in added(store, task).items():
            expected = right.get(name, torch.zeros_like(update))
            torch.testing.assert_close(update.double(), expected.double(), rtol=2e-5, atol=5e-6)


# --- identity -------------------------------------------------------------------------------------

ids = st.text(st.sampled_from("ab+-*/ é~"), min_size=1, max_size=6)
weights = st.decimals("0.000001", 100, places=6).filter(bool)
blends = st.lists(
    st.builds(lambda i, w, s: Term(i, w * s), ids, weights, st.sampled_from((1, -1))),
    min_size=1,
    max_size=8,
    unique_by=lambda term: term.task,
)


@given(blends, st.randoms(use_true_random=False))
def test_a_path_says_which_blend_it_is(terms: list[Term], random: object) -> None:
    checkpoint = _Named({term.task: f"{place:032x}" for place, term in enumerate(terms)})
    path = blend_path(checkpoint.paths, tuple(terms))
    assert parse_task_path(str(path)) == path
    assert is_blend_path(path)
    assert set(blend_of(path, checkpoint)) == set(terms)  # type: ignore[arg-type]
    random.shuffle(terms)  # type: ignore[attr-defined]
    longer = tuple(Term(task, Decimal(f"{weight:f}00")) if "." in f"{weight:f}" else
                   Term(task, weight) for task, weight in terms)  # fmt: skip
    assert blend_path(checkpoint.paths, longer) == path


@given(blends, blends)
def test_other_blends_have_other_paths(one: list[Term], other: list[Term]) -> None:
    tasks = sorted({term.task for term in one + other})
    paths = _Named({task: f"{place:032x}" for place, task in enumerate(tasks)}).paths
    same = set(one) == set(other)
    left, right = blend_path(paths, tuple(one)), blend_path(paths, tuple(other))
    assert (left == right, left.digest == right.digest) == (same, same)


class _Named:
    """The part of a checkpoint that paths are made of: ids and digests."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.tasks, self.digest = digests, digests.__getitem__
        place = Path("/ck")
        self.paths = {task: TaskPath(place, "", digest) for task, digest in digests.items()}


def test_a_path_of_other_weights_is_refused(tmp_path: Path) -> None:
    before = build(tmp_path / "ck", TASKS)
    old = path_of(before, "sql+french*0.5")
    (tmp_path / "ck").rename(tmp_path / "old")
    after = build(tmp_path / "ck", TASKS, seed=1)
    with pytest.raises(CheckpointError, match="was published again or removed; make a new request"):
        blend_of(old, after)
    only = build(tmp_path / "one", {"sql": TASKS["sql"]})
    with pytest.raises(CheckpointError, match="was published again or removed"):
        blend_of(old, only)
    assert blend_of(task_path(after, "sql"), after) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda path: replace(path, digest="0" * 32),
        lambda path: replace(path, file=path.file.replace("x0.5", "x0.50")),
        lambda path: replace(path, file=path.file.replace("x0.5", "x1000")),
        lambda path: replace(path, file=path.file.replace("x0.5", "x0")),
        lambda path: replace(path, file=path.file.replace("_", "__")),
        lambda path: replace(path, file="tasks/~~blend_.safetensors"),
        lambda path: replace(path, file="tasks/~~blend_xyz.safetensors"),
    ],
)
def test_a_path_that_a_client_made_up_is_refused(tmp_path: Path, change: object) -> None:
    checkpoint = build(tmp_path / "ck", TASKS)
    path = path_of(checkpoint, "sql+french*0.5")
    assert change(path) != path  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="make a new request"):
        blend_of(change(path), checkpoint)  # type: ignore[operator]


def test_tasks_of_two_checkpoints_have_no_blend(tmp_path: Path) -> None:
    one, two = (build(tmp_path / name, TASKS) for name in ("one", "two"))
    paths = {"sql": task_path(one, "sql"), "french": task_path(two, "french")}
    with pytest.raises(BlendError, match="different checkpoints"):
        blend_path(paths, parse_blend("sql+french", paths))
