"""The Triton kernels of the direct path against the operation's definition.

Triton decides at import whether it interprets, so the tests run in pytest processes of their own, which
the last tests of this file start: in Triton's interpreter and, where there is a GPU, compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from vllm_vlora.narrow_rows import NARROW_FORMAT, narrow_matrix
from vllm_vlora.quantize import PackedMatrix, pack, pack_narrow, pack_trellis, stack_rows, unpack
from vllm_vlora.triton_kernels import direct
from vllm_vlora.triton_kernels.direct import (
    FORMAT_CODES,
    DirectLayer,
    DirectSlice,
    DirectTask,
    Routing,
    SliceTask,
    SlotTable,
    add_direct_reference,
    add_direct_triton,
    make_task,
)

BACKEND = os.environ.get("VLORA_TEST_DIRECT", "")
DEVICE = torch.device("cuda" if BACKEND == "gpu" else "cpu")

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Relative rounding: half a unit in the last place, but Triton's interpreter cuts a float32 to bfloat16
# instead of rounding it.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if BACKEND == "interpreter" else 2.0**-8,
}
# The most roundings to the dtype of x on one way through the operation: V, z, A_c z, w and U of a
# joint task in factor form.
ROUNDINGS = 5


@dataclass(frozen=True)
class Case:
    """One batch on one layer; ``slices`` are (width, k_in, k_out), ``d_in`` and widths without starts.

    ``first_block``: blocks of 64 columns that are cut off ahead of narrow factors.
    """

    tokens: int
    dtype: torch.dtype = torch.float16
    d_in: int = 96
    slices: tuple[tuple[int, int, int], ...] = ((40, 12, 9), (17, 0, 0), (33, 20, 24))
    v: str = "float16"
    u: tuple[str, ...] = ("float16",)
    private: tuple[str, ...] = ("float", "int8", "nf4", "nf4-dq")
    ranks: tuple[int, ...] = (1, 3, 9, 16, 20)
    core_ranks: tuple[int, ...] = (0, 5, 0, 20)
    start_in: int = 0
    start_out: int = 0
    first_block: int = 0
    slots: int = 7
    seed: int = 0


@dataclass
class World:
    layer: DirectLayer
    table: SlotTable
    routing: Routing
    tasks: list[DirectTask]
    x: torch.Tensor
    y: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor


def make_world(case: Case) -> World:
    """A layer, a task of every kind in its slots, and a batch that mixes them in random order."""
    torch.manual_seed(case.seed)
    layer = make_layer(case)
    count = layer.index + len(layer.slices) + 1
    table = SlotTable(case.slots, count, DEVICE)
    tasks = [make_slot(case, layer, slot, count) for slot in range(case.slots)]
    for slot, task in enumerate(tasks):
        table.set(slot, task)
    routing = Routing(case.tokens + 40, case.slots, DEVICE)
    rng = np.random.default_rng(case.seed)
    routing.update(rng.integers(0, case.slots + 1, case.tokens, dtype=np.int32))
    x = torch.randn(case.tokens, case.d_in + 16).to(DEVICE, case.dtype)[:, 8 : 8 + case.d_in]
    buffer = torch.randn(case.tokens + 2, layer.width + 24).to(DEVICE, case.dtype)
    y = buffer[1 : 1 + case.tokens, 8 : 8 + layer.width]
    return World(layer, table, routing, tasks, x, y, buffer, buffer.clone())


def make_layer(case: Case) -> DirectLayer:
    slices, v = [], []
    for place, (width, k_in, k_out) in enumerate(case.slices):
        u = None
        if k_in:
            v.append(torch.randn(k_in, case.d_in) / case.d_in**0.5)
            u = packed(torch.randn(k_out, width) / k_out**0.5, case.u[place % len(case.u)])
        slices.append(DirectSlice(width, case.start_in, case.start_out, u, k_in))
    stacked = packed(torch.cat(v), case.v) if v else None
    formats = tuple(kind for kind in FORMAT_CODES if kind in case.private)
    return DirectLayer(1, case.d_in, tuple(slices), stacked, max(case.ranks, default=0), formats)


def make_slot(case: Case, layer: DirectLayer, slot: int, count: int) -> DirectTask:
    """The kinds by turns: joint everywhere it can be, private, by turns along the slices, nothing."""
    parts = {}
    for place, part in enumerate(layer.slices):
        kind = ("joint", "private", "mixed", "private", "nothing", "joint")[slot % 6]
        joint = kind == "joint" or (kind == "mixed" and place % 2 == 0)
        number = slot + place
        if kind == "nothing" or (kind == "mixed" and place == 1):
            continue
        if joint and part.u is not None:
            parts[layer.index + place] = joint_task(case, part, number)
        elif not joint and case.private and case.ranks:
            parts[layer.index + place] = private_task(case, part, number)
    return make_task(parts, count, DEVICE)


def joint_task(case: Case, part: DirectSlice, number: int) -> SliceTask:
    rank = case.core_ranks[number % len(case.core_ranks)]
    shape = (rank, part.k_in + part.k_out) if rank else (part.k_out, part.k_in)
    core = torch.randn(shape) / (rank or part.k_in) ** 0.5
    return SliceTask(core=core.to(DEVICE, case.dtype), core_rank=rank)


def private_task(case: Case, part: DirectSlice, number: int) -> SliceTask:
    format = case.private[number % len(case.private)]
    format = NAMES[case.dtype] if format == "float" else format
    rank = case.ranks[number % len(case.ranks)]
    a = torch.randn(rank, case.start_in + case.d_in) / case.d_in**0.5
    b = torch.randn(rank, case.start_out + part.width)
    scale = (0.37, -1.5)[number % 2]
    if format in (NARROW_FORMAT, "trellis"):
        a, b = (narrow(case, side, number, format) for side in (a, b))
        return SliceTask(a=a, b=b, scale=scale)
    return SliceTask(a=packed(a, format), b=packed(b, format), scale=scale)


def narrow(case: Case, matrix: torch.Tensor, number: int, format: str) -> PackedMatrix:
    """The matrix in rows of 4, 3 and 2 bits, in turns most or none of one kind."""
    rank, before = len(matrix), 64 * case.first_block
    four = (rank // 3, 0, rank, 1)[number % 4]
    three = ((rank - four + 1) // 2, rank - four, 0, 0)[number // 2 % 4]
    counts = (four, three, rank - four - three)
    whole = torch.cat([torch.randn(rank, before), matrix], dim=1)
    by_bits = list(zip((4, 3, 2), whole.split(list(counts))))
    if format == "trellis":
        held = stack_rows([pack_trellis(rows, bits) for bits, rows in by_bits])
    else:
        parts = [pack_narrow(r, bits) if bits < 4 else pack(r, "nf4-dq") for bits, r in by_bits]
        held = narrow_matrix(stack_rows(parts), counts)
    cut = held.column_blocks(before, held.cols) if before else held
    return replace(cut, parts=guarded(cut.parts))


def packed(matrix: torch.Tensor, format: str) -> PackedMatrix:
    """The packed matrix, guarded."""
    whole = pack(matrix, format)
    return replace(whole, parts=guarded(whole.parts))


def guarded(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each part with values behind it that must not be read: NaN in floats."""
    found = {}
    for name, part in parts.items():
        held = torch.zeros(part.shape[0] + 1, *part.shape[1:], dtype=part.dtype)
        held.fill_(float("nan") if part.is_floating_point() else 99)
        held[:-1] = part
        found[name] = held.to(DEVICE)[:-1]
    return found


def exact(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """y in float64 without any rounding, and the sum of its terms' magnitudes."""
    x, layer = world.x.double(), world.layer
    y, magnitude = world.before[1:-1, 8 : 8 + layer.width].double(), None
    magnitude = y.abs()
    v = None if layer.v is None else unpack(layer.v).double()
    for token, slot in enumerate(world.routing.token_slots[: x.shape[0]].tolist()):
        column = basis = 0
        for place, part in enumerate(layer.slices):
            cols = slice(column, column + part.width)
            task = world.table.part(slot, layer.index + place)
            for matrices in chains(task, part, layer, v, basis):
                value, size = x[token], x[token].abs()
                for matrix in matrices:
                    value, size = matrix @ value, matrix.abs() @ size
                y[token, cols] += value
                magnitude[token, cols] += size
            column += part.width
            basis += part.k_in
    return y, magnitude


def chains(
    task: SliceTask | None,
    part: DirectSlice,
    layer: DirectLayer,
    v: torch.Tensor | None,
    basis: int,
) -> list[list[torch.Tensor]]:
    """The matrices that x goes through, for each of the task's two terms."""
    found = []
    if task is not None and task.core is not None:
        assert v is not None
        assert part.u is not None
        core = task.core.double()
        if task.core_rank:
            core = core[:, part.k_in :].T @ core[:, : part.k_in]
        found.append([v[basis : basis + part.k_in], core, unpack(part.u).double().T])
    if task is not None and task.a is not None and task.b is not None:
        a = unpack(task.a).double()[:, part.start_in : part.start_in + layer.d_in]
        b = unpack(task.b).double()[:, part.start_out : part.start_out + part.width]
        found.append([a, task.scale * b.T])
    return found


def assert_close_to_exact(world: World) -> None:
    """Within what the roundings of the definition allow."""
    expected, magnitude = exact(world)
    terms = world.layer.d_in + max(part.k_in + part.k_out for part in world.layer.slices)
    bound = (ROUNDINGS + 1) * ROUNDING[world.x.dtype] + (terms + 40) * 2.0**-24
    smallest = torch.finfo(world.x.dtype).smallest_normal
    error = (world.y.double() - expected).abs()
    assert not error.isnan().any()
    assert (error <= 1.01 * bound * magnitude + 8 * smallest).all(), (error / magnitude).max()


def assert_outside_untouched(world: World) -> None:
    outside = torch.ones_like(world.buffer, dtype=torch.bool)
    outside[1:-1, 8 : 8 + world.layer.width] = False
    assert torch.equal(bits(world.buffer)[outside], bits(world.before)[outside])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def run(world: World) -> None:
    add_direct_triton(world.y, world.x, world.layer, world.table, world.routing)


def by_reference(world: World) -> torch.Tensor:
    y = world.before[1:-1, 8 : 8 + world.layer.width].clone()
    add_direct_reference(y, world.x, world.layer, world.table, world.routing)
    return y


if BACKEND:
    HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
    # Formats whose rows consist of units of eight columns.
    PACKED = ("nf4", "nf4-dq", NARROW_FORMAT, "trellis")
    EVEN = ((64, 16, 32), (192, 0, 0), (64, 32, 16))
    CASES = {
        "one token": Case(1, slots=1, seed=1),
        "float32": Case(23, SINGLE, v="float32", u=("float32",)),
        "float16": Case(70, d_in=100),
        "bfloat16": Case(40, BF16, v="bfloat16", u=("bfloat16",)),
        "int8 and nf4": Case(33, v="int8", u=("nf4",), d_in=131),
        "nf4 and nf4-dq": Case(20, BF16, v="nf4", u=("nf4-dq",)),
        "nf4-dq and int8": Case(9, SINGLE, v="nf4-dq", u=("int8",)),
        "U in several formats": Case(16, u=("int8", "nf4", "float16")),
        "another float": Case(12, v="float32", u=("bfloat16",)),
        "even sizes": Case(24, d_in=192, slices=EVEN, ranks=(4, 8, 16)),
        "even sizes, bfloat16": Case(9, BF16, d_in=128, slices=EVEN, v="bfloat16", u=("bfloat16",)),
        "even, cut": Case(24, d_in=64, slices=EVEN, start_in=64, start_out=128),
        "uneven, cut": Case(18, d_in=75, start_in=37, start_out=21),
        "several parts of d_in": Case(10, d_in=1300, slices=((48, 7, 8), (20, 5, 30))),
        "many blocks": Case(
            11, slices=((300, 70, 130),), ranks=(40, 33, 2), core_ranks=(0, 40), d_in=64
        ),
        "scale ranges": Case(
            6, d_in=128, slices=((64, 3, 4),), ranks=(2,), private=("nf4-dq",), slots=2,
            start_in=64 * 255, start_out=64 * 256,
        ),
        "scale ranges, uneven": Case(
            6, d_in=80, slices=((50, 3, 4),), ranks=(2,), private=("nf4-dq",), slots=2,
            start_in=64 * 255 + 9, start_out=64 * 256 - 3,
        ),
        # Kernels of one format are others than those of several.
        "float alone": Case(24, d_in=192, slices=EVEN, private=("float",), slots=20),
        "int8 alone": Case(24, d_in=192, slices=EVEN, private=("int8",), slots=20),
        "nf4 alone": Case(24, d_in=192, slices=EVEN, private=("nf4",), slots=20),
        "nf4 alone, bfloat16": Case(
            12, BF16, d_in=576, slices=EVEN, private=("nf4",), ranks=(5, 18), slots=8
        ),
        "every format": Case(20, private=tuple(FORMAT_CODES)),
        "narrow rows": Case(24, d_in=192, slices=EVEN, private=(NARROW_FORMAT,), slots=20),
        "narrow rows, bfloat16": Case(
            12, BF16, d_in=576, slices=EVEN, private=(NARROW_FORMAT,), ranks=(5, 18), slots=8
        ),
        "narrow rows, float32": Case(20, SINGLE, d_in=128, slices=EVEN, private=(NARROW_FORMAT,)),
        "narrow rows, uneven": Case(
            30, d_in=75, start_in=37, start_out=21, private=(NARROW_FORMAT,), slots=24
        ),
        "narrow rows, cut in a group": Case(
            12, d_in=128, slices=((128, 3, 4),), private=(NARROW_FORMAT,), first_block=255
        ),
        "narrow rows, cut unevenly": Case(
            12, d_in=80, slices=((150, 3, 4),), private=(NARROW_FORMAT,), first_block=254,
            start_in=9, start_out=33,
        ),
        "narrow rows, prefill": Case(
            1100, d_in=192, slices=EVEN, private=(NARROW_FORMAT,), slots=12
        ),
        "trellis": Case(24, d_in=192, slices=EVEN, private=("trellis",), slots=20),
        "trellis, bfloat16": Case(
            12, BF16, d_in=576, slices=EVEN, private=("trellis",), ranks=(5, 18), slots=8
        ),
        "trellis, float32": Case(20, SINGLE, d_in=128, slices=EVEN, private=("trellis",)),
        "trellis, uneven": Case(30, d_in=75, start_in=37, start_out=21, private=("trellis",)),
        "trellis, cut": Case(
            12, d_in=128, slices=((128, 3, 4),), private=("trellis",), first_block=3
        ),
        "trellis, prefill": Case(1100, d_in=192, slices=EVEN, private=("trellis",), slots=12),
        "prefill": Case(1100, d_in=70),
        "prefill, bfloat16": Case(
            1070, BF16, v="bfloat16", u=("nf4",), d_in=64, slices=EVEN, slots=3
        ),
        "long decode, packed": Case(290, v="nf4-dq", u=("int8",), d_in=300, slots=2),
        "prefill, float32": Case(1060, SINGLE, v="float32", u=("float32",), d_in=40),
        "no basis": Case(14, slices=((40, 0, 0), (17, 0, 0))),
        "only joint": Case(14, private=(), ranks=()),
    }  # fmt: skip

    @pytest.mark.parametrize("name", CASES)
    def test_close_to_float64_and_nothing_else_changes(name: str) -> None:
        world = make_world(CASES[name])
        run(world)
        assert_close_to_exact(world)
        assert_outside_untouched(world)
        slots = world.routing.token_slots[: world.x.shape[0]]
        idle = torch.tensor([not slot_works(world, slot) for slot in slots.tolist()])
        assert torch.equal(bits(world.buffer)[1:-1][idle], bits(world.before)[1:-1][idle])
        assert (world.y != world.before[1:-1, 8 : 8 + world.layer.width]).any()

    def slot_works(world: World, slot: int) -> bool:
        task = world.table.tasks[slot]
        return task is not None and bool(task.slices)

    @pytest.mark.parametrize("name", ["uneven", "even", "parts", "prefill"])
    def test_rounding_points_are_those_of_the_reference(name: str) -> None:
        """Sums in another order move a rounding now and then; a rounding too few or too many moves a
        third of the results of the tokens that it concerns.

        A token alone is multiplied by codes and not by numbers, where rows begin at units of eight."""
        case = {
            "uneven": Case(44, slots=36),
            "even": Case(44, d_in=192, slices=EVEN, slots=36),
            "parts": Case(36, d_in=1100, slices=((48, 7, 8),), slots=24),
            "prefill": Case(1100, slots=12),
        }[name]
        world = make_world(case)
        world.y.zero_()
        world.before.copy_(world.buffer)
        run(world)
        same = (world.y == by_reference(world)).float()
        with patch.object(
            direct, "_rounded", lambda matrix, dtype, *cut: unpack(matrix, SINGLE, *cut)
        ):
            unrounded = (world.y == by_reference(world)).float()
        groups: dict[tuple[bool, int, bool], list[float]] = {}
        slots = world.routing.token_slots[: case.tokens].tolist()
        for token, slot in enumerate(slots):
            column = 0
            for place, part in enumerate(world.layer.slices):
                task = world.table.part(slot, 1 + place)
                if task is not None:
                    alone = slots.count(slot) == 1
                    kind = (task.core is not None, task.core_rank, alone)
                    in_units = task.a is not None and task.a.format in PACKED
                    found = unrounded if name == "even" and alone and in_units else same
                    block = found[token, column : column + part.width]
                    groups.setdefault(kind, []).append(block.mean().item())
                column += part.width
        fractions = {kind: sum(found) / len(found) for kind, found in groups.items()}
        assert len(fractions) > 3
        assert min(fractions.values()) > 0.9, fractions

    def test_joint_is_the_product_of_its_matrices() -> None:
        case = Case(12, SINGLE, slices=((40, 12, 9),), v="float32", u=("float32",), slots=1)
        world = make_world(case)
        world.routing.update(np.zeros(12, dtype=np.int32))
        part = world.tasks[0].slices[1]
        assert part.core is not None
        assert world.layer.v is not None
        u = world.layer.slices[0].u
        assert u is not None
        core = torch.randn(9, 12).to(DEVICE)
        world.table.set(0, make_task({1: SliceTask(core=core)}, 3, DEVICE))
        delta = unpack(u).double().T @ core.double() @ unpack(world.layer.v).double()
        run(world)
        expected = world.before[1:-1, 8:48].double() + world.x.double() @ delta.T
        torch.testing.assert_close(world.y.double(), expected, rtol=1e-5, atol=2e-5)

    def test_both_terms_of_one_slice_are_added() -> None:
        case = Case(20, slices=((40, 12, 9), (30, 8, 8)), slots=2)
        world = make_world(case)
        for slot in range(2):
            parts = {}
            for place, part in enumerate(world.layer.slices):
                joint, private = joint_task(case, part, place), private_task(case, part, slot)
                parts[1 + place] = SliceTask(
                    joint.core, joint.core_rank, private.a, private.b, private.scale
                )
            world.tasks[slot] = make_task(parts, 4, DEVICE)
            world.table.set(slot, world.tasks[slot])
        run(world)
        assert_close_to_exact(world)

    @pytest.mark.parametrize("tokens", [5, 300, 1100])
    def test_tokens_without_a_task_and_padding_keep_their_bits(tokens: int) -> None:
        """Also those that an addition of zero would change, whatever x holds there."""
        world = make_world(Case(tokens))
        live = tokens - 3
        slots = np.arange(live, dtype=np.int32) % 8
        world.routing.update(slots)
        idle = np.concatenate([np.isin(slots, [4, 7]), np.ones(3, dtype=bool)])
        idle = torch.from_numpy(idle).to(DEVICE)
        world.y[idle] = torch.tensor(-0.0, dtype=world.y.dtype)
        world.x[idle] = float("nan")
        world.y[tokens - 2] = float("nan")
        world.before.copy_(world.buffer)
        run(world)
        assert torch.equal(bits(world.buffer)[1:-1][idle], bits(world.before)[1:-1][idle])
        assert torch.isfinite(world.y[~idle]).all()
        # Sums in another order: a rounding of an intermediate to float16 may go the other way.
        wanted = by_reference(world)[~idle]
        torch.testing.assert_close(world.y[~idle], wanted, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("tokens", [7, 280, 1090])
    def test_a_launch_reads_slots_and_routing_from_the_device(tokens: int) -> None:
        """As a captured graph does: what the host holds is gone, what the buffers hold has changed."""
        case = Case(tokens)
        world = make_world(case)
        run(world)
        world.y.copy_(world.before[1:-1, 8 : 8 + world.layer.width])
        others = list(reversed(world.tasks))
        for slot, task in enumerate(others):
            world.table.set(slot, task)
        world.routing.update(np.arange(tokens, dtype=np.int32)[::-1] % (case.slots + 1))
        held, world.table.tasks = world.table.tasks, []
        world.routing.runs.clear()
        run(world)
        world.table.tasks = held
        assert_close_to_exact(world)

    def test_running_twice_gives_the_same_bits() -> None:
        results = []
        for _ in range(2):
            world = make_world(Case(30, d_in=1100))
            run(world)
            results.append(world.y.clone())
        assert torch.equal(*results)

    def test_one_task_for_all_tokens() -> None:
        for slot in (0, 1):
            world = make_world(Case(50, slots=2))
            world.routing.update(np.full(50, slot, dtype=np.int32))
            run(world)
            assert_close_to_exact(world)

    def test_an_empty_batch_is_accepted() -> None:
        world = make_world(Case(4))
        world.routing.update(np.zeros(0, dtype=np.int32))
        add_direct_triton(world.y[:0], world.x[:0], world.layer, world.table, world.routing)
        run(world)
        assert torch.equal(world.buffer, world.before)

    def test_a_basis_that_is_not_contiguous_along_rows_is_refused() -> None:
        world = make_world(Case(4, slices=((40, 12, 9),)))
        values = torch.ones(96, 12, dtype=torch.float16, device=DEVICE).t()
        v = PackedMatrix("float16", 12, 96, {"values": values})
        layer = DirectLayer(1, 96, world.layer.slices, v, 0)
        with pytest.raises(ValueError, match="of V must be contiguous along its rows"):
            add_direct_triton(world.y, world.x, layer, world.table, world.routing)
        assert torch.equal(world.buffer, world.before)

else:

    def run_in_own_process(backend: str, interpret: str) -> None:
        environment = os.environ | {
            "VLORA_TEST_DIRECT": backend,
            "TRITON_INTERPRET": interpret,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
    def test_direct_kernels_in_the_interpreter() -> None:
        run_in_own_process("interpreter", "1")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_direct_kernels_on_the_gpu() -> None:
        run_in_own_process("gpu", "0")
