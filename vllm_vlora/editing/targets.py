"""What new tasks may take or lose, and why each is stored as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_vlora.checkpoint.losses import SHARED_LOSS
from vllm_vlora.compression.budgets import MARGIN
from vllm_vlora.compression.options import DEFAULT_LOSS
from vllm_vlora.editing.new_tasks import NewTasks
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.projection import Target, TaskPlan, TaskPlanner
from vllm_vlora.errors import BudgetError

# A new task is poor when its error is this many times that of the poorest one of the checkpoint: one that
# the bases were not fitted to always has a somewhat greater one.
POOR = 1.5


def targets(
    new: NewTasks, options: AddOptions, planners: Sequence[TaskPlanner]
) -> tuple[list[Target], str]:
    """What each new task may take or lose, and that in words."""
    sizes = [adapter.original_nbytes for adapter in new.collection.adapters]
    if options.max_error is not None:
        limit = (options.max_error * (1 - MARGIN)) ** 2
        seen = "" if options.calibration is None else ", as the calibrated model sees it"
        return [Target(loss=limit)] * len(sizes), f"a relative error of {options.max_error:g}{seen}"
    if options.max_bytes is not None:
        total = sum(sizes)
        shares = [options.max_bytes * size // total for size in sizes]
        return [Target(share) for share in shares], f"{options.max_bytes} bytes together"
    if options.ratio is None and options.quantize == "none":
        return [Target()] * len(sizes), "what is exact"
    ratio = new.checkpoint.ratio if options.ratio is None else options.ratio
    if ratio <= 1:
        return [Target()] * len(sizes), "no limit of bytes"
    if options.ratio is not None:
        return [Target(math.floor(size / ratio)) for size in sizes], f"{ratio:g}x"
    found = [_default(new, planner, size) for planner, size in zip(planners, sizes)]
    words = f"{ratio:.2f}x, the checkpoint's ratio, bases counted"
    if any(target.nbytes is None for target in found):
        words += "; more for tasks that would lose far more than those it has"
    return found, words


def _default(new: NewTasks, planner: TaskPlanner, size: int) -> Target:
    """The checkpoint's ratio; more bytes, as many as it takes, for a task that would be too poor.

    Whoever compressed relatives to a small part of their size wants no stranger at that ratio. Where
    hardly anything was lost so far, hardly anything is.
    """
    target = Target(math.floor(size / new.checkpoint.ratio))
    plan = planner.best(target)
    limit = _bearable(new, planner)
    if plan is not None and plan.loss <= limit:
        return target
    return Target() if planner.best(Target(loss=limit)) is None else Target(loss=limit)


def _bearable(new: NewTasks, planner: TaskPlanner) -> float:
    """The squared error that a new task may have when nothing is said of it.

    With a calibration it is one that the model sees, and what the checkpoint records of its tasks, the
    error of the weights, only bounds it: no new task may lose more than by that measure.
    """
    if new.worst_predicted > DEFAULT_LOSS:
        return (new.worst_error * POOR) ** 2
    limit = DEFAULT_LOSS * (1 - MARGIN)
    plan = planner.best(Target(loss=limit))
    return limit / SHARED_LOSS if plan is None or plan.cores else limit


def plan_within(
    new: NewTasks, options: AddOptions, planner: TaskPlanner, target: Target, task: int
) -> TaskPlan:
    """The best plan of one new task within its target; BudgetError where there is none."""
    plan = planner.best(target)
    if plan is not None:
        return plan
    task_id = new.collection.task_ids[task]
    if target.loss is not None:
        least = planner.best(Target())
        assert least is not None
        raise BudgetError(
            f"task {task_id!r} cannot be kept within a relative error of "
            f"{options.max_error}; the least reachable is {least.error:.3g}; allow a "
            "larger error, or quantize none or auto"
        )
    nbytes = planner.least_nbytes()
    original = new.collection.adapters[task].original_nbytes
    raise BudgetError(
        f"task {task_id!r} does not fit into {target.nbytes} bytes; the least is {nbytes}: give "
        f"a ratio of at most {math.floor(original / nbytes * 100) / 100:g}, or allow more bytes"
    )


def why(
    planner: TaskPlanner, plan: TaskPlan, private: TaskPlan | None, charge: int, target: Target
) -> str:
    """One line that says why a new task is stored as it is."""
    if not any(choice.cores for choice in planner.choices):
        return "none of its modules has a joint basis, the kind that new tasks can stand on"
    held = f"the shared bases hold {planner.carried:.1%} of it"
    if not plan.cores:
        least = math.sqrt(max(1 - planner.carried, 0.0))
        return f"{held}; on them it would lose {least:.3f} at least, so private factors keep more"
    rows = f", and {charge} bytes of new rows more" if charge else ""
    if private is None:
        return f"{held}{rows}; all private it would not fit"
    if target.loss is not None:
        return f"{held}{rows}; all private it would take {private.nbytes} bytes, not {plan.nbytes}"
    return f"{held}{rows}; all private it would lose {private.error:.3f}, not {plan.error:.3f}"
