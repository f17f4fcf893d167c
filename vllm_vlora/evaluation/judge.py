"""Judges compressed checkpoints by running the base model: on held-out text, or on text of its own.

Where there is no data, the model writes some with each original adapter: KL to it, on what it says
by itself, tells checkpoints apart as it does on held-out text; the error of weights does not.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_vlora.adapters.collection import Progress, common_base_model
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_files import find_data
from vllm_vlora.errors import OptionError, TaskNotFoundError, VLoRAError
from vllm_vlora.evaluation.base_model import quieten
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator
from vllm_vlora.evaluation.fidelity import kl_kept
from vllm_vlora.snapshots import model_weights
from vllm_vlora.wording import count_of, some_of

Found = dict[str, float | None]
"""Task -> KL kept; None where it is undefined."""

SAMPLED_TOKENS, SAMPLED_LENGTH = 256, 48
"""Tokens that the model writes for a task, and the most in one text."""
# Tasks differ in what a form does to them by more than tokens do: of four, the wrong form may keep most.
_LEAST_TASKS, _MOST_TASKS = 8, 16
# No more tasks are asked when the first form is ahead by so many standard errors over so many tasks.
_CLEARLY, _CLEARLY_TASKS = 4.0, 4
# Of a large matrix product's speed, what a model reaches on short texts.
_EFFICIENCY = 0.3
# Writing a token takes a pass of its own, which costs more than the token's share of a long one.
_WRITING_PASSES = 4


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
) -> Callable[[Path], Found]:
    """A function that gives the KL kept of every task of a checkpoint folder, on held-out text.

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
    quieten()
    progress("load the base model", 0, 1)
    evaluator = Evaluator(base, files, EvaluationOptions(greedy_tokens=0))
    for task, adapter in adapters.items():
        evaluator.choose_tokenizer(task, adapter.path)

    def judge(folder: Path) -> Found:
        checkpoint, found = Checkpoint.open(folder), Found()
        for done, (task, adapter) in enumerate(adapters.items(), 1):
            with tempfile.TemporaryDirectory(prefix="vllm-vlora-") as root:
                exported = export_task(checkpoint, task, Path(root) / "task", dtype=torch.float32)
                found[task] = evaluator.compare(task, exported, adapter.path).kl_kept.value
            progress("judge", done, len(adapters))
        return found

    return judge


# --- without data ---------------------------------------------------------------------------------


class SelfJudge:
    """Judges forms of one collection by KL kept on text that the model writes with each original.

    Tasks are taken from all over the collection, one after another, each in all forms, until one form is
    clearly ahead: 8 at least otherwise, 16 at most, and no longer than measuring the adapters took.

    Args:
        model: folder of the base model.
        always: judge every task, however long it takes; what stands in the way is then an error.

    Attributes:
        how: what a choice went by, for a report.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        model: Path,
        always: bool,
        progress: Progress,
    ) -> None:
        self._adapters, self._model, self._always = adapters, model, always
        self._progress = progress
        self._seconds = math.inf
        self.how = ""

    def declines(self, forms: int, seconds: float) -> str | None:
        """Why judging so many forms is not worth it, when measuring took so long; None where it is."""
        if self._always:
            return None
        if not fits_in_memory(self._model):
            return "the base model does not fit in half of the free memory (--judge asks it all the same)"
        expected = seconds_to_judge(self._model, len(self._adapters), forms)
        if expected > seconds:
            return (
                f"asking the base model would take some {expected:.0f} s, measuring took "
                f"{seconds:.0f} s (--judge asks it all the same)"
            )
        self._seconds = seconds
        return None

    def __call__(self, folders: Sequence[Path]) -> list[Found]:
        """KL kept of the tasks that were judged, for every checkpoint folder.

        Raises:
            OptionError, AdapterError, ModelMismatchError: as of ``Evaluator``, if always asked.
        """
        if len(folders) == 1 and not self._always:
            return [{}]
        try:
            return self._judge_all(folders)
        except VLoRAError as error:
            if self._always:
                raise
            self.how = f"the error of the weights; the base model cannot be asked: {error}"
            return [{} for _ in folders]

    def _judge_all(self, folders: Sequence[Path]) -> list[Found]:
        quieten()
        self._progress("load the base model", 0, 1)
        evaluator = Evaluator(self._model, {}, EvaluationOptions(batch_size=8, greedy_tokens=0))
        loaded = time.monotonic()
        checkpoints = [Checkpoint.open(folder) for folder in folders]
        found: list[Found] = [{} for _ in folders]
        order = _spread(list(self._adapters))
        order = order if self._always else order[:_MOST_TASKS]
        for done, task in enumerate(order, 1):
            self._progress("judge", done - 1, len(order))
            for kept, value in zip(found, self._judge(evaluator, checkpoints, task)):
                kept[task] = value
            late = (time.monotonic() - loaded) * (1 + 1 / done) > self._seconds
            if not self._always and (_is_clear(found) or (late and done >= _LEAST_TASKS)):
                break
        self._progress("judge", len(order), len(order))
        self.how = (
            f"KL kept on {SAMPLED_TOKENS} tokens that the model wrote with each of {len(found[0])} of "
            f"{count_of(len(self._adapters), 'adapter')}"
        )
        return found

    def _judge(
        self, evaluator: Evaluator, checkpoints: Sequence[Checkpoint], task: str
    ) -> list[float | None]:
        original = self._adapters[task].path
        rows = evaluator.sample(original, SAMPLED_TOKENS, SAMPLED_LENGTH)
        if not any(row.supervised for row in rows):
            return [None] * len(checkpoints)
        with tempfile.TemporaryDirectory(prefix="vllm-vlora-") as root:
            folders = [
                export_task(checkpoint, task, Path(root) / str(number), dtype=torch.float32)
                for number, checkpoint in enumerate(checkpoints)
            ]
            apart = evaluator.distances(rows, original, folders)
        return [kl_kept(divergences, resamples=0).value for divergences in apart]


def _is_clear(found: Sequence[Found]) -> bool:
    """Whether one form is ahead of all others by far more than tasks differ in."""
    values = [list(kept.values()) for kept in found]
    judged = [row for row in zip(*values) if None not in row]
    if len(judged) < _CLEARLY_TASKS:
        return False
    table = torch.tensor(judged, dtype=torch.float64)
    best = int(table.mean(0).argmax())
    ahead = table[:, best, None] - table
    others = [form for form in range(len(found)) if form != best]
    error = ahead.std(0) / math.sqrt(len(judged))
    return bool((ahead.mean(0)[others] > _CLEARLY * error[others]).all())


def _spread(tasks: list[str]) -> list[str]:
    """All tasks, such that the first few stand far apart: families are often listed together."""
    order: dict[str, None] = {}
    step = len(tasks)
    while step:
        order |= dict.fromkeys(tasks[::step])
        step //= 2
    return list(order)


def seconds_to_judge(model: Path, tasks: int, forms: int) -> float:
    """About how long ``SelfJudge`` takes on this machine, from the model's size and a matrix product.

    Args:
        model: its folder. tasks: of the collection. forms: checkpoints that are compared.
    """
    passes = 2 + forms + _WRITING_PASSES
    tokens = min(tasks, _LEAST_TASKS) * SAMPLED_TOKENS * passes
    return 2 * _parameters(model) * tokens / (_EFFICIENCY * _flops())


def fits_in_memory(model: Path) -> bool:
    """Whether the model, in float32 on a CPU, takes no more than half of the memory that is free."""
    if torch.cuda.is_available():
        return 2 * _parameters(model) < torch.cuda.mem_get_info()[0] / 2
    try:
        text = Path("/proc/meminfo").read_text()
    # Elsewhere than on Linux it is not known.
    except OSError:
        return True
    free = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.M)
    return free is None or 4 * _parameters(model) < int(free[1]) * 1024 / 2


def _parameters(model: Path) -> float:
    """At 16 bits each; of a model that is stored in 32 bits twice as many as there are."""
    return sum(file.stat().st_size for file in model_weights(model)) / 2


def _flops() -> float:
    """Floating-point operations a second of a matrix product, on the device that a model would get."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.rand(768, 768, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((square @ square)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best
