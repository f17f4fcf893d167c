"""The disk is full at every write of a run: one line says so, and everything is as it was."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edited_world import WRITERS, World

from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import OutputError

EVERY_WRITER: dict[str, Callable[[World], Callable[[], object]]] = WRITERS | {
    "export": lambda world: world.export(world.place / "adapter"),
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world whose ``place`` is a disk of 4 MiB."""
    world = World.at(tmp_path)
    aside = world.root / "aside"
    world.place.rename(aside)
    world.place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(world.place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("may not mount a disk here")
    shutil.copytree(aside, world.place, dirs_exist_ok=True)
    try:
        yield world
    finally:
        subprocess.run(["umount", str(world.place)], check=True)


def fill(place: Path, left: int) -> None:
    """Leave so many pages of the disk."""
    free = os.statvfs(place)
    with open(place / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(1, free.f_bavail - left) * free.f_frsize)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(work: Callable[[], object]) -> str | None:
    """What the run refuses with; None where it succeeds."""
    try:
        work()
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("writer", EVERY_WRITER)
def test_a_disk_full_at_every_page(
    world: World, writer: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = content(world.checkpoint)
    work = EVERY_WRITER[writer](world)
    for left in range(1024):
        fill(world.place, left)
        said = run(work)
        (world.place / "filler").unlink()
        if said is None:
            break
        assert re.fullmatch(r"cannot write \S+(ckpt|adapter): No space left .*", said)
        assert content(world.checkpoint) == before
        assert os.listdir(world.place) == ["ckpt"], left
    assert left > 2
    assert validate(world.checkpoint) == []
    assert set(os.listdir(world.place)) <= {"ckpt", "adapter"}
    assert not caplog.records
