"""Merge adapters into one: weighted sum, TIES and DARE.

A merge is one of updates delta_W = s B A, not of factors. The weighted sum of updates is exact in
stacked factors:

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n]

TIES and DARE choose single elements of delta_W, so their result has full rank. It is formed one layer
at a time, (d_out x d_in) in float32, and cut to a rank by SVD; what the cut lost is reported.

Sources: Task Arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099; PEFT's
``LoraModel.add_weighted_adapter``, whose combination types the functions name.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_vlora.adapters.collection import other_bases
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.quantize import is_finite
from vllm_vlora.representations.factors import balanced_svd, changes_nothing, squared_norm
from vllm_vlora.representations.spec import fits_float32
from vllm_vlora.subspace.weights import (
    LoRAWeights,
    Update,
    base_models,
    called,
    exact_config,
    in_memory,
    under_shared_names,
)
from vllm_vlora.wording import count_of

SPACES = ("weights", "factors")
SIGN_METHODS = ("total", "frequency")

_RANK_OPTIONS = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
# On 576 x 576 power iterations were six times faster than a dense SVD, and lost as much to 10 digits.
_MOST_EXACT = 128
_OVERSAMPLING = 16
_ITERATIONS = 8
# Rows of a large matrix that are held in float64 at a time.
_ROWS_AT_ONCE = 1024


@dataclass
class MergedWeights(LoRAWeights):
    """A merged adapter, and what cutting it to its rank lost.

    Attributes:
        truncation_errors: layer -> ||W' - W||_F / ||W||_F with W the whole merge and W' what the
            factors hold; 0 for what is exact.
        truncation_error: that of all layers together.
        seed: of the random masks; None for methods without.
    """

    truncation_errors: dict[str, float] = field(default_factory=dict)
    truncation_error: float = 0.0
    seed: int | None = None

    @property
    def adds_nothing(self) -> list[str]:
        """Layers whose update is zero."""
        names = self.layer_names
        return [n for n in names if changes_nothing(self.lora_a[n], self.lora_b[n], 1.0)]


def task_arithmetic(
    adapters: Sequence[Update],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
) -> MergedWeights:
    """The weighted sum of updates, sum_i w_i delta_W_i.

    Without ``rank`` it is exact, of rank sum r_i: PEFT's ``cat``. With ``rank`` it is the best
    approximation of that rank: PEFT's ``svd``. vlora averages A and B apart and leaves alpha out, so
    that its result is (sum w_i B_i) (sum w_i A_i), which is another update.

    Args:
        adapters: in memory or opened; ranks, alphas and layers may differ; a layer that one lacks adds
            nothing.
        weights: one each, of any sign. Default: 1 / N, the mean.
        rank: the most that a layer may have.

    Returns:
        Weights of scale 1 (``lora_alpha`` = r).

    Raises:
        OptionError: no adapters, or weights or a rank that make no sense.
        AdapterError: a layer has different shapes or kinds, or two adapters have different heads.

    Examples:
        >>> merged = task_arithmetic(adapters[:2], weights=[0.7, 0.3])
        >>> merged.rank, merged.truncation_error
        (4, 0.0)
    """
    chosen = _checked_weights(adapters, weights, 1 / max(len(adapters), 1))
    _check_rank(rank)

    def merge(name: str, parts: Sequence[_Part]) -> _Merged:
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.weight * part.scale * part.b for part in parts], dim=1)
        return _cut_factors(a, b, rank)

    return _merged(adapters, chosen, merge)


def ties_merge(
    adapters: Sequence[Update],
    density: float = 0.5,
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    space: str = "weights",
    majority_sign_method: str = "total",
) -> MergedWeights:
    """TIES: keep each update's largest elements, elect a sign for each place, average what agrees.

    For each element, with t_i = delta_W_i where |delta_W_i| is among its ``density`` largest, else 0,
    and the elected sign g = sign(sum_i t_i), + for a sum of zero:

        merged = sum_{i: sign(t_i) = g} w_i t_i / |{i: sign(t_i) = g}|

    This is PEFT's ``ties_svd``, and ``ties`` with ``space="factors"``. vlora does it on the factors,
    leaves alpha out, and divides by the number of adapters twice: its default weights are 1 / N.

    Args:
        adapters: ranks, alphas and layers may differ (in factors: equal ranks).
        density: share of elements to keep, 0 < density <= 1.
        weights: one each. Default: 1, which makes the merge a mean of what agrees.
        rank: of the result in each layer. Default: the largest rank there among the adapters.
        space: ``weights`` for delta_W; ``factors`` for A and B apart, as PEFT's ``ties`` does: nothing
            is cut then, but the product of merged factors is not the merge of the updates.
        majority_sign_method: ``total`` elects by the sum of values, ``frequency`` by their number.

    Returns:
        Weights of scale 1; ``truncation_error`` says what cutting to the rank lost.

    Raises:
        OptionError, AdapterError: as :func:`task_arithmetic`.

    Examples:
        >>> merged = ties_merge(adapters, density=0.5)
        >>> merged.rank, 0 < merged.truncation_error < 1
        (2, True)
    """
    chosen = _checked_weights(adapters, weights, 1.0)
    if not 0 < density <= 1:
        raise OptionError(f"density {density} is out of range; give one above 0 and up to 1")
    if majority_sign_method not in SIGN_METHODS:
        raise OptionError(
            f"majority_sign_method {majority_sign_method!r} is unknown; give one of {SIGN_METHODS}"
        )

    def elementwise(name: str, side: str, terms: Sequence[_Term]) -> torch.Tensor:
        return _ties(terms, density, majority_sign_method == "frequency")

    return _elementwise(adapters, chosen, elementwise, rank, space)


def dare_merge(
    adapters: Sequence[Update],
    drop_rate: float = 0.5,
    weights: Sequence[float] | None = None,
    seed: int | None = None,
    *,
    rank: int | None = None,
    space: str = "weights",
) -> MergedWeights:
    """DARE: drop elements of each update at random, rescale the rest, and add up.

    With m_i = 1 with probability 1 - ``drop_rate`` and else 0, for every element by itself,

        merged = sum_i w_i m_i delta_W_i / (1 - drop_rate)

    whose expected value is the weighted sum. This is PEFT's ``dare_linear_svd``, and ``dare_linear``
    with ``space="factors"`` (density = 1 - drop_rate), but for the random numbers. vlora does it on the
    factors and leaves alpha out.

    Args:
        adapters: ranks, alphas and layers may differ (in factors: equal ranks).
        drop_rate: 0 <= drop_rate < 1.
        weights: one each. Default: 1 / N.
        seed: of the masks, which depend on it, the layer's name and the adapter's place only: neither
            on the device nor on other layers. None draws one from torch's generator;
            the result's ``seed`` names it.
        rank, space: as of :func:`ties_merge`.

    Returns:
        Weights of scale 1; ``truncation_error`` says what cutting to the rank lost.

    Raises:
        OptionError, AdapterError: as :func:`task_arithmetic`.

    Examples:
        >>> once, again = (dare_merge(adapters, drop_rate=0.5, seed=42) for _ in range(2))
        >>> bool(torch.equal(once.lora_b["layers.0.q_proj"], again.lora_b["layers.0.q_proj"]))
        True
    """
    chosen = _checked_weights(adapters, weights, 1 / max(len(adapters), 1))
    if not 0 <= drop_rate < 1:
        raise OptionError(f"drop_rate {drop_rate} is out of range; give one from 0 to below 1")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    kept = 1 - drop_rate

    def elementwise(name: str, side: str, terms: Sequence[_Term]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for term in terms:
            value = term.value()
            value = value * (dare_mask(seed, name, side, term.place, value.shape, kept) / kept).to(
                value.device
            )
            total = term.weight * value if total is None else total.add_(value, alpha=term.weight)
        assert total is not None
        return total

    merged = _elementwise(adapters, chosen, elementwise, rank, space)
    merged.seed = seed
    return merged


MERGE_METHODS: dict[str, Callable[..., MergedWeights]] = {
    "average": task_arithmetic,
    "ties": ties_merge,
    "dare": dare_merge,
}
"""vlora's names of the methods."""


def dare_mask(
    seed: int, layer: str, side: str, place: int, shape: Sequence[int], kept: float
) -> torch.Tensor:
    """The mask of DARE: float32 ones with probability ``kept``, else zeros, on the CPU.

    Args:
        side: ``W`` for delta_W, ``A`` or ``B`` for a factor. place: of the adapter in its list.
    """
    identity = hashlib.sha256(f"{seed}\n{place}\n{side}\n{layer}".encode()).digest()
    # torch takes any 64 bits as a seed, with the sign bit.
    generator = torch.Generator().manual_seed(int.from_bytes(identity[:8], "little", signed=True))
    return torch.empty(*shape).bernoulli_(kept, generator=generator)


# --- one layer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One adapter's share of a layer: weight * scale * B A.

    Attributes:
        place: of the adapter in its list. whose: what errors call the adapter.
    """

    place: int
    whose: str
    weight: float
    scale: float
    a: torch.Tensor
    b: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer's update, (d_out, d_in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class _Term:
    """A tensor with its weight; ``value`` makes it, so that only some exist at a time."""

    place: int
    weight: float
    value: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Merged:
    """Factors of scale 1, with the squared norms of what they lost and of the whole."""

    a: torch.Tensor
    b: torch.Tensor
    lost: float
    norm: float


_Elementwise = Callable[[str, str, Sequence[_Term]], torch.Tensor]


def _ties(terms: Sequence[_Term], density: float, by_count: bool) -> torch.Tensor:
    """Three passes over terms that are made anew each time: memory does not grow with their number."""
    limits = []
    votes: torch.Tensor | None = None
    for term in terms:
        value = term.value()
        limits.append(_trim_limit(value, density))
        trimmed = _trimmed(value, limits[-1])
        vote = trimmed.sign() if by_count else trimmed
        votes = vote if votes is None else votes + vote
    assert votes is not None
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, agreeing = torch.zeros_like(votes), torch.zeros_like(votes)
    for term, limit in zip(terms, limits):
        trimmed = _trimmed(term.value(), limit)
        agrees = trimmed.sign() == elected
        total += torch.where(agrees, trimmed, 0.0) * term.weight
        agreeing += agrees
    return total / agreeing.clamp(min=1)


def _trim_limit(value: torch.Tensor, density: float) -> float:
    """The absolute value of the last element that is kept; infinite where none is."""
    count = value.numel()
    kept = int(density * count)
    if kept == 0:
        return math.inf
    return float(value.abs().flatten().kthvalue(count - kept + 1).values)


def _trimmed(value: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.where(value.abs() >= limit, value, 0.0)


def _cut_factors(a: torch.Tensor, b: torch.Tensor, rank: int | None) -> _Merged:
    """B A with at most ``rank`` rows, and never more than its shape allows."""
    most = min(a.shape[1], b.shape[0], rank or a.shape[0])
    if a.shape[0] <= most:
        return _Merged(a.contiguous(), b.contiguous(), 0.0, squared_norm(a, b, 1.0))
    short_a, short_b, sigma = balanced_svd(a, b, 1.0)
    energy = sigma.square()
    lost = float(energy[most:].sum())
    # Beyond its rank a product's singular values are rounding.
    lost = 0.0 if lost <= 1e-12 * float(energy.sum()) else lost
    return _Merged(
        short_a[:most].contiguous(), short_b[:, :most].contiguous(), lost, float(energy.sum())
    )


def _cut_dense(matrix: torch.Tensor, rank: int) -> _Merged:
    """The best (nearly, if it is large) approximation of a matrix of this rank."""
    # Rows of float32 are not quite orthonormal, and what is lost is a small difference.
    right = torch.linalg.qr(_leading_rows(matrix, min(rank, *matrix.shape)).double().T).Q.T
    projected = torch.cat([rows.double() @ right.T for rows in matrix.split(_ROWS_AT_ONCE)])
    left, sigma, turn = torch.linalg.svd(projected, full_matrices=False)
    root = sigma.sqrt()
    norm = sum(float(rows.double().square().sum()) for rows in matrix.split(_ROWS_AT_ONCE))
    lost = norm - float(sigma.square().sum())
    # What is left of float32 numbers beyond their rank is rounding.
    lost = 0.0 if lost <= 1e-12 * norm else lost
    a, b = root[:, None] * (turn @ right), left * root
    return _Merged(a.float().contiguous(), b.float().contiguous(), lost, norm)


def _leading_rows(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """(rank, d_in) orthonormal rows that span the leading right singular vectors."""
    if min(matrix.shape) <= _MOST_EXACT:
        return torch.linalg.svd(matrix.double(), full_matrices=False)[2][:rank]
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], width, generator=generator).to(matrix)
    rows = torch.linalg.qr(matrix.T @ start).Q
    for _ in range(_ITERATIONS):
        columns = torch.linalg.qr(matrix @ rows).Q
        rows = torch.linalg.qr(matrix.T @ columns).Q
    turn = torch.linalg.svd(matrix @ rows, full_matrices=False)[2]
    return turn[:rank] @ rows.T


# --- all layers -----------------------------------------------------------------------------------


def _elementwise(
    adapters: Sequence[Update],
    weights: Sequence[float],
    combine: _Elementwise,
    rank: int | None,
    space: str,
) -> MergedWeights:
    """Merge elementwise, on delta_W or on the factors."""
    if space not in SPACES:
        raise OptionError(f"space {space!r} is unknown; give one of {SPACES}")
    _check_rank(rank)
    if space == "factors" and rank is not None:
        raise OptionError("in factors the rank stays as it is; give a rank with space='weights'")

    def on_updates(name: str, parts: Sequence[_Part]) -> _Merged:
        for part in parts:
            _check_formed(name, part)
        terms = [_Term(part.place, part.weight, _update_maker(part)) for part in parts]
        merged = combine(name, "W", terms)
        _check_finite(name, merged)
        return _cut_dense(merged, rank or max(len(part.a) for part in parts))

    def on_factors(name: str, parts: Sequence[_Part]) -> _Merged:
        a, b = (combine(name, side, list(_factor_terms(name, side, parts))) for side in "AB")
        return _Merged(a.contiguous(), b.contiguous(), 0.0, squared_norm(a, b, 1.0))

    return _merged(adapters, weights, on_factors if space == "factors" else on_updates)


def _update_maker(part: _Part) -> Callable[[], torch.Tensor]:
    return lambda: (part.b @ part.a) * part.scale


def _check_formed(name: str, part: _Part) -> None:
    """Refuse an update whose elements float32 cannot hold, as it would be formed.

    Raises:
        AdapterError: they would be infinite, or all zero.
    """
    limits, scale = torch.finfo(torch.float32), abs(part.scale)
    most = len(part.a) * float(part.a.abs().max()) * float(part.b.abs().max())
    norm = math.sqrt(squared_norm(part.a, part.b, 1.0))
    mean = norm / math.sqrt(part.b.shape[0] * part.a.shape[1])
    if most * max(scale, 1.0) > limits.max or (
        scale > 0 and 0 < mean * min(scale, 1.0) < limits.tiny
    ):
        raise AdapterError(
            f"layer {name} of {part.whose} has an update beyond float32's range, with a norm of "
            f"{norm * scale:.1e}; merge with task_arithmetic, which forms no update"
        )


def _check_finite(name: str, *tensors: torch.Tensor) -> None:
    if not all(map(is_finite, tensors)):
        raise AdapterError(
            f"layer {name} of the merge holds values too large for float32; give smaller weights"
        )


def _factor_terms(name: str, side: str, parts: Sequence[_Part]) -> Iterator[_Term]:
    """A's or B's with the root of weight and scale each, as PEFT shares them out; the sign is A's."""
    for part in parts:
        if len(part.a) != len(parts[0].a):
            raise AdapterError(
                f"layer {name} has rank {len(parts[0].a)} in {parts[0].whose} and "
                f"{len(part.a)} in {part.whose}; factors of different ranks do not match, "
                "merge with space='weights'"
            )
        product = part.weight * part.scale
        root = math.sqrt(abs(product))
        if side == "A":
            yield _Term(part.place, math.copysign(root, product), lambda a=part.a: a)  # type: ignore[misc]
        else:
            yield _Term(part.place, root, lambda b=part.b: b)  # type: ignore[misc]


def _merged(
    given: Sequence[Update],
    weights: Sequence[float],
    merge: Callable[[str, Sequence[_Part]], _Merged],
) -> MergedWeights:
    adapters = under_shared_names(in_memory(given))
    names = [called(adapter, place) for place, adapter in enumerate(adapters)]
    kinds, extra = _common_kinds(adapters, names), common_extra([a.extra for a in adapters], names)
    lora_a, lora_b, errors = {}, {}, {}
    lost = norm = 0.0
    for name in sorted({name for adapter in adapters for name in adapter.layer_names}):
        found = merge(name, list(_parts(adapters, weights, name)))
        _check_finite(name, found.a, found.b)
        lora_a[name], lora_b[name] = found.a, found.b
        errors[name] = math.sqrt(found.lost / found.norm) if found.norm > 0 else 0.0
        lost, norm = lost + found.lost, norm + found.norm
    merged = MergedWeights(
        layer_names=list(lora_a),
        lora_a=lora_a,
        lora_b=lora_b,
        rank=max(map(len, lora_a.values())),
        metadata=common_config([a.metadata for a in adapters], [a.layer_names for a in adapters]),
        kinds=kinds,
        extra=extra,
        truncation_errors=errors,
        truncation_error=math.sqrt(lost / norm) if norm > 0 else 0.0,
    )
    merged.metadata = exact_config(merged)
    bases = base_models(a.metadata for a in adapters)
    if len(bases) > 1:
        taken, advice = f"merged as {bases[0]}'s", "the merge is of no use"
        warnings.warn(other_bases(bases, taken, advice), stacklevel=4)
    return merged


def _parts(adapters: Sequence[LoRAWeights], weights: Sequence[float], name: str) -> Iterator[_Part]:
    first: _Part | None = None
    for place, (adapter, weight) in enumerate(zip(adapters, weights)):
        if name not in adapter.lora_a:
            continue
        a, b = adapter.lora_a[name].float(), adapter.lora_b[name].float()
        part = _Part(place, called(adapter, place), weight, adapter.scale(name), a, b)
        first = first or part
        if part.shape != first.shape:
            raise AdapterError(
                f"layer {name} is {first.shape[0]} x {first.shape[1]} in {first.whose} and "
                f"{part.shape[0]} x {part.shape[1]} in {part.whose}; merge adapters of one base model "
                "only"
            )
        yield part


def _common_kinds(adapters: Sequence[LoRAWeights], names: Sequence[str]) -> dict[str, str]:
    kinds: dict[str, tuple[str, str]] = {}
    for whose, adapter in zip(names, adapters):
        for layer in adapter.layer_names:
            kind = adapter.kinds.get(layer, "linear")
            known, first = kinds.setdefault(layer, (kind, whose))
            if kind != known:
                raise AdapterError(
                    f"layer {layer} is {kind} in {whose} and {known} in {first}; merge adapters of "
                    "one base model only"
                )
    return {layer: kind for layer, (kind, _) in kinds.items() if kind != "linear"}


def common_extra(
    extras: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Classifier heads and the like of all; there is no sum of two, as they replace the base model's.

    Args:
        names: what errors call whose they are.

    Raises:
        AdapterError: two of one name differ.
    """
    extra: dict[str, torch.Tensor] = {}
    for whose, tensors in zip(names, extras, strict=True):
        for key, tensor in tensors.items():
            known = extra.setdefault(key, tensor)
            if not _same_bytes(known, tensor):
                raise AdapterError(
                    f"tensor {key} of {whose} differs from that of another one, and heads "
                    "cannot be merged; keep it in one of them only, or choose others"
                )
    return extra


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As bytes: torch compares no float8."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = (tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def unscaled_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says ranks and scales: ``LoRAWeights.scale`` is then 1."""
    return {key: value for key, value in config.items() if key not in _RANK_OPTIONS}


def common_config(
    configs: Sequence[Mapping[str, Any]], layers: Sequence[Collection[str]]
) -> dict[str, Any]:
    """The first config without ranks and scales, which are new, and with everybody's heads.

    Args:
        layers: the layers of each adapter. Where they differ, the first one's targets select too few,
            and the merge has none: ``exact_config`` then names layers in full.
    """
    config = unscaled_config(configs[0])
    if len({frozenset(names) for names in layers}) > 1:
        config.pop("target_modules", None)
    heads = [config.get("modules_to_save") or [] for config in configs]
    named = {name for head in heads for name in ([head] if isinstance(head, str) else head)}
    if named:
        config["modules_to_save"] = sorted(named)
    return config


def _checked_weights(
    adapters: Sequence[Update], weights: Sequence[float] | None, default: float
) -> list[float]:
    if not adapters:
        raise OptionError("no adapters given; name at least one to merge")
    if weights is None:
        return [default] * len(adapters)
    chosen = [float(weight) for weight in weights]
    if len(chosen) != len(adapters):
        raise OptionError(
            f"{count_of(len(chosen), 'weight')} for {count_of(len(adapters), 'adapter')}; give one "
            "weight each"
        )
    for weight in chosen:
        check_weight(weight)
    return chosen


def check_weight(weight: float, whose: str = "") -> None:
    """Refuse a weight that no scale can be.

    Raises:
        OptionError: it is not finite, or not in float32.
    """
    if not fits_float32(weight):
        raise OptionError(f"weight {weight!r}{whose} does not fit float32; give a number within it")


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is impossible; give a whole number above 0")
