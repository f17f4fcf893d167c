"""Judges a compressed checkpoint by running the base model on held-out text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_vlora.adapters.collection import Progress, common_base_model
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_files import find_data
from vllm_vlora.errors import OptionError, TaskNotFoundError
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator
from vllm_vlora.wording import some_of


@dataclass(frozen=True)
class _Given:
    """Tasks that are not in a checkpoint yet, for whom ``find_data`` looks."""

    path: Path
    tasks: Mapping[str, Adapter]

    def record(self, task: str) -> Adapter:
        """The task's adapter; TaskNotFoundError where there is none."""
        if task not in self.tasks:
            raise TaskNotFoundError(f"there is no task {task!r}; it has: {some_of(self.tasks)}")
        return self.tasks[task]


def make_judge(
    adapters: Mapping[str, Adapter], base: str | None, data: list[str], progress: Progress
) -> Callable[[Path], dict[str, float | None]]:
    """A function that gives the recovered fraction of every task of a checkpoint folder.

    Raises:
        OptionError: no base model is named, or a task has no data.
    """
    files = find_data(_Given(Path("the adapters"), adapters), data)
    missing = [task for task in adapters if task not in files]
    if missing:
        raise OptionError(
            f"judging needs held-out text of every task; {missing[0]!r} has none: give "
            "--data TASK=FILE, or a folder with TASK.jsonl"
        )
    base = base or common_base_model(adapters)[0]
    if base is None:
        raise OptionError("the adapters name no base model; give it with --base MODEL")
    progress("load the base model", 0, 1)
    evaluator = Evaluator(base, files, EvaluationOptions(greedy_tokens=0))
    for task, adapter in adapters.items():
        evaluator.choose_tokenizer(task, adapter.path)

    def judge(folder: Path) -> dict[str, float | None]:
        checkpoint, found = Checkpoint.open(folder), dict[str, float | None]()
        for done, (task, adapter) in enumerate(adapters.items(), 1):
            with tempfile.TemporaryDirectory(prefix="vllm-vlora-") as root:
                exported = export_task(checkpoint, task, Path(root) / "task", dtype=torch.float32)
                compared = evaluator.compare(task, exported, adapter.path, losses_only=True)
            found[task] = compared.recovered.value
            progress("judge", done, len(adapters))
        return found

    return judge
