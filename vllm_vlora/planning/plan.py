"""Plans: a rank, width and number format for every module of every task, under a budget.

Bytes are those of the files, headers included, and known exactly. Losses come from a ``Survey``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_vlora.checkpoint.losses import SHARED_LOSS, loss_counts
from vllm_vlora.planning.private_curves import PrivateOption
from vllm_vlora.planning.survey import Group
from vllm_vlora.representations.spec import BasisSpec, FlatSpec

_CLEARLY = 0.98


@dataclass(frozen=True)
class SharedBasis:
    """A group's basis as planned: its widths, the format of its cores, and who shares it."""

    spec: BasisSpec
    core_format: str
    tasks: tuple[int, ...]
    factored: bool = False


@dataclass(frozen=True)
class SharedFlat:
    """A module's flat basis as planned, the format of the loadings, and who shares it."""

    spec: FlatSpec
    loadings_format: str
    tasks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice for every module of every task.

    Attributes:
        private: (task number, module name) -> option, of what is on no basis.
        joint: group -> basis. flat: module name -> flat basis.
        losses: of each task, ||delta_W' - delta_W||^2 / ||delta_W||^2 in the modules' metrics.
        data_nbytes: of the tensors. nbytes: of the files, headers included.
        private_losses: the part of ``losses`` that private modules have.
        raised: tasks that were given more than their share to pass the gate.
    """

    representation: str
    format: str
    private: Mapping[tuple[int, str], PrivateOption]
    joint: Mapping[Group, SharedBasis]
    flat: Mapping[str, SharedFlat]
    losses: torch.Tensor
    data_nbytes: int
    nbytes: int
    private_losses: torch.Tensor
    raised: tuple[int, ...] = ()

    @property
    def form(self) -> tuple[str, bool]:
        """What is judged apart from others: the representation, and whether clusters have bases."""
        return self.representation, any(number > 0 for _, number in self.joint)

    def keeps_the_same(self, other: Plan) -> bool:
        """Whether two plans write the same, whatever each is called."""
        mine, theirs = ((plan.private, plan.joint, plan.flat) for plan in (self, other))
        return mine == theirs

    @property
    def rms_error(self) -> float:
        """Root mean square of the tasks' relative errors."""
        return math.sqrt(float(self.losses.mean()))

    @property
    def likely_error(self) -> float:
        """``rms_error`` with what shared bases lose counted ``SHARED_LOSS`` times."""
        shared = (self.losses - self.private_losses).clamp(min=0)
        return math.sqrt(float((self.private_losses + SHARED_LOSS * shared).mean()))

    @property
    def mean_error(self) -> float:
        """Mean of the tasks' relative errors."""
        return float(self.losses.sqrt().mean())

    @property
    def worst_error(self) -> float:
        """The greatest relative error of a task."""
        return math.sqrt(float(self.losses.max()))

    @cached_property
    def blocks(self) -> dict[str, list[Block]]:
        """Module name -> the groups whose bases stand beside each other in its stored basis."""
        found: dict[str, list[Block]] = {}
        for (name, number), shared in sorted(self.joint.items()):
            before = found.setdefault(name, [])
            start_out, start_in = (before[-1].rows[1], before[-1].rows[3]) if before else (0, 0)
            rows = (start_out, start_out + shared.spec.k_out, start_in, start_in + shared.spec.k_in)
            before.append(Block((name, number), shared, rows))
        return found

    def stored_rows(self, block: Block) -> tuple[int, int, int, int] | None:
        """The rows of the stored basis that a core of this block names; None for all of them."""
        return block.rows if len(self.blocks[block.group[0]]) > 1 else None

    def basis_spec(self, name: str) -> BasisSpec | None:
        """Of a module's whole stored basis; None where it has none."""
        blocks = self.blocks.get(name)
        if not blocks:
            return None
        _, k_out, _, k_in = blocks[-1].rows
        return BasisSpec(k_out, k_in, blocks[0].shared.spec.format)


@dataclass(frozen=True)
class Block:
    """A group's rows (u_start, u_stop, v_start, v_stop) within the stored basis of its module."""

    group: Group
    shared: SharedBasis
    rows: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Budget:
    """What a plan may take, and what it may lose.

    Attributes:
        nbytes: of all files; None for as few as possible within ``limits``, or, without these, for
            no limit.
        limits: of each task, its largest ||delta_W' - delta_W||^2 / ||delta_W||^2.
        of_gain: limits are of the predicted loss of the task's gain, in which that counts as often as
            ``losses.loss_counts`` says.
    """

    nbytes: int | None = None
    limits: torch.Tensor | None = None
    of_gain: bool = False

    def of_kind(self, representation: str) -> Budget:
        """The budget for plans of a representation, with limits of the squared error."""
        if not self.of_gain or self.limits is None:
            return self
        return replace(self, limits=self.limits / loss_counts(representation), of_gain=False)

    @property
    def by_size(self) -> bool:
        """Whether the smallest plan is the best, and not the most faithful."""
        return self.nbytes is None and self.limits is not None

    def order(self, plan: Plan) -> tuple[float, float]:
        """Sorts plans that meet the budget, the best one first."""
        if self.by_size:
            return plan.nbytes, plan.rms_error
        return plan.likely_error, plan.nbytes

    def clearly_prefers(self, plan: Plan, other: Plan) -> bool:
        """Whether measuring the other plan's errors could not make it the better one."""
        if self.by_size:
            return plan.nbytes < other.nbytes
        return plan.likely_error < other.likely_error * _CLEARLY

    def is_perfect(self, plan: Plan) -> bool:
        """Whether no plan can be better."""
        return not self.by_size and plan.worst_error == 0

    def allows(self, losses: torch.Tensor) -> bool:
        """Whether every task is within its limit."""
        return self.limits is None or bool((losses <= self.limits).all())
