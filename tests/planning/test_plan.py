"""Planning: measured curves against dense float64, choices against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.compression.encoding import encode_kept
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.planning.allocation import (
    Point,
    allocate,
    build_path,
    cheapest_within,
    fit_to_budget,
    lower_hull,
)
from vllm_vlora.planning.joint_curves import JointCurve, JointMeter
from vllm_vlora.planning.number_formats import NARROW
from vllm_vlora.planning.private_curves import leading_factors, measure_private
from vllm_vlora.quantize import SHARED_FORMATS, narrow_row_nbytes, pack, row_nbytes, unpack
from vllm_vlora.representations.decode import decode, relative_error
from vllm_vlora.representations.factors import squared_norm
from vllm_vlora.representations.joint import core_shape, dual_rows, encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.spec import BasisSpec


def factors(rank: int, d_in: int, d_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -1.5, rank)[:, None]
    a = torch.randn(rank, d_in, generator=generator) * decay
    return a, torch.randn(d_out, rank, generator=generator)


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 6),
    d_in=st.integers(1, 80),
    d_out=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_private_curves_equal_what_encoding_loses(
    rank: int, d_in: int, d_out: int, seed: int
) -> None:
    a, b = factors(rank, d_in, d_out, seed)
    scale = 0.5
    scales = torch.tensor([scale], dtype=torch.float64)
    svd_a, svd_b = (side[0] for side in leading_factors(a[None], b.T[None], scales, FROBENIUS)[:2])
    svd_b = svd_b.T
    norm = squared_norm(a, b, scale)
    for curve in measure_private([(a, b, scale)], SHARED_FORMATS, "float32")[0].curves:
        assert curve.count == 1 + min(rank, d_in, d_out)
        for number in range(curve.count):
            option = curve.option(number)
            t = option.rank
            if option.original:
                stored = encode_private(a, b, scale, curve.format)
            else:
                stored = encode_private(svd_a[:t], svd_b[:, :t], 1.0, curve.format)
            lost, _ = relative_error(a, b, scale, stored, None)
            # Two float32 roundings of the leading factors, in units of the error itself; to the loss of
            # the own ones the rounding of rank terms is added, which the curve cannot tell from none.
            added = rank / 2 if option.original else 0
            error = pytest.approx(lost**0.5, rel=1e-6 * (1 + added), abs=2e-7 * norm**0.5)
            assert option.loss**0.5 == error
            assert option.nbytes == sum(matrix.nbytes for matrix in stored.matrices.values())
            assert curve.points(2.0)[number] == (option.nbytes, 2 * option.loss)


@pytest.mark.parametrize("powers", [(0, -74), (-83, -33), (-100, -100), (66, -74), (66, 20)])
def test_losses_do_not_depend_on_the_factors_magnitudes(powers: tuple[int, int]) -> None:
    # Even powers of two change no rounding; the squares of what that changes are beyond float32.
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(6, 96, generator=generator), torch.randn(80, 6, generator=generator)
    far = a * 2.0 ** powers[0], b * 2.0 ** powers[1], 0.5
    formats = ["float32", "bfloat16", "int8", "nf4", NARROW]
    # Another's magnitude is nothing to either.
    found = measure_private([(a, b, 0.5), far], formats, "float32")
    for curves in zip(*(one.curves for one in found), strict=True):
        near, away = (
            [loss / one.norm for _, loss in curve.points(1.0)] for one, curve in zip(found, curves)
        )
        assert away == pytest.approx(near, rel=1e-3, abs=1e-9)


def test_own_factors_in_own_dtype_lose_exactly_nothing() -> None:
    a, b = (x.bfloat16() for x in factors(4, 30, 20))
    curves = measure_private([(a, b, 2.0)], ["bfloat16", "int8"], "bfloat16")[0].curves
    assert curves[0].option(0).loss == 0.0
    assert curves[1].option(0).loss > 0.0


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "nf4", "nf4-dq"])
def test_joint_meter_equals_what_encoding_loses_at_every_width(format: str) -> None:
    a, b = factors(5, 70, 50)
    scale, grid = 2.0, [1, 2, 3, 7, 11, 12]
    generator = torch.Generator().manual_seed(1)
    u_t = torch.linalg.qr(torch.randn(50, 10, generator=generator))[0].T
    v = torch.linalg.qr(torch.cat([a.T, torch.randn(70, 7, generator=generator)], 1))[0].T
    u, v_packed = pack(u_t, format), pack(v, format)
    norm = squared_norm(a, b, scale)
    captured = JointMeter(u, v_packed).captured(a, b, scale)
    for width in grid:
        part_u = u.row_slice(0, min(width, 10))
        part_v = v_packed.row_slice(0, min(width, 12))
        basis = _basis(part_u, part_v)
        for core in ("float32", "bfloat16"):
            duals = dual_rows(unpack(part_u)), dual_rows(unpack(part_v))
            stored = encode_joint(a, b, scale, *duals, core)
            lost, _ = relative_error(a, b, scale, stored, basis)
            spec = BasisSpec(part_u.rows, part_v.rows, format)
            seen = captured[part_u.rows - 1, part_v.rows - 1].reshape(1, 1)
            curve = JointCurve([spec], seen, torch.tensor([norm], dtype=torch.float64))
            planned = float(curve.losses(core, [5], False)[0, 0])
            assert planned == pytest.approx(lost, rel=1e-3, abs=1e-6 * norm)
        form, rank, elements = core_shape(5, part_u.rows, part_v.rows)
        assert (stored.core, stored.rank) == (form, rank)
        assert sum(m.rows * m.cols for m in stored.matrices.values()) == elements


def _basis(u: object, v: object) -> object:
    from vllm_vlora.representations.stored import Basis

    return Basis(u, v)  # type: ignore[arg-type]


def test_dual_rows_lose_less_than_plain_projection() -> None:
    a, b = factors(4, 128, 128)
    u_t = torch.linalg.qr(torch.randn(128, 40, generator=torch.Generator().manual_seed(2)))[0].T
    u, v = pack(u_t, "nf4"), pack(u_t.flip(0), "nf4")
    basis = _basis(u, v)
    dual = encode_joint(a, b, 1.0, dual_rows(unpack(u)), dual_rows(unpack(v)), "float32")
    plain = encode_joint(a, b, 1.0, unpack(u), unpack(v), "float32")
    assert (
        relative_error(a, b, 1.0, dual, basis)[0]  # type: ignore[arg-type]
        < relative_error(a, b, 1.0, plain, basis)[0]  # type: ignore[arg-type]
    )


chain = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 100)), min_size=1, max_size=6)
chains_of = st.lists(chain, min_size=1, max_size=4)


@given(points=chain)
def test_hull_lies_below_every_point(points: list[Point]) -> None:
    hull = lower_hull(points)
    corners = [points[i] for i in hull]
    assert corners[0][0] == min(nbytes for nbytes, _ in points)
    assert corners[-1][1] == min(loss for _, loss in points)
    for (n0, l0), (n1, l1) in itertools.pairwise(corners):
        assert n1 > n0
        assert l1 < l0
        for nbytes, loss in points:
            if n0 <= nbytes <= n1:
                line = l0 + (l1 - l0) * (nbytes - n0) / (n1 - n0)
                assert loss >= line - 1e-9 * (1 + l0)


def test_of_options_of_one_size_the_one_that_loses_less_is_on_the_hull() -> None:
    # Their rates from the first are the same when rounded.
    assert lower_hull([(0, 1.0), (10, 2e-17), (10, 1e-17), (20, 0.0)]) == [0, 2, 3]
    assert lower_hull([(0, 1.0), (10, 1e-17), (10, 2e-17)]) == [0, 1]


def test_a_hull_has_every_corner_and_no_point_on_its_edges() -> None:
    # Loss 2^20 / bytes: convex, so that all are corners; exact, so that the midpoints lie on the edges.
    corners = [(1 << n, float(1 << 20 - n)) for n in range(12)]
    middles = [((n + m) // 2, (x + y) / 2) for (n, x), (m, y) in itertools.pairwise(corners[1:])]
    above = [(nbytes, loss + 1) for nbytes, loss in middles]
    points = [*middles, *corners, *above, (1 << 30, corners[-1][1])]
    assert [points[i] for i in lower_hull(points)] == corners


def brute_force(chains: list[list[Point]]) -> list[Point]:
    return [
        (sum(p[0] for p in pick), sum(p[1] for p in pick)) for pick in itertools.product(*chains)
    ]


def total(chains: list[list[Point]], chosen: list[int]) -> Point:
    picked = [points[option] for points, option in zip(chains, chosen, strict=True)]
    return sum(p[0] for p in picked), sum(p[1] for p in picked)


@settings(deadline=None)
@given(chains=chains_of, budget=st.integers(1, 120))
def test_allocation_keeps_the_budget_and_loses_within_one_step_of_the_best(
    chains: list[list[Point]], budget: int
) -> None:
    path = build_path(len(chains), chains.__getitem__)
    chosen = allocate(path, budget)
    affordable = [loss for nbytes, loss in brute_force(chains) if nbytes <= budget]
    if chosen is None:
        assert not affordable
        return
    nbytes, loss = total(chains, chosen)
    assert nbytes <= budget
    # The greedy path is optimal but for the step that the budget cuts.
    losses = [total(chains, path.prefix(count))[1] for count in range(len(path.sizes) + 1)]
    largest = max((more - less for more, less in itertools.pairwise(losses)), default=0.0)
    assert loss <= min(affordable) + largest + 1e-6


@settings(deadline=None)
@given(chains=chains_of, limit=st.floats(0, 200))
def test_cheapest_keeps_the_limit_and_costs_within_one_step_of_the_best(
    chains: list[list[Point]], limit: float
) -> None:
    chosen = cheapest_within(chains, limit)
    good = [nbytes for nbytes, loss in brute_force(chains) if loss <= limit]
    if chosen is None:
        assert not [n for n, loss in brute_force(chains) if loss <= limit * (1 - 1e-9) - 1e-9]
        return
    nbytes, loss = total(chains, chosen)
    assert loss <= limit + 1e-9
    path = build_path(len(chains), chains.__getitem__)
    largest = max(path.sizes, default=0)
    assert nbytes <= min(good, default=nbytes) + largest


@pytest.mark.parametrize("budget", range(40, 101, 7))
def test_allocation_of_many_small_steps_is_the_optimum(budget: int) -> None:
    # Equal steps of one byte, so that the greedy choice has no cut step: it must be the best there is.
    chains: list[list[Point]] = [[(1, 10.0 + i), (2, 5.0)] for i in range(40)]
    chosen = allocate(build_path(40, chains.__getitem__), budget)
    assert chosen is not None
    nbytes, loss = total(chains, chosen)
    taken = min(budget - 40, 40)
    assert nbytes == 40 + taken
    assert loss == 40 * 5 + sum(5 + i for i in range(40 - taken))


def test_one_chain_takes_the_best_point_above_its_hull() -> None:
    concave: list[Point] = [(1, 10.0), (2, 9.9), (3, 9.5), (4, 0.0)]
    assert lower_hull(concave) == [0, 3]
    assert allocate(build_path(1, lambda _: concave), 3) == [2]
    assert cheapest_within([concave], 9.6) == [2]


@pytest.mark.parametrize("limit", [40, 60, 61, 90, 200])
def test_budget_includes_headers_that_depend_on_the_choice(limit: int) -> None:
    chains: list[list[Point]] = [[(n, 100.0 / n) for n in range(5, 60, 5)]] * 2

    def sizes(chosen: list[int]) -> tuple[int, int]:
        data = total(chains, chosen)[0]
        return data, data + 20 + data % 7

    chosen = fit_to_budget(build_path(2, chains.__getitem__), sizes, limit)
    assert chosen is not None
    data, files = sizes(chosen)
    assert files <= limit
    assert data >= min(limit - 20 - 6 - 5, 2 * 55) - 5
    assert fit_to_budget(build_path(2, chains.__getitem__), sizes, 29) is None


def test_sizes_of_a_choice_are_asked_once() -> None:
    # Above 50 bytes of data the headers jump, as where dense cores become factors: the search swings.
    chain = [(nbytes, 1.0 / nbytes) for nbytes in range(10, 100, 10)]
    asked: list[tuple[int, ...]] = []

    def sizes(chosen: list[int]) -> tuple[int, int]:
        asked.append(tuple(chosen))
        data = chain[chosen[0]][0]
        return data, data + (10 if data <= 50 else 40)

    chosen = fit_to_budget(build_path(1, lambda _: chain), sizes, 80)
    assert chosen == [4]
    assert len(asked) == len(set(asked))


def test_zero_delta_is_measured_as_no_loss() -> None:
    a, b = torch.randn(3, 20), torch.zeros(10, 3)
    for curve in measure_private([(a, b, 1.0)], SHARED_FORMATS, "float32")[0].curves:
        assert all(loss == 0 for loss in curve.losses)
        assert curve.row_nbytes == row_nbytes(curve.format, 20) + row_nbytes(curve.format, 10)


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 7), seed=st.integers(0, 99))
def test_narrow_curves_equal_what_encoding_loses(rank: int, seed: int) -> None:
    a, b = factors(rank, 100, 70, seed)
    (curve,) = measure_private([(a, b, 0.5)], [NARROW], "float32")[0].curves
    norm = squared_norm(a, b, 0.5)
    sizes = [nbytes for nbytes, _ in curve.points(1.0)]
    assert sizes == sorted(sizes)
    for number in range(curve.count):
        option = curve.option(number)
        stored, _ = encode_kept(a, b, 0.5, option, FROBENIUS)
        lost, _ = relative_error(a, b, 0.5, stored, None)
        assert option.loss == pytest.approx(lost, rel=1e-5, abs=1e-12 * norm)
        n4, n3, n2 = option.bits or (option.rank, 0, 0)
        rows = [
            narrow_row_nbytes(d, bits) * n
            for d in (100, 70)
            for bits, n in ((4, n4), (3, n3), (2, n2))
        ]
        assert option.nbytes == sum(rows)


def test_whitened_losses_equal_those_of_the_dense_product() -> None:
    a, b = factors(5, 40, 30)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 40, generator=generator) @ torch.diag(torch.logspace(0, -2, 40))
    metric = Metric(Whitener.from_moment(inputs.T @ inputs / 200), None)
    delta = 0.5 * b.double() @ a.double()
    formats = ["bfloat16", "nf4-dq", NARROW]
    for curve in measure_private([(a, b, 0.5)], formats, "float32", metric)[0].curves:
        for number in range(curve.count):
            option = curve.option(number)
            stored, _ = encode_kept(a, b, 0.5, option, metric)
            new_a, new_b = decode(stored, None)
            white = metric.a(new_b.double() @ new_a.double() - delta)
            assert option.loss == pytest.approx(float(white.square().sum()), rel=1e-4, abs=1e-9)


def test_a_metric_loses_less_of_what_the_model_sees_than_frobenius_does() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(8, 64, generator=generator), torch.randn(48, 8, generator=generator)
    inputs = torch.randn(500, 64, generator=generator) * torch.logspace(0, -2, 64)
    metric = Metric(Whitener.from_moment(inputs.T @ inputs / 500), None)
    plain, white = (
        measure_private([(a, b, 1.0)], ["float32"], "bfloat16", m)[0].curves[0]
        for m in (FROBENIUS, metric)
    )
    stored, _ = encode_kept(a, b, 1.0, plain.option(3), FROBENIUS)
    new_a, new_b = decode(stored, None)
    seen = metric.a(new_b.double() @ new_a.double() - b.double() @ a.double()).square().sum()
    assert white.option(3).loss < 0.8 * float(seen)
