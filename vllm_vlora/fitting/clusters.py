"""Which tasks resemble each other, so that each family may have a basis of its own.

Two tasks gain from a common basis when their delta_W share row and column spaces. With
M_i = W_i^T W_i and unit-normalised W_i = delta_W_i / ||delta_W_i||_F their affinity is
<M_i, M_j> = ||W_i W_j^T||_F^2, and alike for W_i W_i^T. A sketch T_i = O^T M_i O with a random
O (d x s) keeps it up to a constant (Johnson and Lindenstrauss, 1984), in s^2 numbers a task and module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_vlora.representations.factors import ScaledFactors

_SKETCH = 24
# Below this mean silhouette the tasks form no groups: measured 0.02 and less on unrelated ones.
_LEAST_SILHOUETTE = 0.1
_MOST_CLUSTERS = 8


def sketch_tasks(factors: Iterable[ScaledFactors], seed: int) -> torch.Tensor:
    """(tasks, 2 s^2) float32 sketches of both sides of each delta_W; zeros where it is zero.

    Args:
        factors: (A (r, d_in), B (d_out, r), scale) of one module of every task.
        seed: of the projections, one a module.
    """
    sides: tuple[torch.Tensor, ...] = ()
    found = []
    for a, b, scale in factors:
        if not sides:
            generator = torch.Generator().manual_seed(seed)
            # Drawn on the CPU, so that they are the same for every device.
            sides = tuple(
                torch.randn(d, _SKETCH, generator=generator).to(a.device)
                for d in (a.shape[1], b.shape[0])
            )
        found.append(_sketch(a.float(), b.float() * scale, *sides))
    return torch.stack(found)


def _sketch(
    a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    gram_a, gram_b = a @ a.T, b.T @ b
    norm = float((gram_a * gram_b).sum())
    if norm <= 0:
        return torch.zeros(2 * _SKETCH**2, device=a.device)
    thin_a, thin_b = a @ left, b.T @ right
    sides = (thin_a.T @ gram_b @ thin_a, thin_b.T @ gram_a @ thin_b)
    return torch.cat([side.flatten() for side in sides]) / norm / _SKETCH


def affinities(sketches: torch.Tensor) -> torch.Tensor:
    """(tasks, tasks) inner products of one module's sketches."""
    return sketches @ sketches.T


def cluster_tasks(affinity: torch.Tensor, count: int | str) -> list[tuple[int, ...]]:
    """Groups of tasks by average linkage of their normalised affinities, largest first.

    Args:
        affinity: (tasks, tasks), summed over modules.
        count: how many groups; ``auto`` for the number with the best mean silhouette, one group
            where none stands out.
    """
    scale = affinity.diagonal().clamp(min=1e-30).sqrt()
    distance = (1 - affinity / scale[:, None] / scale).clamp(min=0).double()
    distance.fill_diagonal_(0)
    wanted = range(2, min(_MOST_CLUSTERS, len(distance) - 1) + 1)
    cuts = _linkage(distance, set(wanted) if count == "auto" else {int(count)})
    if count != "auto":
        labels = cuts[min(int(count), len(distance))]
    else:
        scored = [(_silhouette(distance, cuts[number]), number) for number in wanted]
        score, number = max(scored, default=(0.0, 1))
        labels = cuts[number] if score >= _LEAST_SILHOUETTE else [0] * len(distance)
    groups: dict[int, list[int]] = {}
    for task, label in enumerate(labels):
        groups.setdefault(label, []).append(task)
    return sorted((tuple(group) for group in groups.values()), key=lambda g: (-len(g), g))


def _linkage(distance: torch.Tensor, wanted: set[int]) -> dict[int, list[int]]:
    """Labels of the tasks for each wanted number of groups, merged by least average distance."""
    count = len(distance)
    labels = np.arange(count)
    sizes = np.ones(count)
    between = distance.numpy().copy()
    np.fill_diagonal(between, np.inf)
    # Of each row; merging changes only those of the two, and of rows that were nearest to one of them.
    least, nearest = between.min(axis=1), between.argmin(axis=1)
    found = {count: labels.tolist()}
    for left in range(count - 1, 0, -1):
        i = int(least.argmin())
        j = int(nearest[i])
        merged = (between[i] * sizes[i] + between[j] * sizes[j]) / (sizes[i] + sizes[j])
        merged[i] = np.inf
        between[i], between[:, i] = merged, merged
        between[j], between[:, j] = np.inf, np.inf
        sizes[i] += sizes[j]
        labels[labels == j] = i
        changed = np.union1d(np.flatnonzero((nearest == i) | (nearest == j)), (i, j))
        rows = between[changed]
        least[changed], nearest[changed] = rows.min(axis=1), rows.argmin(axis=1)
        if left in wanted:
            found[left] = labels.tolist()
        if left <= min(wanted, default=count):
            break
    return found


def _silhouette(distance: torch.Tensor, labels: Sequence[int]) -> float:
    """Mean of (b - a) / max(a, b): a to the task's own group, b to the nearest other (Rousseeuw)."""
    names = torch.tensor(labels)
    members = torch.stack([names == label for label in names.unique()]).double()
    sums, sizes = distance @ members.T, members.sum(1)
    own = members.argmax(0)
    rows = torch.arange(len(distance))
    inside = sums[rows, own] / (sizes[own] - 1).clamp(min=1)
    means = sums / sizes
    means[rows, own] = torch.inf
    outside = means.min(dim=1).values
    score = (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-30)
    # A task alone in its group says nothing for the groups.
    return float(torch.where(sizes[own] > 1, score, 0.0).mean())
