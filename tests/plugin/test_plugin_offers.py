"""Tasks from memory on their way to a worker: what is written, mapped, copied and refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from vllm_vlora.adapters.state_dicts import read_state_dict
from vllm_vlora.blend_names import Term
from vllm_vlora.errors import (
    AdapterError,
    BlendError,
    CheckpointError,
    MemoryBudgetError,
    OptionError,
    TaskIdError,
    TaskLoadError,
    TaskNotFoundError,
    VLoRAError,
)

pytest.importorskip("vllm")

from vllm_vlora.plugin import publishing
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path
from vllm_vlora.plugin.offers import ElsewhereError, Offer, OfferedCheckpoint, offered, read_whole
from vllm_vlora.plugin.published import ADOPT_METHOD, ELSEWHERE, OFFER_METHOD, WITHDRAW_METHOD
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import Budget
from vllm_vlora.quantize import pack, unpack

NAMES = ("layers.0.q_proj", "layers.0.down_proj")
SHAPES = {NAMES[0]: (24, 40), NAMES[1]: (40, 72)}


def factors(dtype: torch.dtype = torch.float32, rank: int = 3) -> dict[str, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    return {name: [draw(rank, d_in), draw(d_out, rank)] for name, (d_in, d_out) in SHAPES.items()}


def modules(**options: Any) -> list[Any]:
    return read_state_dict(factors(**options), None, 6.0, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_a_worker_maps_is_what_was_given_to_the_bit(dtype: torch.dtype) -> None:
    given = factors(dtype)
    with offered("a task/ü", modules(dtype=dtype), None) as offer:
        checkpoint = OfferedCheckpoint(offer)
    # The memory of who offered it is gone.
    task = checkpoint.load_task("a task/ü")
    assert list(task.modules) == sorted(NAMES)
    for name, (a, b) in given.items():
        stored = task.modules[name]
        assert (stored.rank, stored.scale) == (3, 2.0)
        assert torch.equal(stored.matrices["A"].parts["values"], a)
        assert torch.equal(stored.matrices["B"].parts["values"], b.T)
    path = parse_task_path(offer.path)
    assert path is not None
    assert path.checkpoint == MEMORY == checkpoint.path
    assert path.digest == checkpoint.digest("a task/ü") == task.digest
    assert not checkpoint.was_replaced


@pytest.mark.parametrize("format", ["int8", "nf4", "nf4-dq", "bfloat16"])
def test_packed_factors_are_those_that_pack_makes(format: str) -> None:
    with offered("t", modules(), format) as offer:
        task = OfferedCheckpoint(offer).load_task("t")
    for name, (a, b) in factors().items():
        matrices = task.modules[name].matrices
        assert torch.equal(unpack(matrices["A"]), unpack(pack(a, format)))
        assert torch.equal(unpack(matrices["B"]), unpack(pack(b.T.contiguous(), format)))


def test_every_publication_has_a_path_of_its_own() -> None:
    """Whatever is published under a name is told from what was before, of the same tensors too."""
    paths = set()
    for _ in range(3):
        with offered("t", modules(), None) as offer:
            paths.add(offer.path)
    assert len(paths) == 3
    assert len({path.rpartition("@")[0] for path in paths}) == 1


def test_another_machines_memory_is_said_to_be_that() -> None:
    with offered("t", modules(), None) as offer:
        content = read_whole(offer)
        for place in ("/proc/1/fd/no such", "/dev/null", "/proc/self/exe"):
            with pytest.raises(ElsewhereError):
                OfferedCheckpoint(msgspec.structs.replace(offer, place=place))
        # The very size, and not what was offered.
        other = os.memfd_create("other")
        os.ftruncate(other, os.stat(offer.place).st_size)
        with pytest.raises(ElsewhereError, match="is another file"):
            OfferedCheckpoint(msgspec.structs.replace(offer, place=f"/proc/self/fd/{other}"))
        os.close(other)
    with pytest.raises(ElsewhereError):
        OfferedCheckpoint(offer)
    assert len(content) == offer.nbytes
    values = OfferedCheckpoint(offer, content).load_task("t").modules[NAMES[0]].matrices
    assert torch.equal(values["A"].parts["values"], factors()[NAMES[0]][0])


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float, format: str | None) -> None:
    given = modules()
    given[1][1][1][2, 1] = value
    with pytest.raises(AdapterError, match=r"task 't': lora_B of .*q_proj.* NaN or infinite"):
        next(_steps_of(given, format))


def _steps_of(given: list[Any], format: str | None) -> Iterator[Offer]:
    with offered("t", given, format) as offer:
        yield offer


def test_a_value_too_large_for_the_format_is_refused() -> None:
    given = modules()
    given[0][1][0][0, 0] = 1e6
    with pytest.raises(AdapterError, match="too large for float16"):
        next(_steps_of(given, "float16"))


# --- in a worker ----------------------------------------------------------------------------------


def _store(late: int, host: int = 0) -> ResidentStore:
    store = ResidentStore(
        torch.device("cpu"), lambda name: name, lambda *_: None, budget=Budget(0, late, host)
    )
    store.seal()
    return store


def test_a_task_comes_back_from_memory_until_it_is_discarded() -> None:
    store = _store(late=1 << 20)
    with offered("t", modules(), None) as offer:
        checkpoint = OfferedCheckpoint(offer)
    path = checkpoint.task_path
    store.take(path, checkpoint)
    for _ in range(2):  # The host keeps nothing of it: the second time it is read again.
        assert store.place(path) == 0
        task = store.held(str(path))
        assert task is not None
        for name, (a, b) in factors().items():
            side_a, side_b = task.sources[name]
            assert torch.equal(side_a.to_dense(), a)
            assert torch.equal(side_b.to_dense(), 2 * b.T)
        store.drop(str(path))
        assert store.arena_used == 0
    store.discard(str(path))
    with pytest.raises(CheckpointError, match="published again or unpublished; use the request"):
        store.place(path)


def test_one_that_is_larger_than_all_room_is_refused_and_not_kept() -> None:
    store = _store(late=2048)
    with offered("t", modules(), None) as offer:
        checkpoint = OfferedCheckpoint(offer)
    with pytest.raises(MemoryBudgetError, match=r"no room for task 't': .*VLLM_VLORA_LATE_MIB"):
        store.take(checkpoint.task_path, checkpoint)
    with pytest.raises(CheckpointError, match="published again or unpublished"):
        store.place(checkpoint.task_path)


def test_blends_of_tasks_from_memory_are_refused() -> None:
    blend = (Term("t", Decimal("0.5")),)
    with pytest.raises(BlendError, match="tasks from memory cannot be blended"):
        blend_path({"t": TaskPath(MEMORY, "tasks/t.safetensors", "0" * 32)}, blend)


# --- what engine cores are asked ------------------------------------------------------------------


class Engine:
    """What of an engine is looked at."""


def steps(**options: Any) -> Any:
    given = {"alpha": 6, "config": None, "quantize": None, "tensors": factors(), "task": "t"}
    return publishing._publishing(Engine(), **(given | options))


def test_all_are_asked_and_then_told() -> None:
    asked = steps()
    method, described = next(asked)
    assert method == OFFER_METHOD
    offer = msgspec.json.decode(described, type=Offer)
    assert os.path.exists(offer.place)
    assert asked.send(["", ""]) == (ADOPT_METHOD, "t", offer.path)
    with pytest.raises(StopIteration) as done:
        asked.send(["", ""])
    assert done.value.value.lora_path == offer.path
    assert done.value.value.lora_name == "t"
    assert not os.path.exists(offer.place)


def test_who_cannot_map_the_memory_is_sent_its_bytes() -> None:
    asked = steps()
    _, described = next(asked)
    method, again, content = asked.send(["", ELSEWHERE])
    assert (method, again) == (OFFER_METHOD, described)
    offer = msgspec.json.decode(described, type=Offer)
    task = OfferedCheckpoint(offer, content).load_task("t")
    assert task.modules.keys() == set(NAMES)
    assert asked.send(["", ""])[0] == ADOPT_METHOD
    asked.close()


def test_where_one_refuses_all_are_told_to_let_go() -> None:
    asked = steps()
    _, described = next(asked)
    path = msgspec.json.decode(described, type=Offer).path
    assert asked.send(["", "no layer q_proj"]) == (WITHDRAW_METHOD, path)
    with pytest.raises(TaskLoadError, match="task 't' is not published: no layer q_proj"):
        asked.send([None, None])


def test_what_goes_wrong_on_the_way_leaves_no_memory() -> None:
    before = set(os.listdir("/proc/self/fd"))
    asked = steps()
    next(asked)
    with pytest.raises(RuntimeError, match="the engine died"):
        asked.throw(RuntimeError("the engine died"))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_who_is_cancelled_leaves_no_engine_core_half_told() -> None:
    asked: list[tuple[str, bytes]] = []

    class Client:
        core_engines = (b"0", b"1")

        async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> str:
            await asyncio.sleep(0.05)
            asked.append((method, engine))
            return ""

    async def cancel() -> None:
        engine = SimpleNamespace(engine_core=Client())
        caller = asyncio.create_task(publishing._answered_async(engine, steps()))
        while not asked:
            await asyncio.sleep(0.001)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.sleep(0.5)

    asyncio.run(cancel())
    wanted = [(method, core) for method in (OFFER_METHOD, ADOPT_METHOD) for core in (b"0", b"1")]
    assert sorted(asked) == sorted(wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": ""}, TaskIdError, "task id is empty"),
        ({"quantize": "int4"}, OptionError, "quantize='int4': use one of"),
        ({"alpha": None}, AdapterError, "give the adapter's alpha= or its config="),
        ({"config": {"r": 3, "lora_alpha": 3}}, AdapterError, "one of the two"),
        ({"alpha": float("inf")}, AdapterError, "alpha"),
        ({"alpha": "16"}, AdapterError, "alpha is '16'; give a number"),
        ({"tensors": {}}, AdapterError, "no LoRA tensors"),
        ({"tensors": {"m": 3}}, AdapterError, "'m' is int; give a tensor"),
    ],
)
def test_what_is_no_task_is_refused_before_anything_is_asked(
    options: dict[str, Any], error: type[VLoRAError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        next(steps(**options))
    assert "\n" not in str(caught.value)


def test_only_what_was_published_is_taken_away() -> None:
    asked = publishing._unpublishing(Engine(), "t")
    next(asked)
    with pytest.raises(TaskNotFoundError, match="no task was published as 't'"):
        asked.send(["", ""])


@pytest.mark.parametrize("call", [publishing.publish, publishing.unpublish])
def test_what_is_no_engine_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=r"Engine was given: .*AsyncLLM"):
        call(Engine(), "t", **({"tensors": factors()} if call is publishing.publish else {}))
