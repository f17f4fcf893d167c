"""Which tasks of the served state are on no disk of this machine yet: they come when asked for."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from vllm_vlora.checkpoint.manifest import TASKS_FOLDER
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin.blend_paths import is_blend_path, named_in
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.identity import TaskPath

# Of a worker's time, at most, for counting files.
_SHARE = 0.01


class FarTasks:
    """Of one worker, whose checkpoint was taken without its tasks (``VLLM_VLORA_FETCH=asked``)."""

    def __init__(self) -> None:
        self._counted: tuple[Path, int] | None = None
        self._count_again = 0.0
        self._number = 0

    def has(self, state: State | None, path: TaskPath) -> bool:
        """Whether a path's task, or one that it is a blend of, has to be fetched."""
        if state is None:
            return False
        if is_blend_path(path):
            tasks = [state.in_blends.get(name) for name in named_in(path)]
        else:
            tasks = [state.tasks.get(str(path))]
        return any(task is not None and state.checkpoint.is_far(task) for task in tasks)

    def count(self, state: State | None) -> int:
        """How many tasks of a state have to be fetched, as of a moment ago."""
        if state is None:
            return 0
        with suppress(OSError):
            self._look(state.checkpoint)
        return self._number

    def _look(self, checkpoint: Checkpoint) -> None:
        folder, began = checkpoint.path / TASKS_FOLDER, time.monotonic()
        found = folder, folder.stat().st_mtime_ns
        other = self._counted is None or self._counted[0] != folder
        if other or (found != self._counted and began >= self._count_again):
            self._counted, self._number = found, checkpoint.count_far()
            now = time.monotonic()
            self._count_again = now + (now - began) / _SHARE
