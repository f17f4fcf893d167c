"""Leading factors of many updates at once, against float64 decompositions of the whole matrices."""

from __future__ import annotations

import pytest
import torch

from vllm_vlora.representations.factors import stacked_svd


@pytest.mark.parametrize(
    ("rank", "d_in", "d_out"), [(4, 40, 24), (5, 3, 30), (6, 20, 4), (1, 7, 9)]
)
def test_every_truncation_is_the_best_one(rank: int, d_in: int, d_out: int) -> None:
    """Also of updates that are zero, of a smaller rank than they seem, and of unlike columns."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(5, rank, d_in, generator=generator)
    b_t = torch.randn(5, rank, d_out, generator=generator)
    b_t[1] = 0.0
    b_t[2, -1] = b_t[2, 0]
    a[3] *= torch.logspace(0, -6, rank)[:, None]
    scales = torch.tensor([2.0, 2.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    svd_a, svd_b, norms = stacked_svd(a, b_t, scales)
    whole = b_t.double().mT @ a.double() * scales[:, None, None]
    _, sigma, _ = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(norms, whole.square().sum((1, 2)))
    assert svd_a.shape[1] == svd_b.shape[1] == min(rank, d_in, d_out)
    for kept in range(1, svd_a.shape[1] + 1):
        found = svd_b[:, :kept].double().mT @ svd_a[:, :kept].double()
        lost = (found - whole).square().sum((1, 2))
        least = sigma[:, kept:].square().sum(1)
        torch.testing.assert_close(lost, least, rtol=1e-5, atol=1e-13 * float(norms.max()))
        torch.testing.assert_close(
            svd_a[:, :kept].square().sum(2), sigma[:, :kept].float(), rtol=1e-4, atol=1e-6
        )


def test_an_update_has_the_same_signs_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(9, 3, 300, generator=generator)
    b_t = torch.randn(9, 3, 100, generator=generator)
    scales = torch.ones(9, dtype=torch.float64)
    together = stacked_svd(a, b_t, scales)
    for place in range(9):
        alone = stacked_svd(a[place : place + 1], b_t[place : place + 1], scales[:1])
        for side in (0, 1):
            torch.testing.assert_close(alone[side][0], together[side][place])
