"""What stored tasks lost: from when on it is said, and from when on such a task is not stored.

The relative error of a task is e = ||delta_W' - delta_W||_F / ||delta_W||_F over its modules. e^2 is the
part of the update that is lost, so that at 1 leaving the task out loses no more, and above it less. Every
way of storing tasks goes through :func:`refuse_worthless`, and all that shows tasks through
:class:`Losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.task_entry import LOST_MODULE, entries
from vllm_vlora.errors import BudgetError
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.wording import count_of, some_of

NOTED_ERROR = 0.5
"""Tasks with a relative error above this are named: a quarter of their update is lost."""
WORTHLESS_ERROR = 1.0
"""Tasks with a relative error above this are refused: leaving them out would lose less."""
_ROUNDING = 1e-6
# A collection may have a thousand such tasks.
_NAMED_TASKS = 10


@dataclass(frozen=True)
class Losses:
    """What must be said of some tasks.

    Attributes:
        above: task id -> relative error, of those above :data:`NOTED_ERROR`, the greatest first.
        lost_modules: task id -> its modules of whose update nothing is left (an error of 1 or more),
            however small the error of the task is.
        no_update: tasks whose LoRA weights change nothing: B, or A, is zero in every module, as before
            training.
    """

    above: dict[str, float] = field(default_factory=dict)
    lost_modules: dict[str, list[str]] = field(default_factory=dict)
    no_update: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: Mapping[str, TaskRecord], modules: Sequence[ModuleSpec]) -> Losses:
        """Of tasks by id, as their records have them; ``modules`` are the checkpoint's."""
        errors, none, by_module = {}, [], {}
        for task, entry in entries(tasks):
            errors[task] = entry.error
            if entry.no_update:
                none.append(task)
            if entry.lost_modules:
                segments = tasks[task].segments
                by_module[task] = {modules[s.module].name: s.error for s in segments}
        return cls.measured(errors, by_module, none)

    @classmethod
    def measured(
        cls,
        errors: Mapping[str, float | None],
        by_module: Mapping[str, Mapping[str, float | None]],
        no_update: Sequence[str],
    ) -> Losses:
        """Of relative errors by task, and by task and module; None where there is none."""
        above = {task: e for task, e in errors.items() if e is not None and is_noted(e)}
        lost = {
            task: [name for name, e in found.items() if e is not None and e >= LOST_MODULE]
            for task, found in by_module.items()
        }
        return cls(
            dict(sorted(above.items(), key=lambda item: -item[1])),
            {task: names for task, names in lost.items() if names},
            list(no_update),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "noted_above": NOTED_ERROR,
            "above": self.above,
            "lost_modules": self.lost_modules,
            "no_update": self.no_update,
        }


def describe_losses(losses: Mapping[str, Any]) -> list[str]:
    """``Losses.to_dict`` as lines for a person."""
    lines = []
    above, lost, none = losses["above"], losses["lost_modules"], losses["no_update"]
    if above:
        named = some_of((f"{task} {error:.3g}" for task, error in above.items()), _NAMED_TASKS)
        lines.append(
            f"Large relative error, above {losses['noted_above']:g}: {named}; evaluate before you rely "
            "on them, or allow more bytes"
        )
    if lost:
        named = some_of(
            (f"{task} ({some_of(names, 2)})" for task, names in lost.items()), _NAMED_TASKS
        )
        count = count_of(sum(map(len, lost.values())), "module")
        lines.append(f"Nothing of the update is left in {count}, an error of 1 or more: {named}")
    if none:
        lines.append(
            f"No update, the LoRA weights are zero: {some_of(none, _NAMED_TASKS)}; was the adapter "
            "trained and saved whole?"
        )
    return lines


def is_noted(error: float) -> bool:
    """Whether a task with this relative error is named."""
    return error > NOTED_ERROR


def is_worthless(error: float) -> bool:
    """Whether a task with this relative error is worse than none."""
    return not error <= WORTHLESS_ERROR + _ROUNDING


def refuse_worthless(task_id: str, error: float, allowed: bool) -> None:
    """Refuse to store a task with this relative error.

    Args:
        allowed: what is worse than none may be stored; an error that is no number never.

    Raises:
        BudgetError: it is worse than leaving the task out.
    """
    if not math.isfinite(error):
        raise BudgetError(
            f"task {task_id!r} would be stored with values that are not finite; store it private, "
            "with dtype float32 or bfloat16"
        )
    if is_worthless(error) and not allowed:
        raise worthless_error(task_id, error)


def worthless_error(task_id: str, error: float) -> BudgetError:
    """The refusal of a task with this relative error."""
    return BudgetError(
        f"task {task_id!r} would be stored with a relative error of {error:.3g}, which is worse than "
        "leaving it out; use representation auto or private, allow more bytes, or ask for it with "
        "--allow-large-error (allow_large_error=True)"
    )
