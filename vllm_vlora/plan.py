"""Choose ranks and number formats under a budget, by measured error.

Pure: tensors and numbers in, a choice out. Two measurements give, for every choice there is, what
it would cost and what it would lose, without trying the choices one by one:

- ``measure_private``: rows are packed independently, so quantising the balanced SVD factors once at
  full rank gives the error of every truncation from small Gram matrices.
- ``JointMeter``: the rows of a packed basis are orthonormalised in order, so one core at full width
  gives the error of every shorter basis.

Each thing to choose is a *chain* of options (bytes, loss). On the lower convex hull of a chain
every step has a smaller gain per byte than the one before it, so taking steps of all chains by
falling gain per byte is optimal at every budget that it meets exactly (Shoham and Gersho,
*Efficient bit allocation for an arbitrary set of quantizers*, 1988).
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, pack, row_nbytes, unpack
from vllm_vlora.representations import balanced_svd

_BUDGET_ROUNDS = 6
# Chains that get a second look where the budget or the error limit cuts the path: only the bytes of
# about one step are at stake there, however many chains there are.
_FILLED_CHAINS = 256
_TRIMMED_CHAINS = 16
Point = tuple[int, float]
"""(bytes, loss) of an option."""


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrivateOption:
    """One way to store one module of one task privately.

    Attributes:
        format: number format. rank: rows kept.
        original: the adapter's own factors rather than its balanced SVD factors.
        nbytes: of the packed factors. loss: ||delta_W' - delta_W||_F^2.
    """

    format: str
    rank: int
    original: bool
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class PrivateCurve:
    """Losses of one module of one task in one format, held compactly between passes.

    Attributes:
        format: number format. row_nbytes: of a row of A and one of B transposed.
        losses: ||delta_W' - delta_W||_F^2 for the first 1, 2, ... balanced SVD factors.
        original_rank, original_loss: the adapter's own factors instead, at their whole rank.
    """

    format: str
    row_nbytes: int
    losses: array[float]
    original_rank: int
    original_loss: float

    @property
    def count(self) -> int:
        """Number of options: the adapter's own factors, then every rank of the SVD factors."""
        return 1 + len(self.losses)

    def option(self, number: int) -> PrivateOption:
        """Option 0 is the adapter's own factors, option t the first t SVD factors."""
        if number == 0:
            rank, loss = self.original_rank, self.original_loss
        else:
            rank, loss = number, self.losses[number - 1]
        return PrivateOption(self.format, rank, number == 0, rank * self.row_nbytes, loss)

    def points(self, weight: float) -> list[Point]:
        """(bytes, weighted loss) of every option."""
        points = [(self.original_rank * self.row_nbytes, self.original_loss * weight)]
        row = self.row_nbytes
        return points + [(rank * row, loss * weight) for rank, loss in enumerate(self.losses, 1)]


@dataclass(frozen=True)
class JointOption:
    """Numbers of components and format of one module's shared basis."""

    format: str
    k_out: int
    k_in: int


def squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """||scale * B A||_F^2 in float64 from the factors' Gram matrices."""
    a, b = a.double(), b.double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) * scale**2


def measure_private(
    a: torch.Tensor, b: torch.Tensor, scale: float, formats: Sequence[str], own_format: str
) -> list[PrivateCurve]:
    """Measure every rank in every format.

    Args:
        a: (r, d_in). b: (d_out, r). scale: of B A.
        formats: the formats to try.
        own_format: the one in which the adapter's own factors lose nothing.

    Raises:
        ValueError: a value does not fit a format.
    """
    rank, d_in, d_out = a.shape[0], a.shape[1], b.shape[0]
    norm = squared_norm(a, b, scale)
    svd_a, svd_b, _ = balanced_svd(a, b, scale)
    curves = []
    for format in formats:
        # One packing and one Gram matrix a side serve the SVD factors and the adapter's own.
        exact = format == own_format
        new_a, new_b = (svd_a, svd_b.T) if exact else (torch.cat([svd_a, a]), _cat_rows(svd_b, b))
        kept = svd_a.shape[0]
        packed_a = unpack(pack(new_a, format)).double()
        packed_b = unpack(pack(new_b, format)).double()
        packed_b[kept:] *= scale
        cross = ((packed_b @ b.double()) * (packed_a @ a.double().T)).sum(dim=1) * scale
        gram = (packed_b @ packed_b.T) * (packed_a @ packed_a.T)
        squares = gram[:kept, :kept].cumsum(0).cumsum(1).diagonal()
        losses = (norm - 2 * cross[:kept].cumsum(0) + squares).clamp(min=0).tolist()
        whole = norm - 2 * float(cross[kept:].sum()) + float(gram[kept:, kept:].sum())
        row = row_nbytes(format, d_in) + row_nbytes(format, d_out)
        own_loss = 0.0 if exact else max(whole, 0.0)
        curves.append(PrivateCurve(format, row, array("d", losses), rank, own_loss))
    return curves


def _cat_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left, right], dim=1).T.contiguous()


class JointMeter:
    """What each number of components of a packed basis loses of a task.

    Args:
        u: U transposed, packed, (k_out, d_out). v: V, packed, (k_in, d_in).
        grid: the numbers of components to measure, each cut to k_out and k_in.
    """

    def __init__(self, u: PackedMatrix, v: PackedMatrix, grid: Sequence[int]) -> None:
        self._q_u = torch.linalg.qr(unpack(u).double().T)[0]
        self._q_v = torch.linalg.qr(unpack(v).double().T)[0]
        self._grid = torch.tensor(list(grid))

    def captured(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """Part of ||delta_W||_F^2 that the first k components hold, for each k of the grid.

        With least-squares cores (``dual_rows``) that were not rounded, the rest is the loss.
        """
        left = (self._q_u.T @ b.double()) * scale
        squares = (left @ (a.double() @ self._q_v)).square()
        # An entry (i, j) of the core is kept by every k above both i and j.
        count = max(squares.shape)
        gains = torch.zeros(count, dtype=torch.float64)
        gains[: squares.shape[0]] += squares.tril().sum(dim=1)
        gains[: squares.shape[1]] += squares.triu(1).sum(dim=0)
        return gains.cumsum(0)[self._grid.clamp(max=count) - 1]


# Rounding two factors to p significant bits loses about 2 (2^-p)^2 / 6 of the squared norm; measured
# on random cores: 5.5e-6 for bfloat16 (p = 8), 9e-8 for float16 (p = 11).
_CORE_ROUNDING = {"float32": 0.0, "bfloat16": 5.5e-6, "float16": 9e-8}


def joint_losses(captured: torch.Tensor, norm: float, core_format: str) -> torch.Tensor:
    """||delta_W' - delta_W||_F^2 from what is captured, with the expected rounding of the core."""
    return (norm - captured).clamp(min=0) + _CORE_ROUNDING[core_format] * captured


def dual_rows(packed: PackedMatrix) -> torch.Tensor:
    """Rows D with D M^T = 1 for the matrix M as packed: the transposed pseudo-inverse, float32.

    Quantised basis rows are not quite orthonormal. Projecting on their dual gives the least-squares
    core U^+ delta_W V^+ instead of U^T delta_W V^T, which loses less.
    """
    q, r = torch.linalg.qr(unpack(packed).double().T)
    return torch.linalg.solve_triangular(r, q.T, upper=True).float()


def component_grid(most: int) -> list[int]:
    """Numbers of components worth considering, 1 .. most: all up to 32, then in steps of 1/16."""
    grid, value = [], 1
    while value < most:
        grid.append(value)
        value += max(1, value // 16)
    return [*grid, most]


def core_shape(rank: int, k_out: int, k_in: int) -> tuple[str, int, int]:
    """(form, rank, elements) of the core that ``encode_joint`` makes of a task of this rank."""
    kept = min(rank, k_out, k_in)
    if k_out * k_in < rank * (k_out + k_in):
        return "dense", kept, k_out * k_in
    return "factors", kept, kept * (k_out + k_in)


def joint_nbytes(
    option: JointOption, d_out: int, d_in: int, ranks: Sequence[int], core_format: str
) -> int:
    """Bytes of one module's basis and of the cores of tasks with these ranks."""
    basis = option.k_out * row_nbytes(option.format, d_out)
    basis += option.k_in * row_nbytes(option.format, d_in)
    elements = sum(core_shape(rank, option.k_out, option.k_in)[2] for rank in ranks)
    return basis + elements * FLOAT_DTYPES[core_format].itemsize


# --- choosing ------------------------------------------------------------------------------------


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Indices of the lower convex hull, from the fewest bytes to the least loss, both strict."""
    hull: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        nbytes, loss = points[index]
        if hull and loss >= points[hull[-1]][1]:
            continue
        # Sorted by (bytes, loss), so equal bytes with a smaller loss cannot come later.
        while len(hull) >= 2:
            (n0, l0), (n1, l1) = points[hull[-2]], points[hull[-1]]
            if (l0 - l1) * (nbytes - n1) > (l1 - loss) * (n1 - n0):
                break
            hull.pop()
        hull.append(index)
    return hull


@dataclass(frozen=True, slots=True)
class Step:
    """Moving one chain on to its next option on the hull."""

    chain: int
    option: int
    nbytes: int
    gain: float


@dataclass(frozen=True)
class StepPath:
    """Where every chain starts (fewest bytes), and all steps by falling gain per byte.

    ``points`` gives the options of a chain again; they are not kept, being many.
    """

    points: Callable[[int], Sequence[Point]]
    start: list[int]
    start_nbytes: int
    steps: list[Step]

    def prefix(self, count: int) -> list[int]:
        """The option of every chain after ``count`` steps."""
        chosen = list(self.start)
        for step in self.steps[:count]:
            chosen[step.chain] = step.option
        return chosen


def build_path(count: int, points: Callable[[int], Sequence[Point]]) -> StepPath:
    """Hull of each of ``count`` chains, and their steps merged."""
    start, start_nbytes, steps = [], 0, []
    for number in range(count):
        options = points(number)
        hull = lower_hull(options)
        start.append(hull[0])
        start_nbytes += options[hull[0]][0]
        for before, after in itertools.pairwise(hull):
            nbytes = options[after][0] - options[before][0]
            steps.append(Step(number, after, nbytes, options[before][1] - options[after][1]))
    # The hull makes gains per byte fall along a chain, and the sort is stable, so the steps of a
    # chain stay in order also where rounding makes two of them equal.
    steps.sort(key=lambda step: -step.gain / step.nbytes)
    return StepPath(points, start, start_nbytes, steps)


def allocate(path: StepPath, budget: int) -> list[int] | None:
    """The option of every chain that loses least in ``budget`` bytes; None if nothing fits."""
    room = budget - path.start_nbytes
    if room < 0:
        return None
    chosen = list(path.start)
    blocked: dict[int, None] = {}
    for step in path.steps:
        if step.chain in blocked:
            continue
        if step.nbytes > room:
            blocked[step.chain] = None
            continue
        chosen[step.chain] = step.option
        room -= step.nbytes
    # The step that did not fit may span options which do: those above the hull between its ends.
    for chain in itertools.islice(blocked, _FILLED_CHAINS):
        points = path.points(chain)
        nbytes, loss = points[chosen[chain]]
        fitting = [i for i, point in enumerate(points) if point[0] <= nbytes + room]
        best = min(fitting, key=lambda i: (points[i][1], points[i][0]))
        if points[best][1] < loss:
            room -= points[best][0] - nbytes
            chosen[chain] = best
    return chosen


def cheapest_within(chains: Sequence[Sequence[Point]], limit: float) -> list[int] | None:
    """The options with the fewest bytes whose losses sum to at most ``limit``; None if none do."""
    path = build_path(len(chains), chains.__getitem__)

    def total(chosen: list[int]) -> float:
        return math.fsum(points[option][1] for points, option in zip(chains, chosen))

    count = shortest_prefix(path, lambda chosen: total(chosen) <= limit)
    if count is None:
        return None
    chosen = path.prefix(count)

    def good(chain: int, option: int) -> bool:
        return total([*chosen[:chain], option, *chosen[chain + 1 :]]) <= limit

    trim(path, count, chosen, good)
    return chosen


def trim(path: StepPath, count: int, chosen: list[int], good: Callable[[int, int], bool]) -> None:
    """Give each of the chains that the last steps moved the fewest bytes that still are ``good``.

    The last step overshoots what was asked for, by as much as the span of one step.

    Args:
        path, count: ``chosen`` are the options after that many steps of the path; changed in place.
        good: whether (chain, option) may replace what is chosen.
    """
    last = dict.fromkeys(step.chain for step in reversed(path.steps[:count]))
    for chain in itertools.islice(last, _TRIMMED_CHAINS):
        points = path.points(chain)
        nbytes, _ = points[chosen[chain]]
        smaller = [i for i, point in enumerate(points) if point[0] < nbytes]
        # Most of the options that save much lose too much; a look at all of them is still cheap.
        for option in sorted(smaller, key=points.__getitem__):
            if good(chain, option):
                chosen[chain] = option
                break


def shortest_prefix(path: StepPath, good: Callable[[list[int]], bool]) -> int | None:
    """The least number of steps after which ``good`` holds, which must be monotone; None if never.

    Losses fall along the path for every task, so bisection finds it.
    """
    low, high = 0, len(path.steps)
    if not good(path.prefix(high)):
        return None
    while low < high:
        middle = (low + high) // 2
        if good(path.prefix(middle)):
            high = middle
        else:
            low = middle + 1
    return low


def fit_to_budget(
    path: StepPath, sizes: Callable[[list[int]], tuple[int, int]], limit: int
) -> list[int] | None:
    """Allocate so that the files, headers included, take at most ``limit`` bytes; None if not.

    Headers depend a little on what is chosen, so the allocation is repeated with the overhead that
    the last one had until it fits with the overhead it assumed.

    Args:
        path: the steps of all chains.
        sizes: (bytes of the tensors, bytes of the files) of chosen options.
        limit: bytes that the files may take.
    """
    data, files = sizes(path.start)
    best = list(path.start) if files <= limit else None
    overhead = files - data
    for _ in range(_BUDGET_ROUNDS):
        chosen = allocate(path, limit - overhead)
        if chosen is None:
            break
        data, files = sizes(chosen)
        if files <= limit:
            best = chosen
            if files - data >= overhead:
                break
            overhead = files - data
        else:
            overhead = max(files - data, overhead + files - limit)
    return best
