"""Tasks from memory on their way to a worker: what is written, mapped, copied and refused."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from vllm_vlora.adapters.state_dicts import read_state_dict
from vllm_vlora.blend_names import parse_blend
from vllm_vlora.checkpoint.reader import Checkpoint
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

from plugin_world import MODULES, build, make_path
from slow_images import hold_images
from vllm.lora.request import LoRARequest

from vllm_vlora.plugin import publishing
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path, task_path
from vllm_vlora.plugin.offers import ElsewhereError, Offer, OfferedCheckpoint, offered, read_whole
from vllm_vlora.plugin.published import ADOPT_METHOD, ELSEWHERE, OFFER_METHOD, WITHDRAW_METHOD
from vllm_vlora.plugin.requests import lora_request
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import Budget
from vllm_vlora.plugin.spare_memory import SpareMemory
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode

NAMES = ("layers.0.q_proj", "layers.0.down_proj")
SHAPES = {NAMES[0]: (24, 40), NAMES[1]: (40, 72)}


@pytest.fixture
def nothing_of_other_tests() -> None:
    """What tests before left in circles holds memory of offers, too, until it is looked for."""
    gc.collect()


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


def test_factors_are_copied_by_their_numbers_and_not_by_whatever_memory_they_have() -> None:
    given = factors()
    odd = dict(given)
    a, b = given[NAMES[0]]
    odd[NAMES[0]] = [torch.nn.Parameter(a.T.contiguous().T), torch._neg_view(-b)]
    with offered("t", read_state_dict(odd, None, 6.0, "here"), None) as offer:
        matrices = OfferedCheckpoint(offer).load_task("t").modules[NAMES[0]].matrices
    assert torch.equal(matrices["A"].parts["values"], a)
    assert torch.equal(matrices["B"].parts["values"], b.T)


def test_factors_whose_memory_was_freed_are_refused() -> None:
    """As a sharded model leaves its own between two steps."""
    given = modules()
    given[1][1][0].untyped_storage().resize_(0)
    with pytest.raises(AdapterError, match=r"lora_A of .*q_proj.* gather the parameters"):
        next(_steps_of(given, None))


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


def _store(late: int, host: int = 0, device: str = "cpu") -> ResidentStore:
    store = ResidentStore(
        torch.device(device), lambda name: name, lambda *_: None, budget=Budget(0, late, host)
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


@pytest.mark.parametrize("format", [None, "int8", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factors_lie_as_the_device_reads_them(device: str, format: str | None) -> None:
    """A slot on CPU is filled by columns of B; the kernels of a GPU read rows."""
    store = _store(late=1 << 20, host=1 << 20, device=device)
    with offered("t", modules(), format) as offer:
        checkpoint = OfferedCheckpoint(offer)
    store.take(checkpoint.task_path, checkpoint)
    assert store.place(checkpoint.task_path) == 0
    task = store.held(str(checkpoint.task_path))
    assert task is not None
    for side_a, side_b in task.sources.values():
        for matrix in (side_a.matrix, side_b.matrix):
            assert matrix.rows > 1
            values = next(iter(matrix.parts.values()))
            by_columns = device == "cpu" and matrix is side_b.matrix and format != "nf4"
            assert values.stride()[0 if by_columns else 1] == 1
            assert values.device.type == device


def _mappings() -> int:
    """How often this process maps the memory of a task."""
    return Path("/proc/self/maps").read_text().count("memfd:vllm-vlora-task")


@pytest.mark.parametrize("direct", [False, True])
def test_the_memory_is_mapped_as_long_as_the_task_is_there_and_is_not_the_devices(
    direct: bool, tmp_path: Path
) -> None:
    """On CPU what is copied to the device is what is mapped."""
    store = _direct_store(1 << 20, tmp_path / "ck") if direct else _store(1 << 20, host=1 << 20)
    given = {"o": [torch.ones(3, MODULES["o"][0]), torch.ones(MODULES["o"][1], 3)]}
    before = _mappings()
    with offered("t", read_state_dict(given, None, 6.0, "here"), "nf4") as offer:
        checkpoint = OfferedCheckpoint(offer)
    path = checkpoint.task_path
    store.take(path, checkpoint)
    assert store.place(path) == 0
    task = store.held(str(path))
    assert task is not None
    assert (task.direct is not None) == direct
    matrices = [side.matrix for pair in task.sources.values() for side in pair]
    for part in task.direct.slices.values() if task.direct else ():
        assert part.a is not None
        matrices.append(part.a)
    for matrix in checkpoint.load_task("t").modules["o"].matrices.values():
        for mapped in matrix.parts.values():
            mapped.zero_()
    assert matrices
    assert all(bool(unpack(matrix).all()) for matrix in matrices)
    assert _mappings() == before + 1
    store.discard(str(path))
    del checkpoint, task, matrices, matrix, mapped
    assert _mappings() == before


def test_of_two_publications_in_a_row_the_first_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is given up while a thread lays it out."""
    store, before = _store(late=4 << 20, host=1 << 20), _mappings()
    begun, go_on = hold_images(monkeypatch)
    for number in range(2):
        with offered("t", modules(), None) as offer:
            checkpoint = OfferedCheckpoint(offer)
        path = checkpoint.task_path
        store.take(path, checkpoint)
        if number == 0:
            assert begun.wait(30)
            reading = store._staging[str(path)]
            store.discard(str(path))
            go_on.set()
            reading.result(30)
            del reading, checkpoint
    assert store.place(path) == 0
    assert _mappings() == before + 1
    assert store.host_nbytes <= 1 << 20


def test_what_one_worker_would_write_no_other_reads() -> None:
    with offered("t", modules(), None) as offer:
        one, other = OfferedCheckpoint(offer), OfferedCheckpoint(offer)
    one.load_task("t").modules[NAMES[0]].matrices["A"].parts["values"].zero_()
    values = other.load_task("t").modules[NAMES[0]].matrices["A"].parts["values"]
    assert torch.equal(values, factors()[NAMES[0]][0])


def _direct_store(late: int, folder: Path) -> ResidentStore:
    store = ResidentStore(torch.device("cpu"), str, lambda *_: None, budget=Budget(0, late, 0))
    store.preload(build(folder, {"one": {"o": ("private", 7)}}).path, make_path)
    return store


@pytest.mark.parametrize("direct", [False, True])
def test_one_that_is_larger_than_all_room_is_refused_and_not_kept(
    direct: bool, tmp_path: Path
) -> None:
    store = _direct_store(2048, tmp_path / "ck") if direct else _store(late=2048)
    factors_of = {"o": [torch.ones(7, MODULES["o"][0]), torch.ones(MODULES["o"][1], 7)]}
    given = read_state_dict(factors_of, None, 6.0, "here") if direct else modules()
    with offered("t", given, None) as offer:
        checkpoint = OfferedCheckpoint(offer)
    with pytest.raises(MemoryBudgetError, match=r"no room for task 't': .*VLLM_VLORA_LATE_MIB"):
        store.take(checkpoint.task_path, checkpoint)
    with pytest.raises(CheckpointError, match="published again or unpublished"):
        store.place(checkpoint.task_path)


def test_one_that_is_published_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one for which is waited until it is laid out, as it is nearly as large as all room."""
    store, on_disk = _store(late=2048), build(tmp_path / "ck")
    mounted = threading.Event()
    load_task = Checkpoint.load_task

    def hang(*args: Any, **kwargs: Any) -> Any:
        assert mounted.wait(10)
        return load_task(*args, **kwargs)

    monkeypatch.setattr(Checkpoint, "load_task", hang)
    disk = [task_path(on_disk, task) for task in list(on_disk.tasks)[:2]]
    for path in disk:
        store.stage(path)
    with offered("t", modules(), None) as offer:
        checkpoint = OfferedCheckpoint(offer)
    with pytest.raises(MemoryBudgetError, match="no room for task 't'"):
        store.take(checkpoint.task_path, checkpoint)
    assert not any(store._staging[str(path)].done() for path in disk)
    mounted.set()


# --- blends of them --------------------------------------------------------------------------------


class Published:
    """A store over a checkpoint, or over none, with tasks from memory in it."""

    def __init__(self, folder: Path | None, layer: Callable[[str], str] = str) -> None:
        self.store = ResidentStore(
            torch.device("cpu"), layer, lambda *_: None, budget=Budget(0, 1 << 20, 1 << 20)
        )
        self.updates: dict[str, dict[str, torch.Tensor]] = {}
        self.paths: dict[str, TaskPath] = {}
        if folder is None:
            self.store.seal()
            return
        opened = self.store.preload(folder)
        bases = dict(opened.bases())
        for task in opened.tasks:
            self.updates[task] = {}
            self.paths[task] = task_path(opened, task)
            for name, module in opened.load_task(task).modules.items():
                a, b = decode(module, bases.get(name))
                self.updates[task][name] = b.double() @ a.double()

    def publish(self, task: str, given: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> TaskPath:
        """Give it factors by module, of alpha 6."""
        with offered(task, read_state_dict(given, None, 6.0, "here"), None) as offer:
            checkpoint = OfferedCheckpoint(offer)
        self.store.take(checkpoint.task_path, checkpoint)
        self.paths[task] = checkpoint.task_path
        self.updates[task] = {
            name: 6 / len(a) * (b.double() @ a.double()) for name, (a, b) in given.items()
        }
        return checkpoint.task_path

    def path(self, text: str) -> TaskPath:
        return blend_path(self.paths, parse_blend(text, self.paths))

    def check(self, text: str) -> None:
        """A blend's factors multiply to the sum of the updates in float64."""
        task = self.store.task(self.path(text))
        right: dict[str, torch.Tensor] = {}
        for name, weight in parse_blend(text, self.paths):
            for module, update in self.updates[name].items():
                right[module] = right.get(module, 0) + float(weight) * update
        assert task.sources.keys() == right.keys()
        for name, (a, b) in task.sources.items():
            found = b.to_dense().double().T @ a.to_dense().double()
            torch.testing.assert_close(found, right[name], rtol=1e-6, atol=1e-6)


def drawn(seed: int, *names: str, rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    sizes = {name: MODULES[name.rpartition(".")[2]][:2] for name in names}
    return {
        name: (
            torch.randn(rank, d_in, generator=random),
            torch.randn(d_out, rank, generator=random),
        )
        for name, (d_in, d_out) in sizes.items()
    }


@pytest.mark.parametrize("beside", [True, False])
def test_a_blend_of_tasks_from_memory_is_their_sum(tmp_path: Path, beside: bool) -> None:
    here = Published(build(tmp_path / "ck").path if beside else None)
    here.publish("mine", drawn(1, "q", "o", "lm_head"))
    here.publish("yours", drawn(2, "v", "o", rank=2))
    for text in ("mine*0.7+yours*0.3", "yours-mine*2", "mine*0.25"):
        here.check(text)
    if not beside:
        return
    # Modules that are cores, rows, neither, and one that the checkpoint's tasks do not have.
    for text in ("mine*0.7+joint*0.3", "private-yours*0.5", "mixed+mine*2-yours+one*0.1"):
        here.check(text)
    # A task from memory stands before the checkpoint's of its name.
    here.publish("joint", drawn(3, "merged", "q"))
    here.check("joint+private*0.5")
    here.check("joint*0.5+mine")


def test_names_of_one_layer_are_one_module_of_a_blend(tmp_path: Path) -> None:
    """As of models whose class was another where the adapter was trained."""

    def layer(name: str) -> str:
        return name.removeprefix("model.")

    here = Published(build(tmp_path / "ck").path, layer)
    given = drawn(1, "model.q", "model.merged")
    here.publish("mine", given)
    here.updates["mine"] = {layer(name): update for name, update in here.updates["mine"].items()}
    here.check("mine*0.7+private*0.3")
    here.publish("yours", drawn(2, "q", "v"))
    here.check("mine+yours")


def test_a_blend_is_of_the_version_that_was_published_when_it_was_asked_for() -> None:
    here = Published(None)
    first = here.publish("mine", drawn(1, "q"))
    here.publish("yours", drawn(2, "q"))
    old = here.path("mine*0.5+yours*0.5")
    here.check("mine*0.5+yours*0.5")
    held = here.store.held(str(old))
    here.publish("mine", drawn(3, "q"))
    # Both versions are there, as while requests of the first one run.
    here.check("mine*0.5+yours*0.5")
    assert here.path("mine*0.5+yours*0.5") != old
    assert here.store.held(str(old)) is held
    here.store.forget(str(old))
    assert str(old) in here.store._images.held
    here.store.discard(str(first))
    assert str(old) not in here.store._images.held
    with pytest.raises(CheckpointError, match="was published again or removed; make a new request"):
        here.store.place(old)
    here.check("mine*0.5+yours*0.5")


def test_tasks_whose_layers_have_other_sizes_have_no_blend() -> None:
    here = Published(None)
    here.publish("mine", {"q": (torch.ones(1, 80), torch.ones(256, 1))})
    here.publish("yours", {"q": (torch.ones(1, 81), torch.ones(256, 1))})
    with pytest.raises(
        BlendError, match="module q is 256 x 81 in one task and 256 x 80 in another"
    ):
        here.store.task(here.path("mine+yours"))


def test_a_request_for_a_blend_of_what_was_published(tmp_path: Path) -> None:
    here = Published(build(tmp_path / "ck").path)
    mine, yours = (
        LoRARequest(name, 2**20 + n, str(here.publish(name, drawn(n, "q", "o"))))
        for n, name in enumerate(("mine", "yours"))
    )
    for request, text in (
        (
            lora_request(tmp_path / "ck", "joint*0.30+mine*.7", published=[mine]),
            "joint*0.3+mine*0.7",
        ),
        (lora_request(None, "yours-mine", published=[mine, yours]), "yours-mine"),
    ):
        assert request.lora_name == text
        assert request.lora_path == str(here.path(text))
        assert request.lora_int_id not in (mine.lora_int_id, yours.lora_int_id)
    assert lora_request(None, "mine", published=[mine]) is mine
    with pytest.raises(BlendError, match="no task is called 'joint'"):
        lora_request(None, "joint", published=[mine])


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


@pytest.fixture(autouse=True)
def nothing_lies_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is open is an offer's."""
    monkeypatch.setattr(SpareMemory, "renew", lambda spare, memory: memory.unmap())


def offers_held() -> int:
    """Memories of offers that this process has open."""
    found = 0
    for file in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += "memfd:vllm-vlora-task" in os.readlink(f"/proc/self/fd/{file}")
    return found


@pytest.mark.usefixtures("nothing_of_other_tests")
def test_what_goes_wrong_on_the_way_leaves_no_memory() -> None:
    asked = steps()
    next(asked)
    # The file, and the one by which it is mapped.
    assert offers_held() == 2
    assert asked.throw(RuntimeError("the engine died"))[0] == WITHDRAW_METHOD
    # It will not do that either.
    with pytest.raises(RuntimeError, match="the engine died"):
        asked.throw(RuntimeError("it is dead"))
    assert offers_held() == 0


@pytest.mark.usefixtures("nothing_of_other_tests")
def test_without_memory_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(
        TaskLoadError, match=r"task 't' is not published: no \d+ bytes .*No space left on device"
    ):
        next(steps())
    assert offers_held() == 0


class Interrupted:
    """An engine in whose answer to one question Ctrl-C falls, after the engine core has heard it."""

    def __init__(self, at: str, process: bool, error: BaseException) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._at, self._error = at, error
        if process:
            self.engine_core: Any = SimpleNamespace(call_utility=self._ask)
        else:
            methods = {
                m: partial(self._ask, m) for m in (OFFER_METHOD, ADOPT_METHOD, WITHDRAW_METHOD)
            }
            self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(**methods))

    def _ask(self, method: str, *args: Any) -> str:
        self.asked.append((method, *args))
        if method == self._at and len([m for m, *_ in self.asked if m == method]) == 1:
            raise self._error
        return ""


@pytest.mark.usefixtures("nothing_of_other_tests")
@pytest.mark.parametrize("process", [False, True], ids=["here", "another process"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("it died")])
def test_who_is_interrupted_leaves_nothing_with_the_workers(
    process: bool, error: BaseException
) -> None:
    engine = Interrupted(OFFER_METHOD, process, error)
    with pytest.raises(type(error)) as caught:
        publishing._answered(engine, steps())
    assert caught.value is error
    (_, described), withdrawn = engine.asked
    assert withdrawn == (WITHDRAW_METHOD, msgspec.json.decode(described, type=Offer).path)
    assert offers_held() == 0


@pytest.mark.parametrize("process", [False, True], ids=["here", "another process"])
def test_who_is_interrupted_at_the_end_has_published(process: bool) -> None:
    engine = Interrupted(ADOPT_METHOD, process, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        publishing._answered(engine, steps())
    assert [method for method, *_ in engine.asked] == [OFFER_METHOD, ADOPT_METHOD, ADOPT_METHOD]
    assert engine.asked[1] == engine.asked[2]


class Client:
    """An ``AsyncLLM``'s way to two engine cores."""

    core_engines = (b"0", b"1")

    def __init__(self, answer: Callable[[str, bytes], str]) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self._answer = answer

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> str:
        await asyncio.sleep(0)
        self.asked.append((method, engine))
        return self._answer(method, engine)


def test_an_engine_core_that_fails_has_the_others_let_go() -> None:
    def answer(method: str, engine: bytes) -> str:
        if engine == b"0":
            raise RuntimeError("it died")
        return ""

    client = Client(answer)
    with pytest.raises(RuntimeError, match="it died"):
        asyncio.run(publishing._answered_async(SimpleNamespace(engine_core=client), steps()))
    assert sorted(client.asked) == [
        (method, core) for method in (OFFER_METHOD, WITHDRAW_METHOD) for core in (b"0", b"1")
    ]


@pytest.mark.usefixtures("nothing_of_other_tests")
@pytest.mark.parametrize("at", ["writing", "asking", "copying"])
def test_an_event_loop_that_ends_leaves_nothing(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C in ``asyncio.run``, which cancels whatever runs."""
    reached, go_on = threading.Event(), threading.Event()

    def hold(original: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any) -> Any:
            reached.set()
            assert go_on.wait(60)
            return original(*args)

        return held

    if at == "writing":
        monkeypatch.setattr(publishing, "read_state_dict", hold(read_state_dict))
    if at == "copying":
        monkeypatch.setattr(publishing, "read_whole", hold(read_whole))
    client = Client(lambda method, engine: ELSEWHERE if at == "copying" else "")
    asyncio_ask = client._call_utility_async

    async def ask(method: str, *args: Any, engine: bytes) -> str:
        if at == "asking" and method == OFFER_METHOD:
            client.asked.append((method, engine))
            reached.set()
            await asyncio.sleep(3600)
        return await asyncio_ask(method, *args, engine=engine)

    client._call_utility_async = ask  # type: ignore[method-assign]

    async def interrupted() -> None:
        engine = SimpleNamespace(engine_core=client)
        running = asyncio.ensure_future(publishing._answered_async(engine, steps()))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        assert not running.done()
        # Once the event loop has cancelled what runs.
        threading.Timer(0.1, go_on.set).start()

    asyncio.run(interrupted())
    methods = {method for method, _ in client.asked}
    assert ADOPT_METHOD not in methods
    assert WITHDRAW_METHOD in methods
    assert offers_held() == 0


def test_the_event_loop_goes_on_while_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    ticked = threading.Event()

    def copy(offer: Offer) -> bytes:
        # In the event loop's thread this would wait in vain.
        ticked.clear()
        assert ticked.wait(60)
        return read_whole(offer)

    monkeypatch.setattr(publishing, "read_whole", copy)
    client = Client(lambda method, _: "")
    answers = iter([ELSEWHERE, "", "", "", "", ""])
    client._answer = lambda method, _: next(answers)

    async def publish() -> LoRARequest:
        async def tick() -> None:
            while True:
                ticked.set()
                await asyncio.sleep(0.001)

        ticking = asyncio.ensure_future(tick())
        try:
            return await publishing._answered_async(SimpleNamespace(engine_core=client), steps())
        finally:
            ticking.cancel()

    assert asyncio.run(publish()).lora_name == "t"


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


def test_what_streams_have_yet_to_write_is_waited_for_before_threads_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread's stream is the caller's; each device once, and the CPU's tensors not at all."""

    class There(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    waited: list[str] = []
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(synchronize=lambda: waited.append(str(device))),
    )
    here, there = torch.ones(2), torch.ones(2).as_subclass(There)
    publishing._settle({"a": here, "b": (there, here), "c": [there], "d": 3})
    assert waited == ["cuda:1"]
    publishing._settle({"a": (here, here)})
    publishing._settle(None)  # type: ignore[arg-type]
    assert waited == ["cuda:1"]


def test_only_what_was_published_is_taken_away() -> None:
    asked = publishing._unpublishing(Engine(), "t")
    next(asked)
    with pytest.raises(TaskNotFoundError, match="no task was published as 't'"):
        asked.send(["", ""])


@pytest.mark.parametrize("call", [publishing.publish, publishing.unpublish])
def test_what_is_no_engine_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=r"Engine was given: .*AsyncLLM"):
        call(Engine(), "t", **({"tensors": factors()} if call is publishing.publish else {}))
