"""Every operation's result against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from clock import poisoned_memory
from harness import WrongResultError

from kernelbench.batches import Batch
from kernelbench.forward import Operation

# ||result - reference|| / ||what was added|| of one token and slice. The roundings to 16 bits that the
# operations agree on add up to about a quarter of it.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check_operation(operation: Operation, batch: Batch) -> float:
    """The largest error of a token and slice, over the first, the middle and the last copy.

    Raises:
        WrongResultError: it is above the tolerance, or not a number.
    """
    worst = 0.0
    for copy in sorted({0, operation.copies // 2, operation.copies - 1}):
        _prepare(operation, batch)
        with poisoned_memory():
            operation.run(copy)
        added = operation.expected(copy)
        wanted = batch.before.double() + added if operation.adds else added
        worst = max(worst, _compare(operation, batch, wanted, added, f"copy {copy}"))
    return worst


def check_replay(
    operation: Operation, batch: Batch, direct: Callable[[], object], replay: Callable[[], object]
) -> None:
    """Compare a graph's replay with the same calls made directly.

    Raises:
        WrongResultError: they differ by more than the tolerance.
    """
    _prepare(operation, batch)
    direct()
    wanted = batch.y.double()
    added = wanted - batch.before.double() if operation.adds else wanted
    _prepare(operation, batch)
    replay()
    _compare(operation, batch, wanted, added, "as a graph")


def check_equal(name: str, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    """Compare what was copied.

    Raises:
        WrongResultError: a tensor differs.
    """
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if not torch.equal(one, other):
            raise WrongResultError(f"{name}: tensor {place} is not what was copied")


def _prepare(operation: Operation, batch: Batch) -> None:
    if operation.adds:
        batch.y.copy_(batch.before)
    else:
        batch.y.fill_(torch.nan)


def _compare(
    operation: Operation,
    batch: Batch,
    wanted: torch.Tensor,
    added: torch.Tensor,
    what: str,
) -> float:
    widths = batch.layer.widths
    errors = _norms(batch.y.double() - wanted, widths) / _norms(added, widths)
    limit = TOLERANCE[batch.y.dtype]
    # Written so that NaN fails.
    if not bool((errors <= limit).all()):
        bad = int((~(errors <= limit)).any(dim=1).sum())
        raise WrongResultError(
            f"{batch.cell}: {operation.label} ({what}): {bad} of {len(errors)} tokens are wrong, error "
            f"up to {errors.nan_to_num(torch.inf).max():.2g}, at most {limit:g} is rounding"
        )
    return float(errors.max())


def _norms(values: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """``[tokens, slices]``."""
    return torch.stack([part.norm(dim=1) for part in values.split(widths, dim=1)], dim=1)
