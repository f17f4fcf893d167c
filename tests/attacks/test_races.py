"""Several runs on one checkpoint at once: nothing is lost, nothing half read, nothing left behind."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attack_children import DONE, REFUSED, Child, at_once
from attacking import scaled
from edited_world import NEW, OLD, World

from vllm_vlora import atomic
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint, read_one_state
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import CheckpointError, CheckpointReplacedError, OutputError
from vllm_vlora.locking import locked, waiting_at_most

State = frozenset[str]
# What a writer makes of a set of tasks; None where it refuses.
EFFECTS: dict[str, Callable[[State], State | None]] = {
    "add task4": lambda tasks: None if "task4" in tasks else tasks | {"task4"},
    "add task5": lambda tasks: None if "task5" in tasks else tasks | {"task5"},
    "remove task0": lambda tasks: tasks - {"task0"} if "task0" in tasks else None,
    "remove task1": lambda tasks: tasks - {"task1"} if "task1" in tasks else None,
    "blend": lambda tasks: (
        tasks | {"blend"} if {"task0", "task1"} <= tasks and "blend" not in tasks else None
    ),
    "compress": lambda tasks: frozenset(OLD),
    "pull": lambda tasks: frozenset(NEW),
}
WRITERS = tuple(EFFECTS)


def work(world: World, name: str) -> Callable[[], object]:
    command, _, task = name.partition(" ")
    if command == "blend":
        return world.blend("blend")
    return getattr(world, command)(*([task] if task else []))


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    """Flushing takes its time, so that runs which do not wait for each other meet."""
    finish = atomic._finish_tree

    def slowly(root: Path) -> None:
        finish(root)
        time.sleep(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_finish_tree", slowly)
        yield


def race(world: World, names: tuple[str, ...]) -> None:
    """Run writers at once; what is there afterwards is what some order of them makes."""
    world.refresh()
    log = world.root / "log"
    log.write_text("")
    codes = at_once([work(world, name) for name in names], log)
    said = log.read_text()
    assert set(codes) <= {DONE, REFUSED}, said
    found = State(Checkpoint.open(world.checkpoint).tasks)
    possible = [outcome(order, codes, names) for order in itertools.permutations(range(len(names)))]
    assert found in possible, (names, codes, sorted(found), said)
    assert validate(world.checkpoint) == []
    assert (world.checkpoint / "LICENSE").read_text() == "a licence"
    assert os.listdir(world.place) == ["ckpt"]


def outcome(order: tuple[int, ...], codes: list[int], names: tuple[str, ...]) -> State | None:
    """The tasks after these runs in this order; None where another one would have been refused."""
    state = State(OLD)
    for place in order:
        after = EFFECTS[names[place]](state)
        if (after is None) != (codes[place] == REFUSED):
            return None
        state = state if after is None else after
    return state


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("remove task0", "remove task1"),
        ("add task4", "add task5"),
        ("add task4", "remove task0"),
        ("add task4", "compress"),
        ("remove task0", "pull"),
        ("blend", "remove task0"),
    ],
)
def test_no_update_is_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    with slow_disk(monkeypatch, 0.2):
        race(world, names)


@pytest.mark.attacks_long
def test_the_matrix_of_writers(
    world: World, monkeypatch: pytest.MonkeyPatch, tally: Callable[[str, int], None]
) -> None:
    pairs = list(itertools.combinations_with_replacement(WRITERS, 2))
    count = scaled(4)
    for turn in range(count):
        with slow_disk(monkeypatch, 0.1 * (turn % 3)):
            for names in pairs:
                race(world, names)
    tally("writers at once, in pairs", count * len(pairs))


@pytest.mark.attacks_long
def test_four_writers_at_once(world: World, tally: Callable[[str, int], None]) -> None:
    sets = list(itertools.combinations(WRITERS, 4))
    count = scaled(2)
    for names in sets * count:
        race(world, names)
    tally("four writers at once", count * len(sets))


# --- readers --------------------------------------------------------------------------------------


def read_while_publishing(world: World, seconds: float) -> dict[str, int]:
    """Readers beside a run that publishes without a pause; what they read, by kind."""
    world.refresh()
    end = time.monotonic() + seconds
    counts = {"open": 0, "validate": 0, "export": 0}

    def publish() -> None:
        while time.monotonic() < end:
            world.pull()()
            world.compress()()

    log = world.root / "log"
    publisher = Child(publish, log)
    while time.monotonic() < end:
        assert State(Checkpoint.open(world.checkpoint).tasks) in (State(OLD), State(NEW))
        assert validate(world.checkpoint) == []
        read_one_state(world.checkpoint, lambda opened: export_first(opened, world))
        for kind in counts:
            counts[kind] += 1
    assert publisher.wait() == DONE, log.read_text()
    return counts


def export_first(opened: Checkpoint, world: World) -> Path:
    return export_task(opened, next(iter(opened.tasks)), world.root / "exported", force=True)


def test_readers_begin_again_on_the_new_state(world: World) -> None:
    assert read_while_publishing(world, 3.0)["validate"] > 0


@pytest.mark.attacks_long
def test_readers_beside_publications(world: World, tally: Callable[[str, int], None]) -> None:
    tally("readers beside publications", sum(read_while_publishing(world, scaled(60)).values()))


def test_a_reader_is_told_of_a_replacement(world: World) -> None:
    opened = Checkpoint.open(world.checkpoint)
    world.pull()()
    with pytest.raises(CheckpointReplacedError, match=r"was replaced .* run this again"):
        opened.load_task("task0")
    with pytest.raises(CheckpointReplacedError, match="was replaced"):
        dict(opened.bases())


def test_damage_is_not_taken_for_a_replacement(world: World) -> None:
    (world.checkpoint / "tasks" / "task0.safetensors").write_bytes(b"")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        read_one_state(world.checkpoint, lambda opened: opened.load_task("task0"))
    assert len(validate(world.checkpoint)) == 1
    assert time.monotonic() - began < 5


# --- waiting --------------------------------------------------------------------------------------


def test_waiting_says_so_and_ends_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = world.checkpoint.resolve()
    with locked(target):
        holder = f"process {os.getpid()}"

        def edit() -> None:
            began = time.monotonic()
            with waiting_at_most(0.3):
                try:
                    world.remove("task0")()
                finally:
                    assert 0.2 < time.monotonic() - began < 5

        log = world.root / "log"
        assert at_once([edit], log) == [REFUSED]
        said = log.read_text()
        assert f"waiting for another run ({holder}) that writes {target}" in said
        assert "--timeout" in said
    assert os.listdir(world.place) == ["ckpt"]
    assert State(Checkpoint.open(world.checkpoint).tasks) == State(OLD)


def test_the_command_line_waits_and_says_so(world: World) -> None:
    def command() -> None:
        from vllm_vlora.tools.cli import app

        try:
            app(["remove", str(world.checkpoint), "task0", "--timeout", "0.3"])
        except SystemExit as error:
            os._exit(int(str(error.code)))

    log = world.root / "log"
    with locked(world.checkpoint.resolve()):
        assert at_once([command], log) == [2]
    waited, refused = log.read_text().splitlines()
    assert waited.startswith("waiting for another run")
    assert refused.startswith("Error: ")
    assert "is being written by another run" in refused


def test_a_dead_process_holds_nobody_up(world: World) -> None:
    def die() -> Any:
        with locked(world.checkpoint.resolve()):
            os.kill(os.getpid(), 9)

    assert at_once([die]) == [-9]
    assert ".ckpt.lock" in os.listdir(world.place)
    with waiting_at_most(0):
        world.remove("task0")()
    assert os.listdir(world.place) == ["ckpt"]


def test_a_file_system_without_locks_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    world.remove("task0")()
    assert "cannot be locked" in caplog.text
    assert os.listdir(world.place) == ["ckpt"]


def test_a_lock_that_cannot_be_made_is_our_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.place / ".ckpt.lock").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        world.remove("task0")()
