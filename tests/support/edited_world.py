"""A small checkpoint with its adapters, made once, and what every writing command does to a copy."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from synthetic import family

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.rebuilding import rebuild
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.merging.blending import blend_tasks

OLD, NEW = ("task0", "task1", "task2", "task3"), ("task4", "task5")
_OPTIONS = CompressOptions(representation="joint", ratio=2.0, quantize="none")


@functools.cache
def _made() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    adapters = family(folder / "adapters", len(OLD) + len(NEW), related=True)
    compress({task: adapters[task] for task in OLD}, folder / "place" / "ckpt", _OPTIONS)
    (folder / "place" / "ckpt" / "LICENSE").write_text("a licence")
    compress({task: adapters[task] for task in NEW}, folder / "published", _OPTIONS)
    return made


@dataclass
class World:
    """``place/ckpt`` holds the tasks ``OLD`` and a licence; ``published`` the tasks ``NEW``."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> World:
        shutil.copytree(_made().name, root, dirs_exist_ok=True)
        return cls(root)

    @property
    def place(self) -> Path:
        return self.root / "place"

    @property
    def checkpoint(self) -> Path:
        return self.place / "ckpt"

    def refresh(self) -> None:
        """Everything as it was."""
        shutil.rmtree(self.place)
        shutil.copytree(Path(_made().name) / "place", self.place)

    def adapter(self, task: str) -> Path:
        return self.root / "adapters" / task

    def add(self, task: str) -> Callable[[], object]:
        return lambda: add_adapters(
            self.checkpoint, {task: open_adapter(self.adapter(task))}, AddOptions(ratio=1.0)
        )

    def remove(self, task: str) -> Callable[[], object]:
        return lambda: remove_tasks(self.checkpoint, [task])

    def blend(self, task: str) -> Callable[[], object]:
        return lambda: blend_tasks(self.checkpoint, {OLD[0]: 0.5, OLD[1]: 0.5}, task)

    def compress(self) -> Callable[[], object]:
        adapters = {task: open_adapter(self.adapter(task)) for task in OLD}
        return lambda: compress(adapters, self.checkpoint, _OPTIONS, force=True)

    def rebuild(self) -> Callable[[], object]:
        def run() -> object:
            tasks = Checkpoint.open(self.checkpoint).tasks
            adapters = {task: open_adapter(self.adapter(task)) for task in tasks}
            return rebuild(self.checkpoint, adapters, AddOptions(ratio=2.0, quantize="none"))

        return run

    def pull(self) -> Callable[[], object]:
        return lambda: pull_checkpoint(str(self.root / "published"), self.checkpoint, force=True)

    def export(self, output: Path) -> Callable[[], object]:
        def run() -> object:
            opened = Checkpoint.open(self.checkpoint)
            return export_task(opened, next(iter(opened.tasks)), output, force=True)

        return run


# Every command that replaces a checkpoint: name -> what makes the run on a world.
WRITERS: dict[str, Callable[[World], Callable[[], object]]] = {
    "add": lambda world: world.add(NEW[0]),
    "remove": lambda world: world.remove(OLD[0]),
    "blend": lambda world: world.blend("blend"),
    "compress": lambda world: world.compress(),
    "rebuild": lambda world: world.rebuild(),
    "pull": lambda world: world.pull(),
}
