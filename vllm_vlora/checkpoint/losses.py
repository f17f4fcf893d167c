"""What stored tasks lost: from when on it is said, and from when on such a task is not stored.

The relative error of a task is e = ||delta_W' - delta_W||_F / ||delta_W||_F over its modules. e^2 is the
part of the update that is lost, so that at 1 leaving the task out loses no more, and above it less. What
that costs of the gain of the task's adapter is predicted from it (:func:`predicted_loss`); only the model
can measure it. Every way of storing tasks goes through :func:`refuse_worthless`, and all that shows tasks
through :class:`Losses`.
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

SHARED_LOSS = 2.5
"""How much more a loss of a shared basis costs a task than one of its own factors.

What a basis drops is what sets a task apart from the others. Measured on a family of eight adapters
(examples/collections): at 16, 32 and 64 times smaller, the recovered fraction that was lost for each
unit of squared error was 3.4, 2.4 and 2.3 times as large with a joint basis as with private factors; on
eight unrelated adapters it was the same. On nine hard collections any number from 2 to 3 chooses alike,
and best (docs/decisions.md).
"""
NOTED_LOSS = 0.05
"""Tasks that are predicted to lose more than this part of their gain are named."""
WORTHLESS_ERROR = 1.0
"""Tasks with a relative error above this are refused: leaving them out would lose less."""
_ROUNDING = 1e-6
# A collection may have a thousand such tasks.
_NAMED_TASKS = 10


@dataclass(frozen=True)
class Losses:
    """What must be said of some tasks.

    Attributes:
        above: task id -> predicted loss, of those above :data:`NOTED_LOSS`, the greatest first.
        lost_modules: task id -> its modules of whose update nothing is left (an error of 1 or more),
            however small the error of the task is.
        no_update: tasks whose LoRA weights change nothing: B, or A, is zero in every module, as before
            training.
        judged: tasks of which the model has measured what they keep, where it was asked.
    """

    above: dict[str, float] = field(default_factory=dict)
    lost_modules: dict[str, list[str]] = field(default_factory=dict)
    no_update: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        tasks: Mapping[str, TaskRecord],
        modules: Sequence[ModuleSpec],
        seen: Mapping[str, float] | None = None,
    ) -> Losses:
        """Of tasks by id, as their records have them.

        Args:
            modules: the checkpoint's.
            seen: task id -> its relative error as a calibrated model sees it, from which its loss is
                predicted in place of the recorded one.
        """
        above, none, by_module = {}, [], {}
        for task, entry in entries(tasks):
            error = entry.error if seen is None else seen[task]
            above[task] = predicted_loss(error, entry.representation)
            if entry.no_update:
                none.append(task)
            if entry.lost_modules:
                segments = tasks[task].segments
                by_module[task] = {modules[s.module].name: s.error for s in segments}
        return cls.measured(above, by_module, none)

    @classmethod
    def measured(
        cls,
        predicted: Mapping[str, float | None],
        by_module: Mapping[str, Mapping[str, float | None]],
        no_update: Sequence[str],
    ) -> Losses:
        """Of predicted losses by task, and relative errors by task and module; None: not known."""
        above = {task: loss for task, loss in predicted.items() if loss and loss > NOTED_LOSS}
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
            "noted_above": NOTED_LOSS,
            "above": self.above,
            "lost_modules": self.lost_modules,
            "no_update": self.no_update,
            **({"judged": self.judged} if self.judged else {}),
        }


def describe_losses(
    losses: Mapping[str, Any], advice: str = "evaluate before you rely on them, or allow more bytes"
) -> list[str]:
    """``Losses.to_dict`` as lines for a person; ``advice`` is for tasks that lost much."""
    lines = []
    above, lost, none = losses["above"], losses["lost_modules"], losses["no_update"]
    if above:
        if above.keys() <= set(losses.get("judged", ())):
            advice = "the KL kept of each was measured"
        named = some_of((f"{task} {loss:.0%}" for task, loss in above.items()), _NAMED_TASKS)
        lines.append(
            f"Predicted to lose more than {losses['noted_above']:.0%} of what the adapter gains: "
            f"{named}; {advice}"
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


def predicted_loss(error: float, representation: str) -> float:
    """The part of an adapter's gain that a task with this relative error is expected to lose, 0 to 1.

    error^2, the part of the update that is lost, and :data:`SHARED_LOSS` times that where any of the task
    is stored otherwise than ``private``.
    """
    return min(loss_counts(representation) * error**2, 1.0)


def loss_counts(representation: str) -> float:
    """How many times a squared error counts in the predicted loss of a task that is stored so."""
    return 1.0 if representation == "private" else SHARED_LOSS


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
