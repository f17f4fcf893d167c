"""A run is killed at every event of the file system: the folder is the old one or the new one, whole.

Events are what Python audits (opening, making, renaming, linking, removing, locking, ...), the flushes
and the exchange of two folders; the process ends right before the event.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack_children import DONE, Child
from attacking import scaled
from edited_world import OLD, WRITERS, World

from vllm_vlora import atomic
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.locking import waiting_at_most

EVENTS = ("open", "os.", "shutil.", "fcntl.", "tempfile.")


class Countdown:
    """Ends the process right before the event of this number, counted from 0; None: counts them."""

    def __init__(self, number: int | None, inside: Path, report: Path) -> None:
        self.number, self.inside, self.report = number, str(inside), report
        self.count = 0

    def start(self) -> None:
        self.count = 0
        sys.addaudithook(self._audit)
        for name in ("fsync",):
            self._before(os, name)
        self._before(atomic, "_exchange")

    def _before(self, home: Any, name: str) -> None:
        function = getattr(home, name)

        def counted(*args: Any) -> Any:
            self._event()
            return function(*args)

        setattr(home, name, counted)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not event.startswith(EVENTS):
            return
        # Opening for reading changes nothing; nor does what happens elsewhere.
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if event.startswith(("os.", "open", "shutil")) and not self._is_inside(args):
            return
        self._event()

    def _is_inside(self, args: tuple[Any, ...]) -> bool:
        named = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
        # Removing a tree names its files within a descriptor.
        return any(not os.path.isabs(name) or self.inside in name for name in named)

    def _event(self) -> None:
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def end(self) -> None:
        # Not an event any more, since it lies outside.
        self.number = None
        self.report.write_text(str(self.count))


def run_until(world: World, writer: str, number: int | None) -> int:
    """The exit code of a run that is killed before an event; the number of events in ``count``."""
    world.refresh()
    countdown = Countdown(number, world.place, world.root / "count")
    (world.root / "count").unlink(missing_ok=True)
    work = WRITERS[writer](world)

    def watched() -> None:
        countdown.start()
        work()
        countdown.end()

    return Child(watched, world.root / "log").wait()


def tasks_of(world: World) -> tuple[str, ...]:
    return tuple(Checkpoint.open(world.checkpoint).tasks)


def edit_again(world: World) -> None:
    """The next run: it changes no task."""
    with waiting_at_most(0), edited(world.checkpoint, None, force=False) as (opened, folder):
        writer = Successor(folder, opened)
        writer.keep_bases()
        for task in opened.tasks:
            writer.copy_task(opened, task)
        writer.finish_edited()


def attack(world: World, writer: str, every: int, first: int = 0, last: int | None = None) -> int:
    """Kill at every so many events, or at these last ones; returns the runs."""
    old = tuple(OLD)
    assert run_until(world, writer, None) == DONE, (world.root / "log").read_text()
    new = tasks_of(world)
    files = set(checkpoint_files(world.checkpoint) or ())
    count = int((world.root / "count").read_text())
    assert count > 20
    seen = set()
    numbers = range(first % every if last is None else count - last, count, every)
    for number in numbers:
        where = f"{writer}, event {number} of {count}"
        assert run_until(world, writer, number) == -signal.SIGKILL, where
        if world.checkpoint.exists():
            assert validate(world.checkpoint) == [], where
            seen.add(tasks_of(world))
            assert tasks_of(world) in (old, new), where
        else:
            seen.add(())
        edit_again(world)
        assert tasks_of(world) in (old, new), where
        assert validate(world.checkpoint) == [], where
        assert (world.checkpoint / "LICENSE").read_text() == "a licence", where
        found = {p.name for p in world.checkpoint.iterdir()} - {
            name.split("/")[0] for name in files
        }
        assert found <= {"LICENSE", "tasks"}, (where, found)
        assert os.listdir(world.place) == ["ckpt"], where
    if last is not None:
        # The old state, the new one, and where two renames are needed none for a moment.
        assert {old, new} <= seen
    return len(numbers)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


@pytest.mark.parametrize("writer", WRITERS)
def test_some_kills(world: World, writer: str) -> None:
    attack(world, writer, every=11, first=sum(map(ord, writer)))


@pytest.mark.parametrize("exchange", [True, False])
def test_kills_while_the_folders_change_places(
    world: World, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)
    attack(world, "remove", every=1, last=30)


@pytest.mark.attacks_long
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_kill(
    world: World,
    writer: str,
    exchange: bool,
    monkeypatch: pytest.MonkeyPatch,
    tally: Callable[[str, int], None],
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)
    count = scaled(1)
    runs = sum(attack(world, writer, every=1) for _ in range(count))
    tally(f"{writer}, killed{'' if exchange else ', with two renames'}", runs)
