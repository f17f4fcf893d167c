"""Linear algebra of subspaces and NF4, as functions of plain tensors.

Vectors are rows. A basis of k vectors in D dimensions is (k, D) with orthonormal rows; a point's loadings
are its (k,) coordinates on it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.quantize import (
    NF4_BLOCK,
    NF4_CODEBOOK,
    NF4_THRESHOLDS,
    SCALE_BLOCK,
    is_finite,
    nf4_values,
    pack,
    unpack,
)

# A vector of which less than this is new to a basis is rounding.
_LEAST_NEW = 1e-6


def compute_svd(
    data_matrix: Tensor, num_components: int | None = None, center: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of points: X - mean = W diag(S) V.

    Args:
        data_matrix: X, (N, D). num_components: the k kept; None is all, min(N, D).
        center: whether the mean is taken off first.

    Returns:
        (V (k, D) orthonormal, S (k,) descending, mean (D,), which is zero without ``center``), in float32
        or float64.

    Raises:
        AdapterError: a value is NaN or infinite.
        OptionError: not a matrix, or more components than there are.

    Examples:
        >>> components, values, mean = compute_svd(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
        >>> round(values[0].item() ** 2, 3), mean.tolist()
        (8.0, [2.0, 1.0])
    """
    _check_matrix("data_matrix", data_matrix)
    most = min(data_matrix.shape)
    if num_components is not None and not 1 <= num_components <= most:
        raise OptionError(
            f"num_components is {num_components}; {list(data_matrix.shape)} points have 1 to {most}"
        )
    # There is no SVD of 16-bit numbers.
    data = data_matrix if data_matrix.dtype == torch.float64 else data_matrix.float()
    mean = data.mean(dim=0) if center else torch.zeros_like(data[0])
    _, values, components = torch.linalg.svd(data - mean, full_matrices=False)
    return components[:num_components], values[:num_components], mean


def project_onto_subspace(weights: Tensor, components: Tensor) -> Tensor:
    """Loadings of vectors on an orthonormal basis: ``weights @ components.T``.

    Args:
        weights: (D,) or (N, D). components: (k, D).

    Returns:
        (k,) or (N, k).

    Raises:
        OptionError: they differ in D.

    Examples:
        >>> project_onto_subspace(torch.tensor([3.0, 4.0]), torch.eye(2)[:1]).tolist()
        [3.0]
    """
    if components.dim() != 2 or weights.shape[-1] != components.shape[1]:
        raise OptionError(
            f"weights {list(weights.shape)} do not lie in the space of the components "
            f"{list(components.shape)}; give (D,) or (N, D) and (k, D)"
        )
    return weights @ components.T


def reconstruct_from_subspace(components: Tensor, loadings: Tensor) -> Tensor:
    """The vectors with these loadings: ``loadings @ components``.

    Args:
        components: (k, D). loadings: (k,) or (N, k).

    Returns:
        (D,) or (N, D).

    Raises:
        OptionError: they differ in k.

    Examples:
        >>> reconstruct_from_subspace(torch.eye(2)[:1], torch.tensor([3.0])).tolist()
        [3.0, 0.0]
    """
    if components.dim() != 2 or loadings.shape[-1] != components.shape[0]:
        raise OptionError(
            f"loadings {list(loadings.shape)} are not those of {list(components.shape)} components; "
            "give (k, D) and (k,) or (N, k)"
        )
    return loadings @ components


def gram_schmidt(basis: Tensor, new_vectors: Tensor) -> Tensor:
    """The basis with orthonormal rows behind its own for what is new in further vectors.

    The basis' own rows stay as they are, bit for bit. A vector that lies in the span of the basis and of
    the vectors before it, to 1e-6 of its norm, adds no row.

    Args:
        basis: (k, D), of full rank; k may be 0. new_vectors: (m, D).

    Returns:
        (k + n, D), n <= m.

    Raises:
        AdapterError: a value is NaN or infinite. OptionError: they differ in D.

    Examples:
        >>> gram_schmidt(torch.eye(3)[:1], torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, 0.0]])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    for name, rows in (("basis", basis), ("new_vectors", new_vectors)):
        _check_matrix(name, rows)
    if basis.shape[1] != new_vectors.shape[1]:
        raise OptionError(
            f"basis {list(basis.shape)} and new_vectors {list(new_vectors.shape)} differ in columns"
        )
    # Of float64, so that a basis in 16 bits, which is only nearly orthonormal, is as good.
    span = torch.linalg.qr(basis.double().T)[0]
    for vector in new_vectors.double():
        rest = vector
        # Twice is enough (Giraud and others, 2005).
        for _ in range(2):
            rest = rest - span @ (span.T @ rest)
        norm = float(rest.norm())
        if norm > _LEAST_NEW * float(vector.norm()):
            span = torch.cat([span, (rest / norm)[:, None]], dim=1)
    return torch.cat([basis, span[:, basis.shape[0] :].T.to(basis.dtype)])


def explained_variance_ratio(singular_values: Tensor) -> Tensor:
    """Share of the variance that the first components hold: cumsum(S^2) / sum(S^2).

    Args:
        singular_values: (k,).

    Returns:
        (k,); zeros where there is no variance.

    Examples:
        >>> explained_variance_ratio(torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist()
        [0.25, 0.5, 0.75, 1.0]
    """
    variance = singular_values.double().square()
    total = variance.sum()
    return (variance.cumsum(0) / total if total > 0 else variance).to(singular_values.dtype)


def select_num_components(singular_values: Tensor, threshold: float = 0.6) -> int:
    """The least number of components that hold at least ``threshold`` of the variance; one at least.

    Args:
        singular_values: (k,), descending. threshold: above 0, at most 1.

    Raises:
        OptionError: no singular values, or a threshold out of range.

    Examples:
        >>> select_num_components(torch.tensor([2.0, 1.0, 1.0]), threshold=0.8)
        2
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold is {threshold}; give a share above 0 and at most 1")
    if not len(singular_values):
        raise OptionError("there are no singular values to choose from")
    variance = singular_values.double().square()
    wanted = threshold * variance.sum()
    # The sum and its own running sum may differ in the last bit.
    enough = variance.cumsum(0) >= wanted * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def incremental_svd_update(
    components: Tensor,
    singular_values: Tensor,
    mean: Tensor,
    n_seen: int,
    new_data: Tensor,
    max_components: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Principal components of old and new points from those of the old ones.

    With X ~ mean + W diag(S) V, the scatter of all points about their common mean is the Gram matrix of
    the rows diag(S) V, new_data - its mean, and sqrt(n m / (n + m)) (mean - its mean). So where nothing
    was cut off the result is that of :func:`compute_svd` on all points (Ross and others, *Incremental
    learning for robust visual tracking*, IJCV 2008).

    Args:
        components: V, (k, D). singular_values: S, (k,). mean: (D,). n_seen: n, points so far.
        new_data: (m, D). max_components: keep so many at most; None keeps all that hold variance.

    Returns:
        (components (k', D), singular values (k',), mean (D,), n + m).

    Raises:
        AdapterError: a value is NaN or infinite. OptionError: shapes or numbers do not fit.

    Examples:
        >>> data = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
        >>> components, values, mean = compute_svd(data[:2])
        >>> _, values, mean, count = incremental_svd_update(components, values, mean, 2, data[2:])
        >>> torch.allclose(values, compute_svd(data)[1]), count
        (True, 3)
    """
    _check_matrix("components", components)
    _check_matrix("new_data", new_data)
    count, dim = new_data.shape
    if (
        components.shape[1] != dim
        or mean.shape != (dim,)
        or singular_values.shape != (len(components),)
    ):
        raise OptionError(
            f"components {list(components.shape)}, singular_values {list(singular_values.shape)}, mean "
            f"{list(mean.shape)} and new_data {list(new_data.shape)} do not fit; give (k, D), (k,), (D,) "
            "and (m, D)"
        )
    if n_seen < 0 or (max_components is not None and max_components < 1) or not count:
        raise OptionError(
            f"n_seen is {n_seen}, max_components {max_components} and new_data has {count} rows; give "
            "no negative count, at least one component and at least one row"
        )
    total = n_seen + count
    new_mean = new_data.mean(dim=0)
    shift = math.sqrt(n_seen * count / total) * (mean - new_mean)
    rows = torch.cat(
        [singular_values[:, None] * components, new_data - new_mean, shift[None]]
    ).double()
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    kept = max(1, int((values > 1e-7 * values[0]).sum()))
    kept = kept if max_components is None else min(kept, max_components)
    dtype = components.dtype
    updated = mean + (new_mean - mean) * (count / total)
    return vectors[:kept].to(dtype), values[:kept].to(dtype), updated, total


def nf4_quantize_dequantize(
    tensor: Tensor,
    block_size: int = 64,
    double_quant: bool = False,
    double_quant_block_size: int = 256,
) -> Tensor:
    """What a tensor becomes in NF4 and back: each block of the flattened tensor on 16 levels of its own.

    Args:
        tensor: floats of any shape. block_size: elements that share a scale, their greatest magnitude.
        double_quant: store the scales in 8 bits as well, as the number format ``nf4-dq`` does. It has
            blocks of 64 elements and of 256 scales only.

    Returns:
        The same shape and dtype.

    Raises:
        AdapterError: a value is NaN or infinite. OptionError: a block size that is not possible.

    Examples:
        >>> nf4_quantize_dequantize(torch.tensor([2.0, 1.99, 0.01, -2.0])).tolist()
        [2.0, 2.0, 0.0, -2.0]
    """
    if double_quant:
        if (block_size, double_quant_block_size) != (NF4_BLOCK, SCALE_BLOCK):
            raise OptionError(
                f"double_quant has blocks of {NF4_BLOCK} elements and {SCALE_BLOCK} scales, not of "
                f"{block_size} and {double_quant_block_size}; leave the sizes out"
            )
        _check_floats("tensor", tensor)
        values = unpack(pack(tensor.detach().reshape(1, -1), "nf4-dq"))
    else:
        values = nf4_unpack(*nf4_pack(tensor, block_size), block_size)
    return values.view(tensor.shape).to(tensor.dtype)


def nf4_pack(tensor: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor, int]:
    """Pack floats into NF4 codes, two a byte, the earlier in the high nibble.

    With blocks of 64 the codes and scales are those of the number format ``nf4`` (``quantize``) for the
    flattened tensor as one row. The last block is padded with zeros.

    Args:
        tensor: floats of any shape. block_size: elements that share a scale.

    Returns:
        (codes uint8, scales float32 (blocks,), number of elements).

    Raises:
        AdapterError: a value is NaN or infinite. OptionError: a block size below one.

    Examples:
        >>> codes, scales, count = nf4_pack(torch.tensor([1.0, -2.0, 0.0]))
        >>> codes[:2].tolist(), scales.tolist(), count
        ([192, 119], [2.0], 3)
    """
    _check_floats("tensor", tensor)
    _check_block(block_size)
    flat = tensor.detach().float().flatten()
    # Blocks of an odd size end in the middle of a byte, two of them do not.
    whole = block_size if block_size % 2 == 0 else 2 * block_size
    blocks = F.pad(flat, (0, -len(flat) % whole)).view(-1, block_size)
    scales = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_zeros(0)
    scaled = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0)
    thresholds = torch.tensor(NF4_THRESHOLDS, device=flat.device)
    codes = torch.bucketize(scaled.flatten(), thresholds).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], scales, len(flat)


def nf4_unpack(packed: Tensor, scales: Tensor, numel: int, block_size: int = 64) -> Tensor:
    """The ``numel`` float32 values of :func:`nf4_pack`'s codes and scales.

    Raises:
        OptionError: codes, scales, number of elements and block size do not belong together.

    Examples:
        >>> nf4_unpack(*nf4_pack(torch.tensor([2.0, -2.0, 0.0]))).tolist()
        [2.0, -2.0, 0.0]
    """
    _check_block(block_size)
    count = 2 * packed.numel()
    if packed.dtype != torch.uint8 or count != len(scales) * block_size or not 0 <= numel <= count:
        raise OptionError(
            f"{packed.numel()} {packed.dtype} codes, {len(scales)} scales, {numel} elements and blocks "
            f"of {block_size} do not belong together; give what nf4_pack returned"
        )
    values = nf4_values(packed.flatten().int()).view(-1, block_size) * scales[:, None]
    return values.flatten()[:numel]


def nf4_levels() -> Tensor:
    """The 16 values of NF4's codes, (16,) float32, ascending.

    Examples:
        >>> nf4_levels()[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    return torch.tensor(NF4_CODEBOOK)


def _check_block(block_size: int) -> None:
    if block_size < 1:
        raise OptionError(f"block_size is {block_size}; give at least 1")


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise OptionError(f"{name} has shape {list(matrix.shape)}; give rows of a matrix")
    _check_floats(name, matrix)


def _check_floats(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise OptionError(f"{name} is {tensor.dtype}; give floating-point numbers")
    if not is_finite(tensor):
        raise AdapterError(f"{name} holds NaN or infinite values; leave them out")
