"""Fit the layers of a subspace to adapters, put tasks on them, take one adapter in without a refit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_vlora.adapters.peft_folder import Factors
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.fitting.flat_basis import fit_flat
from vllm_vlora.fitting.shared_basis import fit_bases
from vllm_vlora.representations.factors import (
    ReadFactors,
    ScaledFactors,
    changes_nothing,
    product_norm,
    squared_norm,
)
from vllm_vlora.representations.factors import relative as relative_error
from vllm_vlora.representations.joint import split_core
from vllm_vlora.subspace.algebra import gram_schmidt, select_num_components
from vllm_vlora.subspace.layers import FlatLayer, JointLayer, Layer, Loadings
from vllm_vlora.subspace.members import Member
from vllm_vlora.subspace.tasks import TaskOrigin, TaskProjection
from vllm_vlora.subspace.weights import LayerShape

_OVERSAMPLE = 8
# In memory, ranks together up to this many are fitted exactly; beyond it the randomised method, whose
# time does not grow with the square of them.
_EXACT_RANK = 2048
# Singular values of a core below this share of the greatest are rounding of float32 products.
_LEAST_SINGULAR = 3e-6


@dataclass(frozen=True)
class Choice:
    """How many components a layer keeps.

    ``num_components`` for every layer and side (fewer where there are no more). With ``threshold``: the
    fewest that hold this share of the variance, each layer and side its own number where ``adaptive``,
    else the greatest of these for all; ``num_components`` is then the most.
    """

    num_components: int | None
    threshold: float | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.num_components is not None and self.num_components < 1:
            raise OptionError(f"num_components is {self.num_components}; give at least 1")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise OptionError(
                f"variance_threshold is {self.threshold}; give a share above 0 and at most 1"
            )


def fit_layers(
    members: Sequence[Member], representation: str, choice: Choice, *, exact: bool
) -> dict[str, Layer]:
    """Fit what the tasks share, layer by layer; singular values are left to :func:`with_spectra`.

    Args:
        exact: take all adapters of a layer at once where that is feasible; else stream them.

    Raises:
        AdapterError: flat, and the ranks of a layer differ.
        OptionError: an unknown representation.
    """
    holders = _holders(members, representation)
    fitter = _FITTERS[representation]
    for name, having in holders.items():
        fitter.check(name, having)
    layers: dict[str, Layer] = {}
    for name in sorted(holders):
        shapes = [member.shapes[name] for member in holders[name]]
        layers[name] = _fit(fitter, _reader(holders[name], name), shapes, choice, exact)
    if choice.threshold is None:
        return layers
    found = {
        name: _wanted(layer, _reader(holders[name], name), choice.threshold)
        for name, layer in layers.items()
    }
    if not choice.adaptive:
        common = max(max(widths) for widths in found.values())
        found = dict.fromkeys(found, (common, common))
    return {name: layer.cut(*found[name]) for name, layer in layers.items()}


def warn_of_few(
    members: Sequence[Member], representation: str, num_components: int, stacklevel: int
) -> None:
    """Say where more components are asked for than any layer of these adapters has.

    Args:
        stacklevel: of the caller's caller, as of ``warnings.warn`` in the caller.

    Raises:
        OptionError: an unknown representation.
    """
    holders = _holders(members, representation)
    fitter = _FITTERS[representation]
    most = max(
        fitter.most([member.shapes[name] for member in having]) for name, having in holders.items()
    )
    if num_components > most:
        warnings.warn(
            f"num_components is {num_components}, but there are only {most} ({fitter.limit}); all of "
            "them are kept",
            stacklevel=stacklevel + 1,
        )


def project_member(layers: Mapping[str, Layer], member: Member) -> TaskProjection:
    """Put an adapter on the layers and measure what that loses.

    A flat layer in which it has an update of zero is left out of the task: the nearest point that the
    components hold is hardly ever zero.

    Raises:
        AdapterError: flat, and its rank is another one; or its shapes do not fit.
    """
    names = [name for name in layers if name in member.shapes]
    for name in names:
        check_fits(member, name, layers[name])
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    losses: dict[str, tuple[float, float]] = {}
    for name, (a, b, scale) in member.read(names):
        layer = layers[name]
        if isinstance(layer, FlatLayer) and changes_nothing(a, b, scale):
            continue
        wanted = a.float().to(layer.device), scale * b.float().to(layer.device)
        loadings = layer.project(*wanted)
        losses[name] = difference(wanted, layer.factors(loadings))
        first[name] = loadings[0]
        if loadings[1] is not None:
            second[name] = loadings[1]
    errors, error = relative(losses)
    origin = TaskOrigin(
        dict(member.metadata),
        dict(member.read_extra()),
        errors,
        error,
        member.original_nbytes,
        member.source,
        member.has_scale,
        member.renamed,
    )
    return TaskProjection(member.task_id, first, second, origin)


def check_fits(member: Member, name: str, layer: Layer) -> None:
    """Refuse an adapter whose layer has other dimensions than the subspace's, or flat another rank.

    Raises:
        AdapterError: naming the task and the layer.
    """
    shape = member.shapes[name]
    if (shape.d_in, shape.d_out) != (layer.d_in, layer.d_out):
        raise AdapterError(
            f"layer {name!r} is {shape.d_out} x {shape.d_in} in task {member.task_id!r} and "
            f"{layer.d_out} x {layer.d_in} in the subspace; use adapters of its base model only"
        )
    if isinstance(layer, FlatLayer) and shape.rank != layer.rank:
        raise AdapterError(
            f"layer {name!r} has rank {shape.rank} in task {member.task_id!r}, and the flat subspace "
            f'holds adapters of rank {layer.rank} there; use representation="joint", or compress'
        )


def with_spectra(layers: Mapping[str, Layer], tasks: Iterable[TaskProjection]) -> dict[str, Layer]:
    """The layers with the singular values of these tasks."""
    held = list(tasks)
    return {
        name: layer.with_spectrum([task.at(name) for task in held if name in task])
        for name, layer in layers.items()
    }


def difference(old: Factors, new: Factors) -> tuple[float, float]:
    """(||B' A' - B A||^2, ||B A||^2) of two pairs of factors (A, B), in float64."""
    (a, b), (a_new, b_new) = old, new
    stacked_a = torch.cat([a_new.detach().double(), a.detach().double()])
    stacked_b = torch.cat([b_new.detach().double(), -b.detach().double()], dim=1)
    return product_norm(stacked_a, stacked_b), squared_norm(a.detach(), b.detach(), 1.0)


def relative(losses: Mapping[str, tuple[float, float]]) -> tuple[dict[str, float], float]:
    """Relative errors by layer and over all, from squared differences and norms."""
    errors = {name: relative_error(lost, norm) for name, (lost, norm) in losses.items()}
    lost, norm = (sum(part) for part in zip((0.0, 0.0), *losses.values()))
    return errors, relative_error(lost, norm)


def core_rank(core: Tensor) -> int:
    """The rank of a core, 1 at least: singular values that are above the rounding of its dtype."""
    values = torch.linalg.svdvals(core.detach().double())
    floor = max(2 * torch.finfo(core.dtype).eps, _LEAST_SINGULAR) * float(values[0])
    return max(1, int((values > floor).sum()))


def take_in(
    layer: Layer, tasks: Sequence[Loadings], a: Tensor, b_scaled: Tensor, choice: Choice
) -> tuple[Layer, list[Loadings]]:
    """A layer fitted to its tasks, as they are stored, and to one more adapter, without reading any.

    All of them lie in the span of the layer's basis and of what is new in the adapter. The fit is done on
    their coordinates there, and so costs nothing that grows with tasks times d. It is the fit that
    ``fit_layers`` makes of the reconstructed tasks; what it cuts off is lost to the old tasks as well.

    Returns:
        (the layer, the loadings on it of the tasks and, last, of the adapter).
    """
    a, b_scaled = a.float().to(layer.device), b_scaled.float().to(layer.device)
    wide = layer.to(None, torch.float32)
    if isinstance(wide, FlatLayer):
        new, loadings = _take_in_flat(wide, tasks, a, b_scaled, choice)
    else:
        new, loadings = _take_in_joint(wide, tasks, a, b_scaled, choice)
    return new.to(None, layer.dtype), [
        (first.to(layer.dtype), None if second is None else second.to(layer.dtype))
        for first, second in loadings
    ]


def _take_in_flat(
    layer: FlatLayer, tasks: Sequence[Loadings], a: Tensor, b_scaled: Tensor, choice: Choice
) -> tuple[Layer, list[Loadings]]:
    rest_a, rest_b = (a - layer.mean_a).flatten(), (b_scaled.T - layer.mean_b).flatten()
    span_a = gram_schmidt(layer.components_a.flatten(1), rest_a[None])
    span_b = gram_schmidt(layer.components_b.flatten(1), rest_b[None])
    points = [_padded_pair(pair, len(span_a), len(span_b)) for pair in tasks]
    points.append((span_a @ rest_a, span_b @ rest_b))
    small = _fit_points(points, layer.kind, choice)
    loadings = [small.project(p_a[None], p_b[:, None]) for p_a, p_b in points]
    moved = dataclasses.replace(
        small,
        mean_a=layer.mean_a + (small.mean_a[0] @ span_a).view_as(layer.mean_a),
        components_a=(small.components_a[:, 0] @ span_a).view(-1, *layer.mean_a.shape),
        mean_b=layer.mean_b + (small.mean_b[0] @ span_b).view_as(layer.mean_b),
        components_b=(small.components_b[:, 0] @ span_b).view(-1, *layer.mean_b.shape),
    )
    return moved, loadings


def _fit_points(points: Sequence[tuple[Tensor, Tensor]], kind: str, choice: Choice) -> FlatLayer:
    """A flat layer of rank 1 for points in coordinates of either side, (q_a,) and (q_b,)."""
    device = points[0][0].device
    sides = []
    for side in (0, 1):
        rows = [pair[side].cpu() for pair in points]
        # The fit takes two sides of one width: a point on both is the factors of a rank-1 adapter.
        factors = [(row[None], row[:, None], 1.0) for row in rows]
        shapes = [LayerShape(len(row), len(row), 1, kind) for row in rows]
        fit = _fit_small(factors, shapes, "flat", choice)
        assert isinstance(fit, FlatLayer)
        sides.append(fit.to(device, None))
    a, b = sides
    values = torch.zeros(len(a.components_a)), torch.zeros(len(b.components_a))
    return FlatLayer(a.mean_a, a.components_a, b.mean_a, b.components_a, *values, kind)


def _take_in_joint(
    layer: JointLayer, tasks: Sequence[Loadings], a: Tensor, b_scaled: Tensor, choice: Choice
) -> tuple[Layer, list[Loadings]]:
    span_u, span_v = gram_schmidt(layer.u.T, b_scaled.T), gram_schmidt(layer.v, a)
    wide = JointLayer(span_u.T, span_v, torch.zeros(len(span_v)), torch.zeros(len(span_u)))
    factors: list[ScaledFactors] = []
    for loadings in tasks:
        core = wide.widened((loadings[0].float(), None))[0]
        right, left_t = split_core(core, core_rank(core))
        factors.append((right, left_t.T, 1.0))
    factors.append((a @ span_v.T, span_u @ b_scaled, 1.0))
    shapes = [LayerShape(len(span_v), len(span_u), f[0].shape[0], layer.kind) for f in factors]
    small = _fit_small(factors, shapes, "joint", choice)
    assert isinstance(small, JointLayer)
    cores = [small.project(p_a, p_b) for p_a, p_b, _ in factors]
    return dataclasses.replace(small, u=span_u.T @ small.u, v=small.v @ span_v), cores


def _fit_small(
    factors: Sequence[ScaledFactors],
    shapes: Sequence[LayerShape],
    representation: str,
    choice: Choice,
) -> Layer:
    device = factors[0][0].device
    held = [(a.cpu(), b.cpu(), scale) for a, b, scale in factors]
    fitter = _FITTERS[representation]
    layer = _fit(fitter, lambda: iter(held), shapes, choice, exact=True)
    if choice.threshold is not None:
        layer = layer.cut(*_wanted(layer, lambda: iter(held), choice.threshold))
    return layer.to(device, None)


class _Fitter(Protocol):
    """How layers of one representation are fitted.

    Attributes:
        limit: in words, what there are at most as many components as.
    """

    limit: str

    def check(self, layer: str, members: Sequence[Member]) -> None:
        """Raise AdapterError where these adapters cannot share the layer."""

    def most(self, shapes: Sequence[LayerShape]) -> int:
        """The most components that a layer of these adapters can have on either side."""

    def fit(
        self, read: ReadFactors, shapes: Sequence[LayerShape], k: int, exact: bool
    ) -> FlatLayer | JointLayer:
        """One layer with k components."""


class _FlatFitter:
    limit = "adapters less one, since their mean is kept beside the components"

    def check(self, layer: str, members: Sequence[Member]) -> None:
        first = members[0]
        for member in members:
            ours, theirs = first.shapes[layer].rank, member.shapes[layer].rank
            if ours != theirs:
                raise AdapterError(
                    f"layer {layer!r} has rank {ours} in task {first.task_id!r} and rank {theirs} in "
                    f"task {member.task_id!r}, and a flat subspace holds one rank; use "
                    'representation="joint", or compress'
                )

    def most(self, shapes: Sequence[LayerShape]) -> int:
        first, points = shapes[0], max(1, len(shapes) - 1)
        return min(points, first.rank * max(first.d_in, first.d_out))

    def fit(
        self, read: ReadFactors, shapes: Sequence[LayerShape], k: int, exact: bool
    ) -> FlatLayer:
        first = shapes[0]
        spare = max(_OVERSAMPLE, len(shapes) - k) if exact else _OVERSAMPLE
        found = fit_flat(read, first.rank, first.d_in, first.d_out, k, oversample=spare)
        return FlatLayer.from_fit(found, first.kind)


class _JointFitter:
    limit = "the ranks of the adapters together, or the layers' size"

    def check(self, layer: str, members: Sequence[Member]) -> None:
        pass  # Ranks may differ.

    def most(self, shapes: Sequence[LayerShape]) -> int:
        return min(_total_rank(shapes), max(shapes[0].d_in, shapes[0].d_out))

    def fit(
        self, read: ReadFactors, shapes: Sequence[LayerShape], k: int, exact: bool
    ) -> JointLayer:
        first, together = shapes[0], _total_rank(shapes)
        in_memory = exact and together <= _EXACT_RANK
        spare = max(_OVERSAMPLE, together - k) if in_memory else _OVERSAMPLE
        u_t, v = fit_bases(read, first.d_in, first.d_out, k, oversample=spare)
        empty = torch.zeros(len(v)), torch.zeros(len(u_t))
        return JointLayer(u_t.T.contiguous(), v, *empty, first.kind)


_FITTERS: dict[str, _Fitter] = {"flat": _FlatFitter(), "joint": _JointFitter()}


def _fit(
    fitter: _Fitter, read: ReadFactors, shapes: Sequence[LayerShape], choice: Choice, exact: bool
) -> Layer:
    """One layer with as many components as may be kept."""
    most = fitter.most(shapes)
    k = most if choice.num_components is None else min(choice.num_components, most)
    return fitter.fit(read, shapes, k, exact)


def _wanted(layer: Layer, read: ReadFactors, threshold: float) -> tuple[int, int]:
    """How many components of each side hold the share; in the order of the layer's ``widths``."""
    points = [layer.project(a, scale * b.float()) for a, b, scale in read()]
    spectrum = layer.with_spectrum(points)
    k_a = select_num_components(spectrum.singular_values_a, threshold)
    k_b = select_num_components(spectrum.singular_values_b, threshold)
    return (k_a, k_b) if isinstance(layer, FlatLayer) else (k_b, k_a)


def _holders(members: Sequence[Member], representation: str) -> dict[str, list[Member]]:
    """Layer -> the adapters that have it."""
    if representation not in _FITTERS:
        raise OptionError(
            f"representation is {representation!r}; give one of {', '.join(_FITTERS)}"
        )
    holders: dict[str, list[Member]] = {}
    for member in members:
        for name in member.shapes:
            holders.setdefault(name, []).append(member)
    return holders


def _reader(members: Sequence[Member], layer: str) -> ReadFactors:
    def read() -> Iterator[ScaledFactors]:
        for member in members:
            for _, factors in member.read([layer]):
                yield factors

    return read


def _total_rank(shapes: Sequence[LayerShape]) -> int:
    return sum(min(shape.rank, shape.d_in, shape.d_out) for shape in shapes)


def _padded_pair(pair: Loadings, k_a: int, k_b: int) -> tuple[Tensor, Tensor]:
    first, second = pair
    assert second is not None
    pad: Callable[..., Tensor] = torch.nn.functional.pad
    return pad(first.float(), (0, k_a - len(first))), pad(second.float(), (0, k_b - len(second)))
