"""The functions of ``subspace.algebra`` against float64 references and their defining properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.quantize import NF4_CODEBOOK, pack, unpack
from vllm_vlora.subspace.algebra import (
    compute_svd,
    explained_variance_ratio,
    gram_schmidt,
    incremental_svd_update,
    nf4_levels,
    nf4_pack,
    nf4_quantize_dequantize,
    nf4_unpack,
    project_onto_subspace,
    reconstruct_from_subspace,
    select_num_components,
)

QUICK = settings(max_examples=40, deadline=None)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance_from_identity(rows: torch.Tensor) -> float:
    return float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


# --- bases ----------------------------------------------------------------------------------------


@QUICK
@given(st.integers(2, 7), st.integers(2, 9), st.integers(0, 99), st.booleans())
def test_components_explain_the_data_as_numpy_says(n: int, d: int, seed: int, center: bool) -> None:
    data = normal(seed, n, d)
    components, values, mean = compute_svd(data, center=center)
    shifted = data.numpy() - (data.numpy().mean(axis=0) if center else 0)
    assert np.allclose(values, np.linalg.svd(shifted, compute_uv=False))
    assert distance_from_identity(components) < 1e-10
    loadings = project_onto_subspace(data - mean, components)
    assert torch.allclose(reconstruct_from_subspace(components, loadings) + mean, data)
    assert torch.allclose(loadings.square().sum(0).sqrt(), values, atol=1e-10)


def test_numbers_of_16_bits_are_taken() -> None:
    data = normal(0, 5, 8).to(torch.bfloat16)
    components, values, mean = compute_svd(data)
    assert torch.allclose(values, compute_svd(data.float())[1])
    assert components.dtype == mean.dtype == torch.float32


def test_fewer_components_are_the_first_ones() -> None:
    data = normal(0, 6, 10)
    components, values, _ = compute_svd(data)
    few, few_values, _ = compute_svd(data, num_components=2)
    assert torch.equal(few, components[:2])
    assert torch.equal(few_values, values[:2])


@pytest.mark.parametrize("k", [0, 5, -1])
def test_components_that_do_not_exist_are_refused(k: int) -> None:
    with pytest.raises(OptionError, match="1 to 4"):
        compute_svd(normal(0, 4, 9), num_components=k)


@pytest.mark.parametrize("function", [compute_svd, nf4_pack, nf4_quantize_dequantize])
def test_values_that_are_not_finite_are_refused(function: object) -> None:
    for bad in (float("nan"), float("inf")):
        data = torch.ones(3, 4)
        data[1, 2] = bad
        with pytest.raises(AdapterError, match="NaN or infinite"):
            function(data)  # type: ignore[operator]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="space of the components"):
        project_onto_subspace(torch.ones(5), torch.eye(4))
    with pytest.raises(OptionError, match="loadings"):
        reconstruct_from_subspace(torch.eye(4), torch.ones(3))
    with pytest.raises(OptionError, match="differ in columns"):
        gram_schmidt(torch.eye(3), torch.eye(4))


@QUICK
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_gram_schmidt_appends_what_is_new(k: int, m: int, seed: int, dependent: bool) -> None:
    basis = torch.linalg.qr(normal(seed, 12, k))[0].T if k else torch.zeros(0, 12).double()
    new = normal(seed + 1, m, 12)
    if dependent:  # The second vector is the first, and the last lies in the basis.
        new = torch.cat([new[:1], 3 * new[:1], new[1:], basis.sum(0, keepdim=True)])
    wide = gram_schmidt(basis, new)
    assert torch.equal(wide[:k], basis)
    assert len(wide) == k + m
    assert distance_from_identity(wide) < 1e-10
    assert torch.allclose(new @ wide.T @ wide, new)


def test_gram_schmidt_keeps_a_basis_in_16_bits_bit_for_bit() -> None:
    basis = torch.linalg.qr(normal(0, 40, 4))[0].T.to(torch.bfloat16)
    wide = gram_schmidt(basis, normal(1, 3, 40).to(torch.bfloat16))
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide[:4], basis)
    assert float((wide[4:].double() @ wide.double().T - torch.eye(7)[4:]).abs().max()) < 0.02


# --- variance -------------------------------------------------------------------------------------


def test_shares_of_the_variance() -> None:
    shares = explained_variance_ratio(torch.tensor([3.0, 2.0, 1.0]))
    assert torch.allclose(shares, torch.tensor([9.0, 13.0, 14.0]) / 14)
    assert explained_variance_ratio(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@QUICK
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_the_least_number_of_components_is_chosen(values: list[float], threshold: float) -> None:
    values = sorted(values, reverse=True)
    k = select_num_components(torch.tensor(values, dtype=torch.float64), threshold)
    squares = np.square(values)
    assert 1 <= k <= len(values)
    assert squares[:k].sum() >= threshold * squares.sum() * (1 - 1e-9)
    if k > 1:
        assert squares[: k - 1].sum() < threshold * squares.sum()


def test_all_of_the_variance_needs_no_more_than_there_is() -> None:
    values = normal(0, 30).abs().sort(descending=True).values.float()
    assert select_num_components(values, 1.0) == 30
    assert select_num_components(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert select_num_components(torch.zeros(3)) == 1


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(OptionError, match="threshold"):
        select_num_components(torch.ones(3), threshold)


# --- incremental ----------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_updates_equal_the_svd_of_all_data(start: int, batches: list[int], seed: int) -> None:
    data = normal(seed, start + sum(batches), 30) + 5
    components, values, mean = compute_svd(data[:start])
    seen = start
    for count in batches:
        components, values, mean, seen = incremental_svd_update(
            components, values, mean, seen, data[seen : seen + count]
        )
    centred = data - data.mean(0)
    assert seen == len(data)
    assert torch.allclose(mean, data.mean(0))
    # The scatter is all that is defined: signs and the last, empty direction are not.
    scatter = components.T @ torch.diag(values.square()) @ components
    assert torch.allclose(scatter, centred.T @ centred, atol=1e-9)
    assert distance_from_identity(components) < 1e-9
    assert bool((values[:-1] >= values[1:]).all())


def test_an_update_cuts_where_it_is_told() -> None:
    data = normal(3, 8, 20)
    components, values, mean = compute_svd(data[:6])
    cut = incremental_svd_update(components, values, mean, 6, data[6:], max_components=3)
    whole = incremental_svd_update(components, values, mean, 6, data[6:])
    assert torch.equal(cut[0], whole[0][:3])
    assert torch.equal(cut[1], whole[1][:3])


def test_updates_that_do_not_fit_are_refused() -> None:
    components, values, mean = compute_svd(normal(0, 4, 9))
    with pytest.raises(OptionError, match="do not fit"):
        incremental_svd_update(components, values, mean, 4, normal(1, 2, 8))
    with pytest.raises(OptionError, match="n_seen"):
        incremental_svd_update(components, values, mean, -1, normal(1, 2, 9))
    with pytest.raises(OptionError, match="at least one component"):
        incremental_svd_update(components, values, mean, 4, normal(1, 2, 9), max_components=0)


# --- NF4 ------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 300), st.sampled_from([1, 3, 16, 64, 128]), st.integers(0, 99))
def test_nf4_snaps_each_value_to_the_nearest_level(count: int, block: int, seed: int) -> None:
    x = normal(seed, count, dtype=torch.float32)
    got = nf4_unpack(*nf4_pack(x, block), block)
    assert torch.equal(got, nf4_quantize_dequantize(x, block))
    levels = np.array(NF4_CODEBOOK)
    for start in range(0, count, block):
        part = x[start : start + block].double().numpy()
        amax = np.abs(part).max()
        nearest = np.abs(part[:, None] / amax - levels).min(axis=1) * amax
        assert np.allclose(np.abs(got[start : start + block].numpy() - part), nearest, atol=1e-6)


def test_nf4_blocks_of_64_are_those_of_the_format() -> None:
    x = normal(0, 5, 77, dtype=torch.float32)
    codes, scales, count = nf4_pack(x)
    row = pack(x.reshape(1, -1), "nf4")
    assert torch.equal(codes, row.parts["codes"][0])
    assert torch.equal(scales, row.parts["scales"][0])
    assert count == 385
    assert torch.equal(nf4_unpack(codes, scales, count).view(5, 77), unpack(row).view(5, 77))
    doubly = nf4_quantize_dequantize(x, double_quant=True)
    assert torch.equal(doubly, unpack(pack(x.reshape(1, -1), "nf4-dq")).view(5, 77))


def test_nf4_twice_changes_nothing_and_keeps_zeros_and_dtype() -> None:
    x = normal(1, 300).to(torch.bfloat16)
    x[64:128] = 0
    once = nf4_quantize_dequantize(x)
    assert once.dtype == torch.bfloat16
    assert not once[64:128].any()
    exact = nf4_quantize_dequantize(x.float())
    assert torch.equal(nf4_quantize_dequantize(exact), exact)


def test_nf4_levels_are_bitsandbytes_values() -> None:
    assert nf4_levels().tolist() == list(NF4_CODEBOOK)
    assert nf4_levels()[1].item() == -0.6961928009986877


def test_nf4_parts_that_do_not_belong_together_are_refused() -> None:
    codes, scales, count = nf4_pack(torch.ones(100))
    for wrong in ((codes[:-1], scales, count), (codes, scales, 129), (codes, scales[:1], count)):
        with pytest.raises(OptionError, match="do not belong together"):
            nf4_unpack(*wrong)
    with pytest.raises(OptionError, match="at least 1"):
        nf4_pack(torch.ones(4), block_size=0)
    with pytest.raises(OptionError, match="blocks of 64"):
        nf4_quantize_dequantize(torch.ones(4), block_size=32, double_quant=True)
    with pytest.raises(OptionError, match="floating-point"):
        nf4_pack(torch.ones(4, dtype=torch.int64))
