"""Tasks as runs of bytes, and the memory that they are put into."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.plugin.arena import ALIGNMENT, LEAST_CHUNK, Arena, Block
from vllm_vlora.plugin.images import Span, make_image

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tree:
    """What an image may hold."""

    name: str
    number: float
    pair: tuple[torch.Tensor, ...]
    parts: dict[str, torch.Tensor]
    records: torch.Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Of a module, as a packed matrix is."""

    values: torch.Tensor


@dataclass(frozen=True)
class Whole:
    """A task of many modules."""

    pairs: Mapping[str, tuple[Part, Part]]
    alone: Part


def odd(nbytes: int, offset: int) -> torch.Tensor:
    """Memory that begins ``offset`` bytes after a multiple of 64."""
    whole = torch.randint(0, 255, (nbytes + 64 + offset,), dtype=torch.uint8)
    start = -whole.data_ptr() % 64 + offset
    return whole[start : start + nbytes]


def tensors() -> dict[str, torch.Tensor]:
    flat = torch.arange(100, dtype=torch.float32)
    return {
        "a": flat[:40].view(4, 10),
        "b": flat[40:64].view(6, 4),
        "the same": flat[:40].view(4, 10),
        "columns": torch.randn(5, 7).T,
        "strided": torch.arange(60).view(6, 10)[::2, 1:9:3],
        "empty": torch.empty(0, 3),
        "one": torch.tensor(7, dtype=torch.int16),
        "odd": odd(24, 8).view(torch.float32),
        "bf16": torch.randn(3).bfloat16(),
    }


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("leave", [False, True])
def test_a_tree_is_what_it_was_wherever_it_lies(leave: bool, stay: bool) -> None:
    parts, shared = tensors(), torch.randn(9)
    tree = Tree("n", 0.5, (parts["a"], shared), parts)
    image = make_image(tree, [shared] if leave else (), stay=stay)
    for _ in range(2):
        memory = torch.full((image.size + 300,), 255, dtype=torch.uint8)
        placed = image.on(memory)
        assert (placed.name, placed.number) == ("n", 0.5)
        for name, tensor in parts.items():
            found = placed.parts[name]
            assert torch.equal(found, tensor), name
            assert found.stride() == tensor.stride()
            assert found.data_ptr() % 16 == tensor.data_ptr() % 16 or not tensor.numel()
        assert placed.parts["the same"].data_ptr() == placed.parts["a"].data_ptr()
        assert placed.parts["b"].data_ptr() - placed.parts["a"].data_ptr() == 160
        assert (placed.pair[1] is shared) == leave
        assert memory[image.size :].eq(255).all()
    for name, tensor in parts.items():
        on_host = image.tree.parts[name]
        assert torch.equal(on_host, tensor), name
        assert (on_host.data_ptr() == tensor.data_ptr()) == stay or not tensor.numel()
    # a and b are one run; of the strided one what lies between its first and last element.
    counted = 64 * 4 + 35 * 4 + (4 * 10 + 6 + 1) * 8 + 2 + 24 + 6 + (0 if leave else 36)
    assert image.nbytes == counted


@pytest.mark.parametrize("stay", [False, True])
def test_addresses_follow_what_they_point_at(stay: bool) -> None:
    a, b = torch.randn(8), torch.randn(20)
    records = torch.tensor([[a.data_ptr(), 5, b.data_ptr() + 16], [0, 7, a.data_ptr() + 4]])
    image = make_image(Tree("n", 1, (a, b), {}, records), (), (records, [0, 2]), stay=stay)
    for _ in range(2):
        memory = torch.zeros(image.size, dtype=torch.uint8)
        placed = image.on(memory)
        new_a, new_b = (tensor.data_ptr() for tensor in placed.pair)
        assert placed.records is not None
        assert placed.records.tolist() == [[new_a, 5, new_b + 16], [0, 7, new_a + 4]]
    assert torch.equal(records[:, 1], torch.tensor([5, 7])), "what is no address is left alone"


def test_what_stays_keeps_its_memory_and_no_more_is_read_of_it() -> None:
    whole = torch.arange(64, dtype=torch.float32)
    # Neighbours of one storage are one piece; others are not, wherever they happen to lie.
    image = make_image(Tree("n", 1, (whole[8:16], whole[16:24]), {"b": torch.ones(3)}), stay=True)
    assert sorted(piece.nbytes for _, piece in image.pieces) == [12, 64]
    kept = weakref.ref(whole)
    want = whole[8:24].clone()
    del whole
    assert kept() is None, "the tensor itself is gone"
    placed = image.on(torch.zeros(image.size, dtype=torch.uint8))
    assert torch.equal(torch.cat(placed.pair), want)


def test_what_tasks_share_takes_a_place_of_its_own() -> None:
    own, shared = torch.randn(3), torch.randn(50)
    basis = make_image(shared)
    image = make_image(Tree("n", 1, (own, basis.tree[10:30]), {}), [basis.tree])
    elsewhere = torch.zeros(basis.size, dtype=torch.uint8)
    there = basis.on(elsewhere)
    placed = image.on(
        torch.zeros(image.size, dtype=torch.uint8),
        [Span(basis.pieces[0][1].data_ptr(), elsewhere)],
    )
    assert torch.equal(placed.pair[1], shared[10:30])
    assert placed.pair[1].data_ptr() == there.data_ptr() + 40
    assert image.nbytes == 12


def test_what_lies_in_no_span_stays() -> None:
    a = torch.randn(4)
    image = make_image(Tree("n", 1, (a,), {"a": a}), [a])
    memory = torch.zeros(image.size, dtype=torch.uint8)
    beside = Span(a.data_ptr() - 64, torch.zeros(64, dtype=torch.uint8))
    short = Span(a.data_ptr(), torch.zeros(15, dtype=torch.uint8))
    for shared in ([], [beside], [short]):
        placed = image.on(memory, shared)
        assert placed.pair[0] is a
        assert placed.parts["a"] is a


def test_what_is_read_later_is_the_devices_and_keeps_no_host_memory() -> None:
    image = make_image(Tree("n", 1, (), tensors()))
    memory = torch.zeros(image.size, dtype=torch.uint8)
    placed, block = image.on(memory), weakref.ref(image.pieces[0][1])
    del image
    assert block() is None
    assert list(placed.parts) == list(tensors())
    assert len(placed.parts) == len(tensors())
    found = placed.parts["a"]
    assert placed.parts["a"] is found, "made once"
    assert torch.equal(found, torch.arange(40.0).view(4, 10))
    memory.zero_()
    assert not found.any()


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 900), st.integers(0, 50)), max_size=60),
    st.lists(st.integers(1, 2000), min_size=1, max_size=3),
)
def test_blocks_never_meet_and_all_memory_comes_back(
    script: list[tuple[bool, int, int]], chunks: list[int]
) -> None:
    arena = Arena(CPU, 1 << 20)
    for nbytes in chunks:
        assert arena.grow(nbytes)
    held: list[tuple[Block, int]] = []
    for take, nbytes, which in script:
        if take:
            block = arena.allocate(nbytes)
            sizes = [b.memory.nbytes for b, _ in held]
            assert arena.used == sum(sizes) + (block.memory.nbytes if block else 0)
            if block is not None:
                assert nbytes <= block.memory.nbytes < nbytes + ALIGNMENT
                held.append((block, len(held) % 251))
                block.memory.fill_(held[-1][1])
        elif held:
            block, mark = held.pop(which % len(held))
            assert block.memory.eq(mark).all()
            arena.free(block)
    for block, mark in held:
        assert block.memory.eq(mark).all()
        arena.free(block)
    assert arena.used == 0
    # Every chunk is whole again.
    whole = [arena.allocate(nbytes) for nbytes in sorted(chunks, reverse=True)]
    assert None not in whole


def test_an_arena_grows_up_to_its_limit_and_is_sealed() -> None:
    arena = Arena(CPU, LEAST_CHUNK + 1024)
    assert arena.allocate(1) is None
    first = arena.allocate_growing(1000)
    assert first is not None
    assert arena.nbytes == LEAST_CHUNK
    assert arena.allocate_growing(LEAST_CHUNK) is None
    second = arena.allocate_growing(LEAST_CHUNK - 1024)
    assert second is not None
    assert arena.nbytes == LEAST_CHUNK
    assert arena.allocate_growing(1024) is not None
    assert arena.nbytes == LEAST_CHUNK + 1024
    assert arena.allocate_growing(1) is None
    arena.seal(5000)
    assert arena.nbytes == LEAST_CHUNK + 1024 + 5120
    assert not arena.grow(1)
    assert arena.allocate(5000) is not None


def _is_of_an_image(thing: object) -> bool:
    return isinstance(thing, torch.Tensor) or type(thing).__module__.startswith("vllm_vlora.")


def test_garbage_collections_do_not_look_at_what_an_engine_holds_of_its_tasks() -> None:
    """Hundreds of modules a task, for each of which there are matrices, sides and places."""
    modules, tasks = 40, 25
    held = []
    gc.collect()
    # What was there before is neither looked at nor counted.
    gc.freeze()
    try:
        for _ in range(tasks):
            pairs = {
                f"module {i}": (Part(torch.zeros(4)), Part(torch.zeros(2))) for i in range(modules)
            }
            image = make_image(Whole(pairs, Part(torch.zeros(3))))
            held.append((image, image.on(torch.empty(image.size, dtype=torch.uint8))))
        del pairs, image
        gc.collect()
        # Other threads of a test process make objects meanwhile: these are an engine's alone.
        looked_at = [thing for thing in gc.get_objects() if _is_of_an_image(thing)]
        assert 0 < len(looked_at) < tasks * modules
    finally:
        gc.unfreeze()
    assert torch.equal(held[0][1].pairs["module 7"][1].values, torch.zeros(2))
