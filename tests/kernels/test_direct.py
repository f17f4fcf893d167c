"""The direct operation in torch against its definition; its routing, slot table and records."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.quantize import FLOAT_DTYPES, FORMATS, PackedMatrix, pack, unpack
from vllm_vlora.triton_kernels import direct, direct_torch
from vllm_vlora.triton_kernels.direct import (
    RECORD_FIELDS,
    TILE_SIZES,
    DirectLayer,
    DirectSlice,
    DirectTask,
    Routing,
    SliceTask,
    SlotTable,
    add_direct,
    add_direct_reference,
    make_task,
)

CPU = torch.device("cpu")
QUANTISED = ("int8", "nf4", "nf4-dq")
NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
SLOTS, MAX_TOKENS = 9, 80
# d_in, and of every slice: width, (k_out, k_in) of its basis, start_in, start_out.
Shape = tuple[int, list[tuple[int, tuple[int, int] | None, int, int]]]
LAYERS: list[Shape] = [
    (70, [(33, (5, 7), 0, 0), (20, None, 6, 37), (48, (8, 3), 63, 5)]),
    (96, [(65, (4, 4), 0, 130)]),
    (31, [(10, None, 0, 0), (7, None, 1, 2)]),
]
COUNT = sum(len(slices) for _, slices in LAYERS)
# Runs (slot, tokens); the slot SLOTS is the base model's.
LENGTHS = {
    "decode": [(slot, 1) for slot in (9, 3, 8, 0, 3, 9, 9, 1, 2, 7, 4, 6, 5, 9)],
    "prefill": [(2, 20), (5, 9), (3, 8), (6, 30)],
    "equal": [(2, 4), (5, 4), (3, 4), (9, 4), (2, 4), (8, 4), (9, 1), (0, 4)],
    "mixed": [(9, 2), (3, 12), (9, 1), (4, 1), (5, 7), (3, 2), (9, 9), (7, 8), (8, 3), (6, 1), (9, 1)],
}  # fmt: skip


def make_layers(dtype: torch.dtype, basis: str, generator: torch.Generator) -> list[DirectLayer]:
    """The layers of LAYERS, numbered through."""
    layers, index = [], 0
    for d_in, shapes in LAYERS:
        slices = tuple(
            DirectSlice(
                width, start_in, start_out,
                u=normal(k[0], width, basis, generator) if k else None, k_in=k[1] if k else 0,
            )
            for width, k, start_in, start_out in shapes
        )  # fmt: skip
        rows = sum(part.k_in for part in slices)
        v = normal(rows, d_in, basis, generator) if rows else None
        layers.append(DirectLayer(index, d_in, slices, v, max_rank=8))
        index += len(slices)
    return layers


def normal(rows: int, cols: int, format: str, generator: torch.Generator) -> PackedMatrix:
    """Rows of norm 1 or so, which keeps every product of order 1."""
    return pack(torch.randn(rows, cols, generator=generator) / cols**0.5, format)


Kind = Callable[[DirectLayer, DirectSlice], SliceTask | None]


@dataclass
class World:
    """Layers, a table whose slots hold every kind of task, and a routing."""

    dtype: torch.dtype = torch.float32
    basis: str = "float32"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.layers = make_layers(self.dtype, self.basis, self.generator)
        self.table = SlotTable(SLOTS, COUNT, CPU)
        self.routing = Routing(MAX_TOKENS, SLOTS, CPU)
        float_format = NAMES[self.dtype]
        private = [self.private(format, rank) for format, rank in zip(
            (float_format, *QUANTISED), (1, 8, 3, 5)
        )]  # fmt: skip
        kinds: list[list[Kind]] = [
            [lambda layer, part: None],  # A task that adds nothing.
            [],  # Slot 1 was never given a task.
            [self.dense],
            [self.factors(2)],
            *([kind] for kind in private[:2]),
            [self.dense, private[2], self.factors(4)],
            [private[3], self.factors(1), self.dense, lambda layer, part: None],
            [*private, self.factors(3)],
        ]
        assert len(kinds) == SLOTS
        for slot, choices in enumerate(kinds):
            if choices:
                self.table.set(slot, self.task(choices))

    def task(self, kinds: list[Kind]) -> DirectTask:
        """A task whose slices are of these kinds in turn."""
        parts: dict[int, SliceTask] = {}
        for layer in self.layers:
            for place, part in enumerate(layer.slices):
                number = layer.index + place
                made = kinds[number % len(kinds)](layer, part)
                if made is not None:
                    parts[number] = made
        return make_task(parts, COUNT, CPU)

    def dense(self, layer: DirectLayer, part: DirectSlice) -> SliceTask | None:
        return SliceTask(core=self._core(part.k_out, part.k_in)) if part.u is not None else None

    def factors(self, rank: int) -> Kind:
        def make(layer: DirectLayer, part: DirectSlice) -> SliceTask | None:
            if part.u is None:
                return None
            return SliceTask(core=self._core(rank, part.k_in + part.k_out), core_rank=rank)

        return make

    def private(self, format: str, rank: int) -> Kind:
        def make(layer: DirectLayer, part: DirectSlice) -> SliceTask:
            a = normal(rank, part.start_in + layer.d_in, format, self.generator)
            b = normal(rank, part.start_out + part.width, format, self.generator)
            return SliceTask(a=a, b=b, scale=-1.75)

        return make

    def _core(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def batch(self, layer: DirectLayer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, x), both of wider buffers whose margins hold NaN."""
        made = []
        for width in (layer.width, layer.d_in):
            buffer = torch.full((tokens, width + 5), torch.nan, dtype=self.dtype)
            view = buffer[:, 2 : 2 + width]
            view.copy_(torch.randn(tokens, width, generator=self.generator))
            made.append(view)
        return made[0], made[1]

    def check(self, token_slots: np.ndarray) -> None:
        """Every layer's result for new inputs is the reference's, and nothing else was written."""
        for layer in self.layers:
            y, x = self.batch(layer, len(token_slots))
            untouched = torch.from_numpy(token_slots) == SLOTS
            # What the base model's tokens hold must not reach anything, infinities included.
            x[untouched] = torch.nan
            want, before = y.clone(), y.clone()
            add_direct_reference(want, x, layer, self.table, self.routing)
            add_direct(y, x, layer, self.table, self.routing)
            assert torch.equal(y[untouched], before[untouched])
            assert_close(y, want, before)
            margins = y.as_strided((len(y), 2), (y.stride(0), 1), y.storage_offset() - 2)
            assert margins.isnan().all()


def assert_close(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor) -> None:
    """float32: sums of at most 96 products of order 1 in another order.

    16 bits: both round the same values at the same points, but in another order of summation, so that
    one rounding of z, w, h or y may fall the other way: half a step of it each way. Runs of equal length
    have A_c and B_c multiplied first, one rounding more. Four such steps of what was added, and one of
    y itself.
    """
    if want.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=5e-6)
        return
    step = torch.finfo(want.dtype).eps
    added = (want.double() - before.double()).abs().amax().item()
    error = (got.double() - want.double()).abs()
    assert (error <= step * (want.double().abs() + 4 * max(added, 1.0))).all()


def slots_of(lengths: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.full(count, slot, dtype=np.int32) for slot, count in lengths])


# ---- the operation


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("basis", ["float", *QUANTISED])
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_runs_add_what_the_definition_adds(dtype: torch.dtype, basis: str, lengths: str) -> None:
    world = World(dtype, NAMES[dtype] if basis == "float" else basis)
    token_slots = slots_of(LENGTHS[lengths])
    world.routing.update(token_slots)
    world.check(token_slots)


def test_the_definition_is_the_equation() -> None:
    """y_i + U_i^T C V_i x + scale B A x in float64, with every matrix multiplied out."""
    world = World(basis="nf4")
    token_slots = slots_of(LENGTHS["mixed"])
    world.routing.update(token_slots)
    for layer in world.layers:
        y, x = world.batch(layer, len(token_slots))
        want = y.double()
        for token, slot in enumerate(token_slots.tolist()):
            delta = torch.cat([
                _delta_weight(layer, place, world.table.part(slot, layer.index + place))
                for place in range(len(layer.slices))
            ])  # fmt: skip
            want[token] += delta @ x[token].double()
        assert (want - y).abs().amax() > 0.5
        add_direct_reference(y, x, layer, world.table, world.routing)
        torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=5e-6)


def _delta_weight(layer: DirectLayer, place: int, task: SliceTask | None) -> torch.Tensor:
    """delta W of one slice (width, d_in) in float64."""
    part = layer.slices[place]
    delta = torch.zeros(part.width, layer.d_in, dtype=torch.float64)
    if task is not None and task.core is not None:
        assert part.u is not None
        assert layer.v is not None
        first = sum(other.k_in for other in layer.slices[:place])
        v, core = unpack(layer.v)[first : first + part.k_in].double(), task.core.double()
        if task.core_rank:
            core = core[:, part.k_in :].T @ core[:, : part.k_in]
        delta += unpack(part.u).double().T @ core @ v
    if task is not None and task.a is not None:
        assert task.b is not None
        a, b = (
            unpack(matrix).double()[:, start : start + width]
            for matrix, start, width in (
                (task.a, part.start_in, layer.d_in),
                (task.b, part.start_out, part.width),
            )
        )
        delta += task.scale * b.T @ a
    return delta


def test_one_routing_serves_many_layers_and_many_steps() -> None:
    """What is derived from a batch composition is kept for the next step and dropped with it."""
    world = World()
    for lengths in ("decode", "mixed", "decode", "prefill"):
        token_slots = slots_of(LENGTHS[lengths])
        world.routing.update(token_slots)
        assert not world.routing.derived
        world.check(token_slots)
        derived = dict(world.routing.derived)
        assert derived
        for _ in range(2):
            world.check(token_slots)
        assert world.routing.derived == derived, "the second step made it again"


def test_a_slot_with_another_task_adds_that_task_after_the_next_routing() -> None:
    world = World()
    token_slots = slots_of(LENGTHS["mixed"])
    for kinds in ([world.dense], [world.factors(3)], [world.private("nf4", 2)], [world.dense]):
        for slot in (3, 4, 7):
            world.table.set(slot, world.task(kinds))
        world.routing.update(token_slots)
        world.check(token_slots)


@pytest.mark.parametrize("dtype", list(NAMES))
def test_tokens_of_the_base_model_are_left_alone_bit_for_bit(dtype: torch.dtype) -> None:
    world = World(dtype, NAMES[dtype])
    for lengths in ([], [(SLOTS, 40)], [(SLOTS, 3), (0, 2), (1, 1), (SLOTS, 2)]):
        token_slots = slots_of(lengths) if lengths else np.zeros(0, dtype=np.int32)
        world.routing.update(token_slots)
        for layer in world.layers:
            y, x = world.batch(layer, len(token_slots))
            y.neg_().clamp_(max=0.0)  # Negative zeros are bits too.
            x.fill_(torch.nan)
            before = y.clone()
            add_direct(y, x, layer, world.table, world.routing)
            assert y.contiguous().view(torch.uint8).equal(before.view(torch.uint8))


def test_rows_beyond_the_batch_are_left_alone() -> None:
    world = World()
    token_slots = slots_of(LENGTHS["mixed"])
    world.routing.update(token_slots)
    for layer in world.layers:
        y, x = world.batch(layer, len(token_slots) + 3)
        x[len(token_slots) :] = torch.nan
        want = y.clone()
        add_direct_reference(want, x, layer, world.table, world.routing)
        rest = y[len(token_slots) :].clone()
        add_direct(y, x, layer, world.table, world.routing)
        assert torch.equal(y[len(token_slots) :], rest)
        torch.testing.assert_close(y, want, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("limit", [0, 2000])
def test_cores_that_there_is_no_room_for_are_put_together_each_time(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(direct_torch, "_STACK_LIMIT", limit)
    world = World()
    for lengths in ("decode", "equal"):
        token_slots = slots_of(LENGTHS[lengths])
        world.routing.update(token_slots)
        for _ in range(2):
            world.check(token_slots)
            kept = sum(
                stack.nbytes
                for plan in world.routing.derived.values()
                if isinstance(plan, direct_torch._JointPlan)
                for stack in plan._stacks.values()
            )
            assert kept == world.routing.derived.get("bytes", 0)
            assert kept <= limit
            assert (kept > 0) == (limit > 0)


# ---- dequantised factors


def test_the_least_recently_used_factors_are_dropped() -> None:
    matrices = [normal(4, 32, "nf4", torch.Generator().manual_seed(i)) for i in range(4)]
    size = 4 * 32 * 4
    cache = direct_torch._UnpackedFactors(3 * size)

    def get(number: int) -> torch.Tensor:
        values = cache.get(matrices[number], torch.float32, 0, 32)
        assert torch.equal(values, unpack(matrices[number]))
        return values

    first, second, third = get(0), get(1), get(2)
    assert get(0) is first
    get(3)
    assert get(0) is first
    assert get(2) is third
    assert get(1) is not second, "the one that was used longest ago went"
    assert cache._nbytes == sum(values.nbytes for _, values in cache._held.values()) == 3 * size
    # What alone is larger than the limit is given and not kept.
    small = direct_torch._UnpackedFactors(size - 1)
    assert torch.equal(small.get(matrices[0], torch.float32, 0, 32), unpack(matrices[0]))
    assert (small._nbytes, len(small._held)) == (0, 0)


def test_an_id_that_python_gives_again_means_the_new_matrix() -> None:
    """id() is unique among what lives, so a matrix must live for as long as its values are held."""
    cache = direct_torch._UnpackedFactors(2 * 4 * 32 * 4)
    for seed in range(60):
        matrix = normal(4, 32, "int8", torch.Generator().manual_seed(seed))
        assert torch.equal(cache.get(matrix, torch.float32, 0, 32), unpack(matrix))
        del matrix
    held = [matrix for matrix, _ in cache._held.values()]
    assert [id(matrix) for matrix in held] == [key[0] for key in cache._held]
    assert len(held) == 2


def test_columns_and_dtypes_of_one_matrix_are_held_apart() -> None:
    cache = direct_torch._UnpackedFactors(1 << 20)
    matrix = normal(3, 130, "nf4-dq", torch.Generator().manual_seed(0))
    for _ in range(2):
        for start, stop in ((0, 130), (0, 70), (70, 130)):
            for dtype in NAMES:
                got = cache.get(matrix, dtype, start, stop)
                assert got.dtype == dtype
                assert torch.equal(got, unpack(matrix, dtype, start, stop))


# ---- what does not fit together


@pytest.mark.parametrize("operation", [add_direct, add_direct_reference])
def test_arguments_that_do_not_fit_are_refused(operation: Callable[..., None]) -> None:
    world = World()
    layer = world.layers[1]
    world.routing.update(np.zeros(3, dtype=np.int32))
    y, x = torch.zeros(3, 65), torch.zeros(3, 96)
    more = Routing(MAX_TOKENS, SLOTS + 1, CPU)
    wide = torch.zeros(MAX_TOKENS + 1, 200)
    cases: list[tuple[torch.Tensor, torch.Tensor, Routing, str]] = [
        (y, x[:, :95], world.routing, r"x must be \[T, 96\], got \[3, 95\]"),
        (y, x[0], world.routing, r"x must be \[T, 96\], got \[96\]"),
        (y[:2], x, world.routing, r"y must be \[3, 65\], got \[2, 65\]"),
        (y[:, :64], x, world.routing, r"y must be \[3, 65\], got \[3, 64\]"),
        (y.bfloat16(), x, world.routing, "one float dtype"),
        (y.double(), x.double(), world.routing, "one float dtype"),
        (y.T.contiguous().T, x, world.routing, "rows of x and of y must be contiguous"),
        (y, torch.zeros(3, 192)[:, ::2], world.routing, "rows of x and of y must be contiguous"),
        (y.to("meta"), x, world.routing, "x is on cpu"),
        (wide[:, :65], wide[:, :96], world.routing, f"{MAX_TOKENS + 1} tokens, the routing has"),
        (y, x, more, f"{SLOTS} slots, the routing has {SLOTS + 1}"),
    ]
    for bad_y, bad_x, routing, message in cases:
        with pytest.raises(ValueError, match=message):
            operation(bad_y, bad_x, layer, world.table, routing)
    operation(y, x, layer, world.table, world.routing)
    # Rows that are not there would be read and written; a graph's batch may be padded to more.
    world.routing.update(np.array([SLOTS] * 4, dtype=np.int32))
    with pytest.raises(
        ValueError, match="x has 3 rows of a batch of 4 tokens: the model runs this"
    ):
        operation(y, x, layer, world.table, world.routing)
    world.routing.update(np.array([0, SLOTS], dtype=np.int32))
    operation(y, x, layer, world.table, world.routing)


# ---- routing

runs_of_tokens = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 90)), max_size=7)


@settings(max_examples=150, deadline=None)
@given(slots=st.integers(1, 6), batches=st.lists(runs_of_tokens, min_size=1, max_size=3))
def test_routing_says_where_each_token_goes(slots: int, batches: list) -> None:
    routing = Routing(150, slots, CPU)
    for runs in batches:
        token_slots = np.array(
            [min(slot, slots) for slot, count in runs for _ in range(count)], dtype=np.int32
        )[:150]
        routing.update(token_slots)
        check_routing(routing, token_slots.tolist())


@settings(max_examples=60, deadline=None)
@given(token_slots=st.lists(st.integers(0, 40), max_size=50), slots=st.integers(40, 50))
def test_routing_of_many_slots_with_few_tokens_each(token_slots: list[int], slots: int) -> None:
    routing = Routing(50, slots, CPU)
    routing.update(np.array(token_slots, dtype=np.int64))
    check_routing(routing, token_slots)


def check_routing(routing: Routing, token_slots: list[int]) -> None:
    count, none = len(token_slots), routing.slots
    direct_tokens = [token for token, slot in enumerate(token_slots) if slot != none]
    assert routing.token_slots.tolist() == token_slots + [none] * (routing.max_tokens - count)
    order = routing.order[: len(direct_tokens)].tolist()
    assert order == sorted(direct_tokens, key=lambda token: (token_slots[token], token))
    for size in TILE_SIZES:
        tiles = routing.tiles[size].tolist()
        assert len(tiles) == routing.max_tiles(routing.max_tokens, size)
        used = [tile for tile in tiles if tile[2]]
        assert tiles[: len(used)] == used
        assert len(used) <= routing.max_tiles(count, size), "a launch would leave tiles out"
        covered: list[int] = []
        for slot, start, length in used:
            assert 0 < length <= size
            members = order[start : start + length]
            assert len(members) == length
            assert {token_slots[token] for token in members} == {slot}
            covered += members
        assert sorted(covered) == direct_tokens, "each direct token once"
    rebuilt = [none] * count
    for start, end, slot in routing.runs:
        assert start < end
        assert slot != none
        rebuilt[start:end] = [slot] * (end - start)
    assert rebuilt == token_slots
    assert routing.runs == sorted(routing.runs)
    for (_, end, slot), (start, _, following) in zip(routing.runs, routing.runs[1:]):
        assert end <= start
        assert end < start or slot != following, "neighbours of one slot are one run"


@pytest.mark.parametrize(
    ("token_slots", "message"),
    [
        ([0] * 6, "6 tokens, the routing has room for 5"),
        ([0, 4], "slots must be 0 to 3"),
        ([2, -1, 0], "slots must be 0 to 3"),
    ],
)
def test_a_batch_that_cannot_be_routed_changes_nothing(token_slots: list, message: str) -> None:
    routing = Routing(5, 3, CPU)
    routing.update(np.array([2, 3, 0]))
    routing.derived["kept"] = 1
    with pytest.raises(ValueError, match=message):
        routing.update(np.array(token_slots))
    check_routing(routing, [2, 3, 0])
    assert routing.derived == {"kept": 1}


def test_a_new_routing_and_an_empty_batch_hold_no_token() -> None:
    routing = Routing(20, 4, CPU)
    check_routing(routing, [])
    addresses = [routing.token_slots.data_ptr(), routing.order.data_ptr()]
    routing.update(np.array([1, 1, 0]))
    routing.update(np.zeros(0, dtype=np.int32))
    check_routing(routing, [])
    assert [routing.token_slots.data_ptr(), routing.order.data_ptr()] == addresses
    parts = [routing.token_slots, routing.order, *routing.tiles.values()]
    assert routing.nbytes == sum(part.nbytes for part in parts)


# ---- the slot table and its records


def test_a_table_holds_what_was_put_into_its_slots() -> None:
    world = World()
    table = SlotTable(3, COUNT, CPU)
    address = table.records.data_ptr()
    first, second = world.task([world.dense]), world.task([world.private("int8", 2)])
    table.set(0, first)
    table.set(2, second)
    table.set(0, second)
    table.set(1, first)
    assert table.records.data_ptr() == address
    for slot, task in enumerate((second, first, second)):
        assert torch.equal(table.records[slot], task.records)
        assert table.part(slot, 0) is task.slices[0]
        assert table.part(slot, 1) is task.slices.get(1)
    assert not table.records[3].any()
    assert table.part(3, 0) is None
    for slot in (-1, 3):
        with pytest.raises(AssertionError):
            table.set(slot, first)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1.0, -0.3, 3e-20])
def test_a_record_describes_private_factors(format: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = normal(5, 70, format, generator), normal(5, 40, format, generator)
    task = make_task({2: SliceTask(a=a, b=b, scale=scale)}, 4, CPU)
    assert task.records.shape == (4, RECORD_FIELDS)
    assert task.records.dtype == torch.int64
    assert not task.records[[0, 1, 3]].any()
    record = task.records[2].tolist()
    assert record[direct.RANK] == 5
    assert struct.pack("<i", record[direct.SCALE]) == struct.pack("<f", scale)
    kind = "float" if format in FLOAT_DTYPES else format
    assert record[direct.FORMAT] == direct.FORMAT_CODES[kind]
    names = {"float": ["values"], "int8": ["codes", "scales"], "nf4": ["codes", "scales"],
             "nf4-dq": ["codes", "scale_codes", "scale_range"],
             "trellis": ["codes", "scales", "widths"]}[kind]  # fmt: skip
    for matrix, first in ((a, direct.A_CODES), (b, direct.B_CODES)):
        want = [matrix.parts[name].data_ptr() for name in names]
        assert record[first : first + 3] == want + [0] * (3 - len(want))
    assert record[direct.CORE] == record[direct.CORE_RANK] == 0


def test_a_record_describes_a_core() -> None:
    core = torch.randn(3, 9)
    for rank in (0, 3):
        record = make_task({0: SliceTask(core=core, core_rank=rank)}, 1, CPU).records[0]
        assert (record[direct.CORE], record[direct.CORE_RANK]) == (core.data_ptr(), rank)
        rest = record.clone()
        rest[[direct.CORE, direct.CORE_RANK]] = 0
        assert not rest.any()


def test_factors_that_no_kernel_could_read_are_our_mistake() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = normal(5, 70, "int8", generator), normal(5, 40, "int8", generator)
    others = [b.by_columns(), b.row_slice(0, 4), normal(5, 40, "nf4", generator)]
    for bad in others:
        with pytest.raises(AssertionError):
            make_task({0: SliceTask(a=a, b=bad)}, 1, CPU)
    empty = SliceTask(a=a.row_slice(0, 0), b=b.row_slice(0, 0))
    assert not make_task({0: empty}, 1, CPU).records.any(), "rank 0 adds nothing"
