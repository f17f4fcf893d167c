"""What one layer's tasks share, in memory, and how a task's loadings become LoRA factors.

| layer      | shared                                          | loadings of a task          |
|------------|-------------------------------------------------|-----------------------------|
| FlatLayer  | mean and components of the flattened A and B    | k numbers for each of A, B  |
| JointLayer | bases U, V                                      | core C (k_out x k_in)       |

A task's alpha / r is folded into its B before, so delta_W = B A throughout.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vlora.adapters.peft_folder import Factors
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.fitting.flat_basis import FlatFit, project_flat
from vllm_vlora.planning.flat_curves import flat_rows
from vllm_vlora.quantize import FLOAT_DTYPES, FORMAT_OF_DTYPE, pack, unpack
from vllm_vlora.representations.stored import Basis, FlatBasis
from vllm_vlora.subspace.algebra import gram_schmidt

Loadings: TypeAlias = tuple[Tensor, Tensor | None]
"""Of one task in one layer: (loadings_a, loadings_b) of a flat layer, (core, None) of a joint one."""

# A basis whose Gram matrix is further from the identity than this was rounded or quantised.
_ORTHONORMAL = 1e-4
# Numbers of a tensor that tell a basis from another one.
_TELLING = 4096


@dataclass(frozen=True)
class FlatLayer:
    """Means and principal components of one layer's flattened factors; B is held transposed.

    A = mean_a + sum_j loadings_a[j] components_a[j], B^T = mean_b + sum_j loadings_b[j] components_b[j].

    Attributes:
        mean_a: (rank, d_in). components_a: (k_a, rank, d_in), orthonormal as flattened vectors.
        mean_b: (rank, d_out). components_b: (k_b, rank, d_out), likewise.
        singular_values_a, singular_values_b: (k_a,), (k_b,), of the tasks about their mean.
        kind: "linear" or "embedding".
        packed: means and components as they are stored, where they are quantised.

    Examples:
        >>> layer = subspace.layers["layers.0.q_proj"]
        >>> a, b = layer.factors(subspace.tasks["task_0"].at("layers.0.q_proj"))
        >>> a.shape, b.shape
        (torch.Size([2, 12]), torch.Size([8, 2]))
    """

    mean_a: Tensor
    components_a: Tensor
    mean_b: Tensor
    components_b: Tensor
    singular_values_a: Tensor
    singular_values_b: Tensor
    kind: str = "linear"
    packed: FlatBasis | None = None

    @classmethod
    def from_fit(cls, fit: FlatFit, kind: str = "linear") -> FlatLayer:
        """The layer of a fit; where one adapter left no variance, with its mean's own direction.

        So every layer has a component, which it can be trained along and stored with.
        """
        a = _never_empty(fit.mean_a, fit.components_a)
        b = _never_empty(fit.mean_b, fit.components_b)
        zeros = torch.zeros(len(a)), torch.zeros(len(b))
        return cls(fit.mean_a, a, fit.mean_b, b, *zeros, kind)

    @classmethod
    def from_basis(cls, basis: FlatBasis, kind: str = "linear") -> FlatLayer:
        """The layer of what a checkpoint stores; singular values are left to :meth:`with_spectrum`."""
        u, v = (unpack(side).float().view(-1, basis.rank, side.cols) for side in (basis.u, basis.v))
        packed = None if basis.u.format in FLOAT_DTYPES else basis
        if packed is None:
            dtype = FLOAT_DTYPES[basis.u.format]
            u, v = u.to(dtype), v.to(dtype)
        zeros = (torch.zeros(basis.k_in), torch.zeros(basis.k_out))
        return cls(v[0].clone(), v[1:].clone(), u[0].clone(), u[1:].clone(), *zeros, kind, packed)

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.mean_a.shape[0]

    @property
    def d_in(self) -> int:
        """Columns of A."""
        return self.mean_a.shape[1]

    @property
    def d_out(self) -> int:
        """Rows of B."""
        return self.mean_b.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """(k_a, k_b): components of A and of B."""
        return len(self.components_a), len(self.components_b)

    @property
    def k(self) -> int:
        """The greater of the two numbers of components."""
        return max(self.widths)

    @property
    def device(self) -> torch.device:
        """Where the basis lies."""
        return self.mean_a.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis."""
        return self.mean_a.dtype

    @property
    def format(self) -> str:
        """The number format that the basis is stored in (``quantize.FORMATS``)."""
        return self.packed.u.format if self.packed is not None else _float_format(self.dtype)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """The shapes of a task's loadings."""
        return self.widths[:1], self.widths[1:]

    def factors(self, loadings: Loadings) -> Factors:
        """(A (rank, d_in), B (d_out, rank)) with delta_W = B A; differentiable in the loadings."""
        loadings_a, loadings_b = loadings
        assert loadings_b is not None, "a flat layer takes two vectors of loadings"
        a = self.mean_a + torch.tensordot(loadings_a, self.components_a, 1)
        return a, (self.mean_b + torch.tensordot(loadings_b, self.components_b, 1)).T

    def project(self, a: Tensor, b_scaled: Tensor) -> Loadings:
        """Loadings of the point nearest to an adapter on each side.

        Args:
            a: (rank, d_in). b_scaled: (d_out, rank), times alpha / r.

        Raises:
            AdapterError: the adapter has another rank.
        """
        if a.shape[0] != self.rank:
            raise AdapterError(
                f"the adapter has rank {a.shape[0]}, a flat layer of rank {self.rank} holds adapters of "
                'that rank only; use representation="joint", or compress'
            )
        found = project_flat(self._dual_fit, a.to(self.device), b_scaled.to(self.device))
        return found[0].to(self.dtype), found[1].to(self.dtype)

    @cached_property
    def _dual_fit(self) -> FlatFit:
        """The layer as a fit on which products give loadings."""
        return FlatFit(
            self.mean_a.float(),
            _dual(self.components_a.flatten(1)).view_as(self.components_a),
            self.mean_b.float(),
            _dual(self.components_b.flatten(1)).view_as(self.components_b),
        )

    def cut(self, k_a: int, k_b: int) -> FlatLayer:
        """The layer with its first components only."""
        return dataclasses.replace(
            self,
            components_a=self.components_a[:k_a],
            components_b=self.components_b[:k_b],
            singular_values_a=self.singular_values_a[:k_a],
            singular_values_b=self.singular_values_b[:k_b],
        )

    def expanded(self, count: int, generator: torch.Generator | None = None) -> FlatLayer:
        """The layer with ``count`` random components more on each side, orthogonal to its own."""
        sides = []
        for components in (self.components_a, self.components_b):
            flat = components.flatten(1)
            drawn = torch.randn(count, flat.shape[1], generator=generator)
            more = gram_schmidt(flat, drawn.to(flat))
            sides.append(more.view(-1, *components.shape[1:]))
        return dataclasses.replace(
            self,
            components_a=sides[0],
            components_b=sides[1],
            singular_values_a=_padded(self.singular_values_a, len(sides[0])),
            singular_values_b=_padded(self.singular_values_b, len(sides[1])),
        )

    def widened(self, loadings: Loadings) -> Loadings:
        """Loadings on a narrower form of this layer, with zeros for the components that it lacked."""
        loadings_a, loadings_b = loadings
        assert loadings_b is not None
        k_a, k_b = self.widths
        return _padded(loadings_a, k_a), _padded(loadings_b, k_b)

    def with_spectrum(self, tasks: Sequence[Loadings]) -> FlatLayer:
        """The layer with the singular values of these tasks."""
        values = []
        for side, k in enumerate(self.widths):
            found = [loadings[side] for loadings in tasks]
            rows = [row.detach().float().cpu() for row in found if row is not None]
            values.append(_norms(torch.stack([torch.zeros(k), *rows])))
        return dataclasses.replace(self, singular_values_a=values[0], singular_values_b=values[1])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> FlatLayer:
        """The layer elsewhere or in another dtype; what is stored when it is saved stays packed."""
        check_dtype(dtype)
        packed = self.packed
        if packed is not None and device is not None:
            packed = FlatBasis(packed.u.to(device), packed.v.to(device), packed.rank)
        return dataclasses.replace(
            self,
            mean_a=self.mean_a.to(device=device, dtype=dtype),
            components_a=self.components_a.to(device=device, dtype=dtype),
            mean_b=self.mean_b.to(device=device, dtype=dtype),
            components_b=self.components_b.to(device=device, dtype=dtype),
            packed=packed,
        )

    def basis(self) -> FlatBasis:
        """Means and components as a checkpoint stores them."""
        return self.packed if self.packed is not None else self.pack(self.format)

    def pack(self, format: str) -> FlatBasis:
        """Means and components in a number format, rows of d_in and of d_out packed one by one."""
        fit = FlatFit(self.mean_a, self.components_a, self.mean_b, self.components_b)
        u, v = flat_rows(fit)
        return FlatBasis(pack(u, format), pack(v, format), self.rank)

    def quantized(self, format: str) -> FlatLayer:
        """The layer as it is in a packed format; means are packed along with the components."""
        new = FlatLayer.from_basis(self.pack(format), self.kind)
        return dataclasses.replace(
            new.to(self.device, self.dtype),
            singular_values_a=self.singular_values_a,
            singular_values_b=self.singular_values_b,
        )

    def rounded(self, bits: int) -> FlatLayer:
        """The layer with every row on a grid of 2^bits - 1 levels; stored as floats."""
        return dataclasses.replace(
            self,
            mean_a=round_rows(self.mean_a, bits),
            components_a=round_rows(self.components_a, bits),
            mean_b=round_rows(self.mean_b, bits),
            components_b=round_rows(self.components_b, bits),
        )


@dataclass(frozen=True)
class JointLayer:
    """Orthonormal bases of one layer: delta_W = U C V with a core C for each task.

    Attributes:
        u: U, (d_out, k_out), columns orthonormal. v: V, (k_in, d_in), rows orthonormal.
        singular_values_a: (k_in,), root of what each direction of V holds of the tasks' U C V, each of
            them at norm one. singular_values_b: (k_out,), the same for U.
        kind: "linear" or "embedding".
        packed: the bases as they are stored, where they are quantised.

    Examples:
        >>> layer = joint.layers["layers.0.q_proj"]
        >>> a, b = layer.factors(joint.tasks["task_0"].at("layers.0.q_proj"))
        >>> a.shape, b.shape
        (torch.Size([4, 12]), torch.Size([8, 4]))
    """

    u: Tensor
    v: Tensor
    singular_values_a: Tensor
    singular_values_b: Tensor
    kind: str = "linear"
    packed: Basis | None = None

    @classmethod
    def from_basis(cls, basis: Basis, kind: str = "linear") -> JointLayer:
        """The layer of what a checkpoint stores; singular values are left to :meth:`with_spectrum`."""
        packed = None if basis.u.format in FLOAT_DTYPES else basis
        dtype = torch.float32 if packed is not None else FLOAT_DTYPES[basis.u.format]
        u, v = unpack(basis.u, dtype).T.contiguous(), unpack(basis.v, dtype).clone()
        return cls(u, v, torch.zeros(len(v)), torch.zeros(u.shape[1]), kind, packed)

    @property
    def d_in(self) -> int:
        """Columns of delta_W."""
        return self.v.shape[1]

    @property
    def d_out(self) -> int:
        """Rows of delta_W."""
        return self.u.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(k_out, k_in), the shape of a core."""
        return self.u.shape[1], self.v.shape[0]

    @property
    def k(self) -> int:
        """The greater of k_out and k_in."""
        return max(self.widths)

    @property
    def device(self) -> torch.device:
        """Where the bases lie."""
        return self.u.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the bases."""
        return self.u.dtype

    @property
    def format(self) -> str:
        """The number format that the bases are stored in (``quantize.FORMATS``)."""
        return self.packed.u.format if self.packed is not None else _float_format(self.dtype)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """The shapes of a task's loadings."""
        return self.widths, None

    def factors(self, loadings: Loadings) -> Factors:
        """(A (q, d_in), B (d_out, q)), q = min(k_out, k_in); differentiable in the core.

        Both are the caller's to change: neither is the basis itself, which all tasks stand on.
        """
        core = loadings[0]
        if core.shape[1] <= core.shape[0]:
            return self.v.clone(), self.u @ core
        return core @ self.v, self.u.clone()

    def project(self, a: Tensor, b_scaled: Tensor) -> Loadings:
        """The core that is nearest to an adapter of any rank: U^T (B A) V^T.

        Args:
            a: (r, d_in). b_scaled: (d_out, r), times alpha / r.
        """
        dual_u, dual_v = self._duals
        left = dual_u @ b_scaled.to(self.device).float()
        right = a.to(self.device).float() @ dual_v.T
        return (left @ right).to(self.dtype), None

    @cached_property
    def _duals(self) -> tuple[Tensor, Tensor]:
        """Of U transposed and of V."""
        return _dual(self.u.T), _dual(self.v)

    def cut(self, k_out: int, k_in: int) -> JointLayer:
        """The layer with its first directions only."""
        return dataclasses.replace(
            self,
            u=self.u[:, :k_out],
            v=self.v[:k_in],
            singular_values_a=self.singular_values_a[:k_in],
            singular_values_b=self.singular_values_b[:k_out],
        )

    def expanded(self, count: int, generator: torch.Generator | None = None) -> JointLayer:
        """The layer with ``count`` random directions more on each side, orthogonal to its own."""
        drawn_u = torch.randn(count, self.d_out, generator=generator)
        u = gram_schmidt(self.u.T, drawn_u.to(self.u)).T
        v = gram_schmidt(self.v, torch.randn(count, self.d_in, generator=generator).to(self.v))
        return dataclasses.replace(
            self,
            u=u,
            v=v,
            singular_values_a=_padded(self.singular_values_a, len(v)),
            singular_values_b=_padded(self.singular_values_b, u.shape[1]),
        )

    def widened(self, loadings: Loadings) -> Loadings:
        """A core on a narrower form of this layer, with zeros for the directions that it lacked."""
        core = loadings[0]
        k_out, k_in = self.widths
        return F.pad(core, (0, k_in - core.shape[1], 0, k_out - core.shape[0])), None

    def with_spectrum(self, tasks: Sequence[Loadings]) -> JointLayer:
        """The layer with the singular values of these tasks."""
        energy = torch.zeros(self.widths, dtype=torch.float64)
        for core, _ in tasks:
            squares = core.detach().double().cpu().square()
            energy += squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return dataclasses.replace(
            self,
            singular_values_a=energy.sum(dim=0).sqrt().float(),
            singular_values_b=energy.sum(dim=1).sqrt().float(),
        )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> JointLayer:
        """The layer elsewhere or in another dtype; what is stored when it is saved stays packed."""
        check_dtype(dtype)
        packed = self.packed
        if packed is not None and device is not None:
            packed = Basis(packed.u.to(device), packed.v.to(device))
        return dataclasses.replace(
            self,
            u=self.u.to(device=device, dtype=dtype),
            v=self.v.to(device=device, dtype=dtype),
            packed=packed,
        )

    def basis(self) -> Basis:
        """The bases as a checkpoint stores them."""
        return self.packed if self.packed is not None else self.pack(self.format)

    def pack(self, format: str) -> Basis:
        """U transposed and V in a number format."""
        return Basis(pack(self.u.T.contiguous(), format), pack(self.v, format))

    def quantized(self, format: str) -> JointLayer:
        """The layer as it is in a packed format."""
        new = JointLayer.from_basis(self.pack(format), self.kind)
        return dataclasses.replace(
            new.to(self.device, self.dtype),
            singular_values_a=self.singular_values_a,
            singular_values_b=self.singular_values_b,
        )

    def rounded(self, bits: int) -> JointLayer:
        """The layer with every basis vector on a grid of 2^bits - 1 levels; stored as floats."""
        return dataclasses.replace(
            self, u=round_rows(self.u.T, bits).T.contiguous(), v=round_rows(self.v, bits)
        )


Layer: TypeAlias = FlatLayer | JointLayer
# Representation -> what a task has of a layer, by the names of its trainable parameters.
PARAMETERS = {"flat": ("loadings_a", "loadings_b"), "joint": ("core",)}


def zero_loadings(layer: Layer) -> Loadings:
    """Loadings that are zero: no update on a joint layer, the mean of all tasks on a flat one."""
    first, second = (
        None if shape is None else torch.zeros(shape, device=layer.device, dtype=layer.dtype)
        for shape in layer.shapes
    )
    assert first is not None
    return first, second


def basis_id(layers: Mapping[str, Layer]) -> str:
    """What tells these bases from others of their shapes, also after they were saved and read again.

    Whatever moves a basis changes nearly all of its numbers, so that some of them are enough.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        layer = layers[name]
        shared = (
            (layer.mean_a, layer.components_a, layer.mean_b, layer.components_b)
            if isinstance(layer, FlatLayer)
            else (layer.u, layer.v)
        )
        for tensor in shared:
            numbers = tensor.detach().flatten()
            sample = numbers[:: max(1, len(numbers) // _TELLING)].float().cpu().contiguous()
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def round_rows(tensor: Tensor, bits: int) -> Tensor:
    """Each row (of the last dimension) on the grid of amax / (2^(bits-1) - 1) times whole numbers."""
    top = (1 << (bits - 1)) - 1
    values = tensor.float()
    step = values.abs().amax(dim=-1, keepdim=True) / top
    rounded = torch.where(step > 0, (values / step).round().clamp(-top, top), 0.0) * step
    return rounded.to(tensor.dtype)


def _never_empty(mean: Tensor, components: Tensor) -> Tensor:
    """The components, or the mean's own direction where there are none."""
    if len(components):
        return components
    direction = F.normalize(mean.flatten(), dim=0)
    if not bool(direction.any()):
        direction = torch.eye(1, len(direction))[0]
    return direction.view(1, *mean.shape)


def _dual(rows: Tensor) -> Tensor:
    """Rows D with D M^T = 1 for the matrix M of these rows (float32); M itself where it is orthonormal.

    On a quantised basis the nearest point is found with its dual, which loses less than the basis.
    """
    rows = rows.float()
    gram = rows @ rows.T
    if float((gram - torch.eye(len(gram), device=gram.device)).abs().max()) <= _ORTHONORMAL:
        return rows
    return (torch.linalg.pinv(gram.double(), hermitian=True) @ rows.double()).float()


def _padded(vector: Tensor, size: int) -> Tensor:
    return F.pad(vector, (0, size - len(vector)))


def _norms(rows: Tensor) -> Tensor:
    return rows.double().square().sum(dim=0).sqrt().float()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that holds no floating-point numbers.

    Raises:
        OptionError: it is an integer or a boolean one.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype is {dtype}; give a floating-point one")


def _float_format(dtype: torch.dtype) -> str:
    if dtype not in FORMAT_OF_DTYPE:
        raise OptionError(f"{dtype} cannot be stored; call to(dtype=torch.float32) first")
    return FORMAT_OF_DTYPE[dtype]
