"""Clusters of tasks, against average linkage as it is defined."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_vlora.fitting.clusters import cluster_tasks, sketch_tasks


def by_definition(distance: torch.Tensor, count: int) -> list[tuple[int, ...]]:
    """Join the two groups with the least mean distance of their members, until ``count`` are left."""
    groups = [(task,) for task in range(len(distance))]
    while len(groups) > count:
        one, other = min(
            itertools.combinations(groups, 2),
            key=lambda pair: float(distance[pair[0], :][:, pair[1]].mean()),
        )
        groups = [group for group in groups if group not in (one, other)]
        groups.append(tuple(sorted(one + other)))
    return sorted(groups, key=lambda group: (-len(group), group))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_tasks_are_joined_by_average_linkage(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(12, 5, generator=generator, dtype=torch.float64)
    affinity = rows @ rows.T
    scale = affinity.diagonal().sqrt()
    distance = 1 - affinity / scale[:, None] / scale
    assert cluster_tasks(affinity, count) == by_definition(distance, count)


def test_a_task_that_changes_nothing_has_no_affinity() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=generator), torch.randn(30, 3, generator=generator)
    sketches = sketch_tasks([(a, b, 2.0), (a, torch.zeros(30, 3), 1.0), (-a, b, 0.5)], seed=7)
    assert not sketches[1].any()
    # Neither sign nor scale of an update counts.
    torch.testing.assert_close(sketches[0], sketches[2])
    assert sketches[0].any()
