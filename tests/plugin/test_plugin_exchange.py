"""Bases that take the place of those that the layers hold: what they add, and when they may."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from plugin_world import (
    LAYERS,
    MODULES,
    STORED,
    TASKS,
    TOKENS,
    Store,
    build,
    layouts,
    make_path,
    run,
)

from vllm_vlora.blend_names import parse_blend
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import ModelMismatchError, TaskLoadError
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.exchange import BasisExchange, Books
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.identity import TaskPath, parse_task_path, task_path, task_paths
from vllm_vlora.plugin.resident import BasesReport, ResidentStore
from vllm_vlora.plugin.settings import Budget
from vllm_vlora.representations.decode import decode
from vllm_vlora.triton_kernels.direct import add_direct

NARROWER = {"q": (4, 5), "k": (1, 2), "o": (7, 3)}
WIDER = {"q": (6, 6)}


def exchanged(path: DirectPath, checkpoint: Checkpoint) -> DirectPath:
    """The path, whose layers hold a checkpoint's bases now."""
    bases = path.other_bases(checkpoint)
    assert bases is not None
    assert path.misfit(checkpoint, bases) is None
    places = _places(path)
    path.exchange(bases, path.read_bases(checkpoint, bases).tree)
    assert _places(path) == places, "captured graphs have the addresses"
    return path


def _places(path: DirectPath) -> list[int]:
    held = [(layer.v, *(part.u for part in layer.slices)) for layer in path.layers.values()]
    return [p.data_ptr() for ms in held for m in ms if m is not None for p in m.parts.values()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("widths", [None, NARROWER])
@pytest.mark.parametrize(
    ("before", "after", "packed"),
    [
        ("float32", "float32", False),
        ("float32", "nf4-dq", False),
        ("int8", "bfloat16", False),
        ("int8", "int8", True),
        ("nf4", "nf4", True),
        ("nf4-dq", "nf4-dq", True),
    ],
)
def test_layers_add_what_the_tasks_of_the_new_state_decode_to(
    tmp_path: Path, ranks: int, widths: Any, before: str, after: str, packed: bool
) -> None:
    """Against float64 of the decoded weights; of the first state's rows nothing is left."""
    first = build(tmp_path / "first", basis=before)
    second = build(tmp_path / "second", basis=after, seed=1, widths=widths)
    paths = [make_path(first, layouts(rank, ranks), packed_basis=packed) for rank in range(ranks)]
    for name, answer in run(first, paths, TOKENS).items():
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)
        assert answer.want.abs().amax() > 0.3, name
    found = run(second, [exchanged(path, second) for path in paths], TOKENS)
    for answer in found.values():
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)
    back = run(first, [exchanged(path, first) for path in paths], TOKENS)
    for answer in back.values():
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_with_room_take_wider_bases_and_add_the_same_before(
    tmp_path: Path, ranks: int, packed: bool
) -> None:
    """Some cores on what is padded are cut into factors by an SVD."""
    first = build(tmp_path / "first", basis="int8")
    wide = {"q": (11, 12), "k": (12, 9), "o": (12, 12)}
    second = build(tmp_path / "second", basis="int8", seed=1, widths=wide)
    paths = [
        make_path(first, layouts(rank, ranks), packed_basis=packed, basis_rows=12)
        for rank in range(ranks)
    ]
    for answer in run(first, paths, TOKENS).values():
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)
    for answer in run(second, [exchanged(path, second) for path in paths], TOKENS).values():
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)


def test_what_has_no_room_is_named(tmp_path: Path) -> None:
    first = build(tmp_path / "first")

    def why(checkpoint: Checkpoint, path: DirectPath) -> str | None:
        bases = path.other_bases(checkpoint)
        assert bases is not None
        return path.misfit(checkpoint, bases)

    path = make_path(first)
    assert path.other_bases(first) is None
    wider = build(tmp_path / "wider", seed=1, widths=WIDER)
    assert why(wider, path) == "q has 6 and 6 components, its layer has room for 6 and 5"
    joint_v = {"a": {"v": ("joint", 2)}}
    another = build(tmp_path / "v", joint_v, seed=1, widths={"v": (2, 2)})
    assert why(another, path) == "the layer of v holds no basis"
    packed = make_path(build(tmp_path / "nf4", basis="nf4"), packed_basis=True)
    other = build(tmp_path / "int8", basis="int8", seed=1)
    assert why(other, packed) == "q is stored int8, its layer holds nf4"
    assert why(other, path) is None, "what is held dense takes any"
    # A rank's cut makes nf4 of nf4-dq, and where it is cut amid a block the rank's share is dense.
    for rank in range(2):
        cut = make_path(
            build(tmp_path / f"dq{rank}", basis="nf4-dq"), layouts(rank, 2), packed_basis=True
        )
        assert why(build(tmp_path / f"again{rank}", basis="nf4-dq", seed=1), cut) is None
    private = build(tmp_path / "private", {"one": TASKS["one"]}, seed=1)
    assert path.other_bases(private) is None, "no task needs them"


def test_a_rank_of_a_pipeline_takes_the_bases_of_its_own_layers(tmp_path: Path) -> None:
    first, second = build(tmp_path / "first"), build(tmp_path / "second", seed=1)
    whole = exchanged(make_path(first), second)
    for number, elsewhere in ((0, {"o": True}), (1, {"q": True, "k": True, "v": True})):
        path = make_path(first, [layouts()[number]], elsewhere=elsewhere)
        exchanged(path, second)
        for name, layer in path.layers.items():
            assert layer.v is not None
            full = whole.layers[name].v
            assert full is not None
            assert torch.equal(layer.v.parts["values"], full.parts["values"])
        for task in TASKS:
            assert path.obstacle(second, task) is None
            assert (path.obstacle(first, task) is None) == (task in ("private", "one"))


# --- the store -------------------------------------------------------------------------------------


class Served:
    """A store that serves one state, and another that was published beside it."""

    def __init__(self, root: Path, only_direct: bool = False, **options: Any) -> None:
        tasks = TASKS if only_direct else STORED
        self.first = build(root / "first", tasks)
        self.second = build(root / "second", tasks, **{"seed": 1, "widths": NARROWER, **options})
        self.store = Store(only_direct).store
        self.store.preload(self.first.path, make_path)

    def publish(self) -> ResidentStore:
        self.store.check(self.second, self.second.tasks)
        self.store.serve(State(self.second))
        until(lambda: self.report().ready or self.report().refused)
        return self.store

    def report(self, in_use: tuple[str, ...] = (), awaited: tuple[str, ...] = ()) -> BasesReport:
        return self.store.bases(in_use, awaited)

    def path(self, task: str, first: bool = False) -> TaskPath:
        return task_path(self.first if first else self.second, task)

    def stage(self, task: str) -> bool | None:
        """The answer once it is no longer that the task is being read."""
        path = self.path(task)
        until(lambda: self.store.stage(path) is not False)
        return self.store.stage(path)

    def exchange(self) -> set[str]:
        ended = self.store.ended()
        for path in ended:
            self.store.drop(path)
        self.store.exchange()
        return set(ended)


def until(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


JOINT = ("joint", "mixed")


def test_tasks_on_the_new_bases_wait_and_others_do_not(tmp_path: Path) -> None:
    served = Served(tmp_path)
    store = served.publish()
    for task in STORED:
        assert served.stage(task) is (None if task in JOINT else True), task
    # "head" needs a basis too, and is materialized whatever the layers hold.
    for task in ("private", "one", "head", "plain head"):
        assert store.place(served.path(task)) == 0
    with pytest.raises(TaskLoadError, match="its basis is being exchanged"):
        store.place(served.path("joint"))
    busy = str(served.path("joint", first=True))
    assert served.report((busy,)).busy
    assert served.report((), (busy,)).busy
    calm = tuple(str(served.path(task)) for task in TASKS)
    assert not served.report(calm, calm).busy
    before = {str(served.path(task, first=True)) for task in JOINT}
    assert served.exchange() == before
    assert not served.report((busy,)).wanted
    for task in JOINT:
        assert served.stage(task) is True
        assert store.task(served.path(task)).direct is not None
        assert store.held(str(served.path(task, first=True))) is None
    assert store.held(str(served.path("private", first=True))) is not None
    assert {task.task_id for task in store.tasks() if task.direct} == set(TASKS)


def test_who_does_not_wait_is_told_while_the_new_bases_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, read, go_on = Served(tmp_path), ResidentStore._read_next, threading.Event()

    def slow(self: ResidentStore, checkpoint: Checkpoint) -> Any:
        assert go_on.wait(30)
        return read(self, checkpoint)

    monkeypatch.setattr(ResidentStore, "_read_next", slow)
    served.store.check(served.second, served.second.tasks)
    served.store.serve(State(served.second))
    assert served.store.stage(served.path("joint")) is None
    with pytest.raises(TaskLoadError, match="its basis is being exchanged; ask again"):
        served.store.place(served.path("joint"))
    assert served.store.place(served.path("private")) == 0
    go_on.set()
    until(lambda: served.report().ready)


def test_a_blend_of_tasks_on_the_new_bases_waits_for_them_too(tmp_path: Path) -> None:
    store = Store().store
    tasks = {"a": {"q": ("joint", 2)}, "b": {"q": ("joint", 1), "o": ("joint", 1)}}
    store.preload(build(tmp_path / "first", tasks).path, make_path)
    second = build(tmp_path / "second", tasks, seed=1)
    store.serve(State(second))
    path = blend_path(task_paths(second), parse_blend("a*0.5+b", second.tasks))
    assert store.stage(path) in (None, False)
    until(lambda: store.bases((), ()).ready)
    until(lambda: store.stage(path) is not False)
    assert store.stage(path) is None
    for name in store.ended():
        store.drop(name)
    store.exchange()
    assert store.stage(path) is True
    assert store.task(path).direct is not None


def test_who_waited_long_enough_gets_a_task_that_is_materialized_until_then(
    tmp_path: Path,
) -> None:
    served = Served(tmp_path)
    store = served.publish()
    assert served.stage("joint") is None
    assert store.hold_back(False) == []
    assert served.stage("joint") is True
    path = served.path("joint")
    task = store.task(path)
    assert task.direct is None
    assert task.obstacle == "q has another basis than the layers hold"
    assert served.report((str(path),)).busy, "the exchange would take its form"
    # A second wait: who comes now waits, though the task is there.
    assert store.hold_back(True) == [str(path)]
    assert store.stage(path) is None
    assert served.report((str(path),)).busy
    assert not served.report((), (str(path),)).busy, "it waits for the exchange itself"
    assert str(path) in served.exchange()
    assert served.stage("joint") is True
    assert store.task(path).direct is not None


def test_a_task_that_is_read_while_the_bases_are_exchanged_runs_direct_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(tmp_path)
    store = served.publish()
    store.hold_back(False)
    reads, goes_on = threading.Event(), threading.Event()
    load = store._load

    def slowly(*args: Any) -> Any:
        reads.set()
        assert goes_on.wait(30)
        return load(*args)

    monkeypatch.setattr(store, "_load", slowly)
    path = served.path("joint")
    assert store.stage(path) is False
    assert reads.wait(30)
    served.exchange()
    goes_on.set()
    assert served.stage("joint") is True
    assert store.task(path).direct is not None


def test_what_is_given_up_is_materialized_from_then_on(tmp_path: Path) -> None:
    served = Served(tmp_path)
    store = served.publish()
    assert served.stage("joint") is None
    store.keep_bases()
    assert served.stage("joint") is True
    assert store.task(served.path("joint")).direct is None
    assert not served.report().wanted
    # The tasks of before run on.
    assert store.stage(served.path("joint", first=True)) is True
    assert store.task(served.path("joint", first=True)).direct is not None


def test_bases_without_room_are_refused_and_their_tasks_materialized(tmp_path: Path) -> None:
    served = Served(tmp_path, widths=WIDER)
    store = served.publish()
    assert served.report().refused == "q has 6 and 6 components, its layer has room for 6 and 5"
    assert served.stage("joint") is True
    assert store.task(served.path("joint")).direct is None


def test_mode_direct_takes_a_state_whose_bases_have_room(tmp_path: Path) -> None:
    served = Served(tmp_path, only_direct=True)
    store = served.publish()
    served.exchange()
    assert store.task(served.path("joint")).direct is not None
    wider = build(tmp_path / "wider", seed=2, widths=WIDER)
    with pytest.raises(ModelMismatchError, match="q has another basis than the layers hold"):
        store.check(wider, wider.tasks)


def test_a_damaged_basis_is_refused_by_the_worker_that_reads_it(tmp_path: Path) -> None:
    served = Served(tmp_path)
    file = served.second.path / served.second.config.basis[0].file
    file.write_bytes(file.read_bytes()[:-1])
    served.publish()
    assert file.name in served.report().refused
    assert served.store.direct is not None
    assert served.store.direct.bases.digest == served.first.basis_digest


def test_a_state_on_the_bases_that_the_layers_hold_waits_for_nothing(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.publish()
    served.store.serve(State(served.first))
    assert served.report() == BasesReport()
    without = build(tmp_path / "private", {"one": TASKS["one"]}, seed=3)
    served.store.serve(State(without))
    until(lambda: not served.report().wanted)


class Walk:
    """A random walk through states, waits and exchanges, with requests that use tasks meanwhile."""

    def __init__(self, root: Path, seed: int, host: int) -> None:
        widths = (None, NARROWER, WIDER, None)
        self.checkpoints = [
            build(root / str(n), STORED, seed=n, widths=w) for n, w in enumerate(widths)
        ]
        # Two states on one basis: some of the tasks of the first.
        shutil.copytree(root / "0", root / "copy")
        self.checkpoints.append(Checkpoint.open(root / "copy"))
        self.of_path = {
            str(task_path(ck, task)): (ck, task) for ck in self.checkpoints for task in STORED
        }
        self.random = Random(seed)
        self.used: set[str] = set()
        self.waiting: list[str] = []
        self.seen: Counter[str] = Counter()
        self.store = Store(budget=Budget(device=0, late=1 << 20, host=host)).store
        self.store.preload(self.checkpoints[0].path, make_path)

    def step(self) -> None:
        events = (self.publish, self.settle, self.hold_back, self.end, self.evict, self.request)
        (event,) = self.random.choices(events, (6, 5, 5, 15, 20, 50))
        event()

    def publish(self) -> None:
        self.store.serve(State(self.random.choice(self.checkpoints)))

    def hold_back(self) -> None:
        self.store.hold_back(self.random.random() < 0.5)

    def end(self) -> None:
        for path in self.random.sample(sorted(self.used), len(self.used) // 2):
            self.used.discard(path)
        if self.random.random() < 0.2:
            self.used.clear()

    def evict(self) -> None:
        idle = [task.path for task in self.store.tasks() if task.path not in self.used]
        for path in self.random.sample(idle, len(idle) // 2):
            self.store.forget(path)

    def request(self) -> None:
        state = self.store.state
        assert state is not None
        joint = [path for task, path in state.paths.items() if task in JOINT]
        asked = self.random.choice([joint, joint, list(self.of_path), self.waiting]) or joint
        self.ask(self.random.sample(asked, min(len(asked), self.random.choice([1, 1, 2, 6]))))

    def settle(self) -> None:
        """What an engine core does that looks at the workers."""
        report = self.store.bases(self.used, ())
        if report.refused:
            self.store.keep_bases()
            self.seen["refused"] += 1
        elif report.ready and not report.busy:
            for path in self.store.ended():
                assert path not in self.used
                self.store.drop(path)
            self.store.exchange()
            self.seen["exchanged"] += 1

    def ask(self, paths: list[str]) -> None:
        """Tasks that are read side by side, and then come to the device one after the other."""
        parsed = [parse_task_path(path) for path in paths]
        asked = [path for path in parsed if path is not None]
        staged: list[bool | None] = [False]
        deadline = time.monotonic() + 30
        while False in staged:
            assert time.monotonic() < deadline
            staged = [self.store.stage(path) for path in asked]
            # Who asks without a pause keeps the threads that read from running.
            time.sleep(0.0005 * (False in staged))
        for path, answer in zip(asked, staged):
            if answer is None:
                self.seen["waits"] += 1
                self.waiting = [*self.waiting[-4:], str(path)]
            else:
                assert self.store.place(path) == 0
                self.used.add(str(path))

    def check(self) -> None:
        """Every task on the device adds what its own checkpoint says, in the layers as they are."""
        path = self.store.direct
        assert path is not None
        for task in self.store.tasks():
            checkpoint, name = self.of_path[task.path]
            stored, bases = checkpoint.load_task(name).modules, dict(checkpoint.bases())
            wanted = {m: decode(s, bases.get(m)) for m, s in stored.items()}
            if task.direct is None:
                self.seen["materialized"] += 1
                for module, (source_a, source_b) in task.sources.items():
                    a, b = wanted[module]
                    torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
                continue
            self.seen["direct"] += 1
            slots = DirectSlots(path)
            slots.activate(1, task.direct)
            slots.route(np.ones(3, dtype=np.int64))
            for layer, modules in LAYERS.items():
                x = torch.randn(3, MODULES[modules[0]][0])
                y = torch.zeros(3, path.layers[layer].width)
                add_direct(y, x, path.layers[layer], path.table, path.routing)
                parts = y.split([MODULES[module][1] for module in modules], dim=1)
                for module, part in zip(modules, parts):
                    a, b = wanted.get(module, (torch.zeros(1, x.shape[1]), torch.zeros(1, 1)))
                    torch.testing.assert_close(
                        part, (x @ a.T @ b.T).expand_as(part), rtol=1e-4, atol=1e-4
                    )


@pytest.mark.parametrize(("seed", "host"), [(0, 0), (1, 1 << 20)])
def test_whatever_is_published_a_task_on_the_device_adds_its_own_weights(
    tmp_path: Path, seed: int, host: int
) -> None:
    walk = Walk(tmp_path, seed, host)
    for number in range(1000):
        walk.step()
        if number % 20 == 0:
            walk.check()
    for kind in ("exchanged", "refused", "waits", "materialized", "direct"):
        assert walk.seen[kind] > 0, (kind, walk.seen)


# --- when it is done -------------------------------------------------------------------------------


class Engine:
    """Two workers that report what a test says, and what they were told."""

    def __init__(self, patience: float | None = 30.0) -> None:
        self.now = 100.0
        self.used: set[str] = set()
        self.reports = [BasesReport(True, True), BasesReport(True, True)]
        self.told: list[Any] = []
        self.lost: list[str] = []
        self.asleep = False
        books = Books(
            lambda: self.used,
            lambda: {"awaited"},
            self.lost.extend,
            self._look,
            lambda: self.asleep,
        )
        self.log: list[str] = []
        self.looks = 0
        self.exchange = BasisExchange(
            self, books, patience, lambda *line: self.log.append(line[0]), lambda: self.now
        )

    def bases(self, in_use: Any, awaited: Any) -> list[BasesReport]:
        assert awaited == {"awaited"}
        busy = bool(in_use)
        return [BasesReport(r.wanted, r.ready, r.refused, busy) for r in self.reports]

    def _look(self) -> None:
        self.looks += 1

    def hold_back(self, held_back: bool) -> set[str]:
        self.told.append(held_back)
        return {"meanwhile"} if held_back else set()

    def keep_bases(self) -> None:
        self.told.append("keep")

    def exchange_bases(self) -> list[str]:
        self.told.append("exchange")
        return ["old"]

    def run(self, seconds: float) -> None:
        """So long, with a turn every 50 ms."""
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            self.exchange.heard("s1", "new")
            self.exchange.advance()


def test_it_comes_when_nothing_on_the_bases_of_before_was_used_for_a_while() -> None:
    engine = Engine()
    engine.exchange.begin("new")
    engine.reports[0] = BasesReport(True)
    engine.used = {"old"}
    engine.run(1)
    assert engine.looks == 0
    engine.reports[0] = BasesReport(True, True)
    engine.run(5)
    assert (engine.told, engine.looks) == ([], 1), "once the bases are read it is known who waits"
    assert engine.exchange.holds_back
    engine.used = set()
    engine.run(0.4)
    assert engine.told == []
    engine.run(0.4)
    assert engine.told == ["exchange"]
    assert (engine.lost, engine.looks) == (["old"], 2)
    assert engine.exchange.count == 1
    assert not engine.exchange.holds_back
    engine.run(60)
    assert engine.told == ["exchange"]


def test_it_waits_for_every_api_server_that_is_alive_and_every_worker() -> None:
    engine = Engine()
    engine.exchange.heard("s2", "old")
    engine.exchange.begin("new")
    engine.run(5)
    assert engine.told == []
    engine.reports[1] = BasesReport(True)
    engine.exchange.heard("s2", "new")
    engine.run(2)
    assert engine.told == []
    engine.reports[1] = BasesReport(True, True)
    engine.run(1)
    assert engine.told == ["exchange"]
    engine = Engine()
    engine.exchange.heard("s2", "old")
    engine.exchange.begin("new")
    engine.run(11)
    assert engine.told == ["exchange"], "s2 has ended"


def test_nobody_waits_longer_than_was_asked_for_and_it_is_tried_again() -> None:
    engine = Engine(patience=4)
    engine.exchange.begin("new")
    engine.used = {"old"}
    engine.run(4.2)
    assert (engine.told, engine.looks) == ([False], 2)
    assert not engine.exchange.holds_back
    assert "are materialized until they end" in engine.log[-1]
    engine.run(41)
    assert engine.told == [False, True]
    assert engine.exchange.holds_back
    assert engine.exchange.waiting == {"meanwhile"}
    engine.used = set()
    engine.run(1)
    assert engine.told[2:] == ["exchange"]
    assert not engine.exchange.waiting


def test_without_patience_nobody_waits_and_in_mode_direct_everybody_does() -> None:
    engine = Engine(patience=0)
    engine.exchange.begin("new")
    engine.used = {"old"}
    engine.run(100)
    assert engine.told == [False]
    engine.used = set()
    engine.run(1)
    assert engine.told[1:] == ["exchange"]
    engine = Engine(patience=None)
    engine.exchange.begin("new")
    engine.used = {"old"}
    engine.run(1000)
    assert engine.told == []


def test_one_worker_that_has_no_room_is_enough_to_leave_it() -> None:
    engine = Engine()
    engine.reports[1] = BasesReport(True, refused="q is too wide")
    engine.exchange.begin("new")
    engine.run(1)
    assert engine.told == ["keep"]
    assert "are materialized until the server is started again" in engine.log[0]
    engine = Engine()
    engine.reports = [BasesReport(), BasesReport()]
    engine.exchange.begin("new")
    engine.run(1)
    assert engine.told == []
    assert engine.log == []


def test_an_engine_that_sleeps_is_left_alone() -> None:
    engine = Engine()
    engine.exchange.begin("new")
    engine.asleep = True
    engine.run(5)
    assert engine.told == []
    engine.asleep = False
    engine.run(1)
    assert engine.told == ["exchange"]
