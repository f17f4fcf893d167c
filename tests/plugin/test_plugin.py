"""The plugin's parts that need no engine: identity, version guard, seams, slot layouts."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_vlora.blend_names import task_alone
from vllm_vlora.checkpoint.aliases import Aliases, Route, encode_aliases
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError, SettingError, TaskLoadError
from vllm_vlora.plugin.identity import parse_task_path, task_ids_to_int, task_path, task_paths
from vllm_vlora.plugin.layouts import Run, SliceLayout, index_runs
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import pack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import Basis


def _checkpoint(folder: Path, seed: int = 0, tasks: int = 3) -> Checkpoint:
    """A joint module ``up`` (96 x 64) and a private module ``down`` (64 x 96)."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(folder, None)
    u = torch.linalg.qr(torch.randn(96, 12, generator=generator))[0].T.contiguous()
    v = torch.linalg.qr(torch.randn(64, 12, generator=generator))[0].T.contiguous()
    writer.add_module("up", 64, 96, basis=Basis(pack(u, "float32"), pack(v, "float32")))
    writer.add_module("down", 96, 64)
    for number in range(tasks):
        a, b = torch.randn(4, 64, generator=generator), torch.randn(96, 4, generator=generator)
        modules = {"up": encode_joint(a, b, 2.0, u, v, "float32")}
        if number != 1:  # one task leaves a module out
            modules["down"] = encode_private(b.T.contiguous(), a.T.contiguous(), 0.5, "nf4")
        writer.add_task(f"task/{number}", modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return Checkpoint.open(folder)


def test_a_path_names_its_checkpoint_its_file_and_its_content(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "with @ and spaces")
    path = task_path(checkpoint, "task/1")
    assert parse_task_path(str(path)) == path
    assert path.checkpoint == checkpoint.path
    assert (path.checkpoint / path.file).is_file()
    assert path.digest == checkpoint.digest("task/1")


@pytest.mark.parametrize(
    "path",
    ["/adapters/sql", "org/name", "org/name@main", "/a/tasks/x.safetensors", "", "@" + "0" * 32,
     "/a/tasks/x.safetensors@" + "g" * 32, "/a/x.safetensors@" + "0" * 32],
)  # fmt: skip
def test_other_paths_are_left_to_vllm(path: str) -> None:
    assert parse_task_path(path) is None


def test_ids_are_distinct_stable_and_fit_int32(tmp_path: Path) -> None:
    first = task_ids_to_int(task_paths(_checkpoint(tmp_path / "a")))
    again = task_ids_to_int(task_paths(_checkpoint(tmp_path / "b")))
    other = task_ids_to_int(task_paths(_checkpoint(tmp_path / "c", seed=1)))
    assert first == again
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == 3
    assert all(1 << 20 <= number < 1 << 31 for number in first.values())


def test_ids_of_equal_weights_are_distinct(tmp_path: Path) -> None:
    folder = tmp_path / "twins"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module("m", 8, 8)
    stored = encode_private(torch.ones(1, 8), torch.ones(8, 1), 1.0, "float32")
    for name in ("one", "two"):
        writer.add_task(name, {"m": stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    assert len(set(task_ids_to_int(task_paths(Checkpoint.open(folder))).values())) == 2


def test_index_runs_cover_what_a_rank_holds() -> None:
    assert index_runs(torch.arange(5)) == (Run(0, 0, 5),)
    merged = torch.cat([torch.arange(4, 8), torch.arange(12, 16)])
    assert index_runs(merged) == (Run(4, 0, 4), Run(12, 4, 4))


@pytest.mark.parametrize("rank_of_two", [None, 0, 1])
def test_the_writer_fills_slots_with_what_the_task_decodes_to(
    tmp_path: Path, rank_of_two: int | None
) -> None:
    """Slots of a merged column-parallel ``up`` (two halves a rank) and a row-parallel ``down``."""
    checkpoint = _checkpoint(tmp_path / "ck")
    if rank_of_two is None:
        rows_up, columns_down = torch.arange(96), torch.arange(96)
    else:
        start = 24 * rank_of_two
        rows_up = torch.cat([torch.arange(start, start + 24), torch.arange(48 + start, 72 + start)])
        columns_down = torch.arange(48 * rank_of_two, 48 * (rank_of_two + 1))
    slots, rank = 2, 8
    up_a = torch.full((slots, 1, rank, 64), torch.nan)
    up_b = torch.full((slots, 1, len(rows_up), rank), torch.nan)
    down_a = torch.full((slots, 1, rank, len(columns_down)), torch.nan)
    down_b = torch.full((slots, 1, 64, rank), torch.nan)
    writer = SlotWriter(
        [
            SliceLayout("up", lambda s: up_a[s, 0], lambda s: up_b[s, 0].T, 64, 96,
                        index_runs(torch.arange(64)), index_runs(rows_up)),
            SliceLayout("down", lambda s: down_a[s, 0], lambda s: down_b[s, 0].T, 96, 64,
                        index_runs(columns_down), index_runs(torch.arange(64))),
        ],
        rank,
    )  # fmt: skip
    store = ResidentStore(
        torch.device("cpu"), str, lambda ck, ids, direct: writer.check(ck, ids, engine_name=str)
    )
    store.preload(checkpoint.path)
    bases = dict(checkpoint.bases())
    for task_id in ("task/0", "task/1"):
        writer.write(1, store.task(task_path(checkpoint, task_id)))
        stored = checkpoint.load_task(task_id).modules
        a, b = decode(stored["up"], bases["up"])
        torch.testing.assert_close(up_a[1, 0, :4], a)
        torch.testing.assert_close(up_b[1, 0, :, :4], b[rows_up])
        assert not up_a[1, 0, 4:].any()
        assert not up_b[1, 0, :, 4:].any()
        if "down" in stored:
            a, b = decode(stored["down"], None)
            torch.testing.assert_close(down_a[1, 0, :4], a[:, columns_down])
            torch.testing.assert_close(down_b[1, 0, :, :4], b)
        else:
            assert not down_a[1].any()
            assert not down_b[1].any()
    assert up_a[0].isnan().all(), "another slot was touched"


def _unchecked(checkpoint: Checkpoint, task_ids: Iterable[str], direct: bool) -> None:
    """Any model takes it."""


def test_resident_bytes_count_packed_storage_once(tmp_path: Path) -> None:
    store = ResidentStore(torch.device("cpu"), str, _unchecked)
    store.preload(_checkpoint(tmp_path / "ck").path)
    basis = (96 + 64) * 12 * 4
    cores = 3 * 4 * (12 + 12) * 4
    # Two tasks of rank 4: rows of 64 (one block) and rows of 96 (two blocks), codes and scales.
    nf4 = 2 * 4 * ((32 + 4) + (64 + 8))
    assert basis + cores + nf4 <= store.nbytes <= 1.1 * (basis + cores + nf4)


def test_what_was_loaded_stays_when_its_checkpoint_is_published_again(tmp_path: Path) -> None:
    """A path that was once good never fails later, inside a step, where it would end the engine."""
    folder = tmp_path / "ck"
    old = _checkpoint(folder)
    store = ResidentStore(torch.device("cpu"), str, _unchecked)
    store.preload(folder)
    paths = [task_path(old, task_id) for task_id in old.tasks]
    held = [store.task(path) for path in paths]
    new = _checkpoint(folder, seed=1)
    fresh = store.task(task_path(new, "task/0"))
    assert fresh is not held[0]
    assert len(store) == len(held) + 1, "only the task that was asked for is loaded"
    shutil.rmtree(folder)
    assert [store.task(path) for path in paths] == held
    assert store.task(task_path(new, "task/0")) is fresh


def test_a_path_whose_weights_are_gone_is_an_error(tmp_path: Path) -> None:
    old = _checkpoint(tmp_path / "ck")
    path = task_path(old, "task/0")
    _checkpoint(tmp_path / "ck", seed=1)
    with pytest.raises(CheckpointError, match="published again"):
        ResidentStore(torch.device("cpu"), str, _unchecked).task(path)


SEAMS = tuple(
    f"vllm_vlora.plugin.{name}"
    for name in ("seams", "manager", "layers", "experts", "layer_calls", "scheduling")
)


def _gone(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A change that removes ``module:attribute`` from vLLM."""
    module, attribute = name.split(":")

    def change(patch: pytest.MonkeyPatch) -> None:
        owner: Any = importlib.import_module(module)
        *path, last = attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        patch.delattr(owner, last)

    return change


def _other_arguments(patch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    patch.setattr(WorkerLoRAManager, "_load_adapter", lambda self, request, more: None)


def _version(number: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr("vllm_vlora.plugin._vllm_version", lambda: number)


@pytest.fixture
def patchable(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[], dict], list[str]]]:
    """What the plugin patches, restored afterwards, and the lines it logs."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    owners = [WorkerLoRAManager, LRUCacheWorkerLoRAManager, OpenAIServingModels, LLMEngine,
              AsyncLLM, LoRARequest, kv_cache_utils, EngineCore, Scheduler, Executor,
              LoRAModelRunnerMixin]  # fmt: skip

    def state() -> dict:
        return {(o.__name__, name): value for o in owners for name, value in vars(o).items()}

    before = [dict(vars(owner)) for owner in owners]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.plugins.vlora")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    monkeypatch.delenv("VLLM_VLORA_CHECKPOINT", raising=False)
    for module in SEAMS:
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(module, raising=False)
    yield state, lines
    logger.removeHandler(handler)
    logger.setLevel(level)
    # What stands in other places than those that are looked at below.
    seams = sys.modules.get("vllm_vlora.plugin.seams")
    if seams is not None:
        seams.uninstall()
    for owner, names in zip(owners, before):
        for name, value in list(vars(owner).items()):
            if name not in names:
                delattr(owner, name)
            elif value is not names[name]:
                setattr(owner, name, names[name])


def test_a_known_vllm_is_patched_once(
    patchable: tuple[Callable[[], dict], list[str]],
) -> None:
    from vllm_vlora.plugin import register

    state, lines = patchable
    before = state()
    register()
    once = state()
    register()
    assert once != before
    assert state() == once
    assert all("installed in process" in line for line in lines)
    from vllm import envs

    assert "VLLM_VLORA_CHECKPOINT" in envs.environment_variables  # of which it warns otherwise


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_version("0.27.1"), "vLLM 0.27.1 is not between"),
        (_version("0.34.0"), "VLLM_VLORA_ALLOW_UNTESTED"),
        (_other_arguments, "_load_adapter takes"),
        (_gone("vllm.lora.model_manager:LoRAModelManager._create_lora_modules"), "does not exist"),
        (_gone("vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys"), "does not exist"),
        (_gone("vllm.lora.utils:parse_fine_tuned_lora_name"), "is gone"),
    ],
)
def test_an_unknown_vllm_is_left_as_it_is(
    patchable: tuple[Callable[[], dict], list[str]],
    change: Callable[[pytest.MonkeyPatch], None],
    line: str,
) -> None:
    from vllm_vlora.plugin import register

    state, lines = patchable
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        before = state()
        register()
        assert state() == before
    assert len(lines) == 1
    assert lines[0].startswith("vllm-vlora: not installed, vLLM runs without it")
    assert line in lines[0]


def test_a_checkpoint_that_does_not_exist_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm_vlora.plugin import register

    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere"):
        register()


def test_the_processes_that_are_started_read_the_commit_that_the_first_one_found(
    patchable: tuple[Callable[[], dict], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from vllm_vlora.plugin import register

    commit, moved = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--name"
    folder = _checkpoint(repository / "snapshots" / commit / "inner").path
    branch = {"main": commit, None: commit}

    def download(repo: str, *, revision: str | None, **_: object) -> str:
        assert repo == "org/name"
        return str(repository / "snapshots" / branch.get(revision, str(revision)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    digest = Checkpoint.open(folder).content_digest
    for ref in ("org/name/inner", "org/name/inner@main"):
        for pin in ("", f"@sha256:{digest}"):
            monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", ref + pin)
            register()
            fixed = f"org/name/inner@{commit}{pin}"
            assert os.environ["VLLM_VLORA_CHECKPOINT"] == fixed
            branch |= {"main": moved, None: moved}
            register()
            assert os.environ["VLLM_VLORA_CHECKPOINT"] == fixed
            branch |= {"main": commit, None: commit}
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", f"{folder}@sha256:{'0' * 64}")
    with pytest.raises(CheckpointError, match="its content is"):
        register()
    # The Hub's cache has a folder whose main branch moves as well.
    _checkpoint(tmp_path / "models--org--other" / "snapshots" / commit)
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", str(tmp_path / "models--org--other"))
    register()
    assert os.environ["VLLM_VLORA_CHECKPOINT"].endswith(f"/models--org--other/snapshots/{commit}")


class _Client:
    """What an API server asks engine cores through, and what each of them answers."""

    def __init__(self, *answers: list[tuple[str, str]]) -> None:
        self.answers = answers
        self.core_engines = range(len(answers))
        self.aliases: Aliases = {}

    async def _call_utility_async(self, method: str, *, engine: int) -> Any:
        from vllm_vlora.plugin.engine_core import ALIASES_METHOD, TASKS_METHOD

        if method == ALIASES_METHOD:
            return encode_aliases(self.aliases).decode()
        assert method == TASKS_METHOD
        return [list(pair) for pair in self.answers[engine]]  # As it comes over the wire.


def _init(
    client: _Client,
    lora_config: object = True,
    templates: Any = None,
    weights: Iterable[str] = (),
) -> Any:
    """The start of an API server that serves ``base``; what it lists then."""
    from vllm_vlora.plugin.seams import _init_static_loras

    class Models:
        """The part of OpenAIServingModels that the seam reads."""

        def __init__(self) -> None:
            config = SimpleNamespace(lora_config=lora_config)
            self.engine_client = SimpleNamespace(vllm_config=config, engine_core=client)
            self.base_model_paths = [SimpleNamespace(name="base"), SimpleNamespace(name="other")]
            self.lora_requests: dict[str, Any] = {}

        def is_base_model(self, model: str) -> bool:
            return model in ("base", "other")

        async def init_static_loras(self) -> None:
            """One of --lora-modules."""
            from vllm.lora.request import LoRARequest

            self.lora_requests["ordinary"] = LoRARequest("ordinary", 1, "/adapters/ordinary")

    models = Models()
    init = _init_static_loras(Models.init_static_loras, templates, False, weights=weights)
    asyncio.run(init(models))
    return models


def _path(name: str, digit: str = "0") -> str:
    return f"/c/tasks/{name}.safetensors@{digit * 32}"


def test_the_api_server_says_at_start_up_that_lora_is_off() -> None:
    with pytest.raises(CheckpointError, match="--enable-lora"):
        _init(_Client([("sql", _path("sql"))]), None)


def test_the_api_server_lists_what_every_engine_core_holds() -> None:
    tasks = [("b", _path("b")), ("a", _path("a", "1"))]
    seen: list[Any] = []
    templates = SimpleNamespace(read=seen.append, use=lambda read, requests: None)
    models = _init(_Client(tasks, tasks), templates=templates)
    listed = {name: request.lora_path for name, request in models.lora_requests.items()}
    assert listed == {"ordinary": "/adapters/ordinary", **dict(tasks)}
    assert {task: str(path) for task, path in seen[0].items()} == dict(tasks)
    with pytest.raises(CheckpointError, match="published again while the engine started"):
        _init(_Client(tasks, [("b", _path("b")), ("a", _path("a", "2"))]))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([], None),
        (["sql", "french", "french+sql", "ordinary", "base"], None),
        (["sql", "sqll"], "has a share for 'sqll', and no"),
        # The scheduler knows the base model by the first of its names, and a blend in its one form.
        (["other", "sql+french", "prod"], "has a share for 'other', 'sql+french', 'prod', and no"),
    ],
)
def test_a_share_for_a_name_that_no_request_has_is_said_once(
    caplog: pytest.LogCaptureFixture, named: list[str], said: str | None
) -> None:
    client = _Client([("sql", _path("sql")), ("french", _path("french", "1"))])
    client.aliases = {"prod": (Route(1, task_alone("sql")),)}
    _init(client, weights=named)
    assert len(caplog.messages) == (said is not None)
    assert said is None or f"VLLM_VLORA_WEIGHTS {said}" in caplog.messages[0]


def test_a_step_finds_its_tasks_without_taking_their_paths_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's second model runner compares each of a step's requests with another of its task, twice."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu.lora_utils import LoraState

    from vllm_vlora.plugin import seams

    taken_apart: list[str] = []
    parse = seams.parse_task_path
    monkeypatch.setattr(
        seams, "parse_task_path", lambda path: taken_apart.append(path) or parse(path)
    )
    monkeypatch.setattr(LoRARequest, "__eq__", seams._equal_requests(LoRARequest.__eq__))
    state, ids = LoraState(64), [str(number) for number in range(64)]
    for number, name in enumerate(ids):
        task = "ab"[number % 2]
        state.add_request(name, number, LoRARequest(task, 1, _path(task, "1")))
    found = state.get_activate_loras(ids)
    assert sorted(request.lora_name for request in found) == ["a", "b"]
    assert taken_apart == []
    # Of two states of a task a step has both.
    state.add_request("64", 0, LoRARequest("a", 2, _path("a", "2")))
    assert len(state.get_activate_loras([*ids, "64"])) == 3


def _start_rust(tasks: list[str], *, templates: bool = False, **options: Any) -> Any:
    """The options that vLLM's start of its Rust frontend gets with a checkpoint of these tasks."""
    from vllm.lora.request import LoRARequest

    from vllm_vlora.plugin.seams import _rust_frontend

    def start(self: Any, binary_path: str, sock: Any, args: Any) -> None:
        self.args = args

    served = {
        "model": "m",
        "served_model_name": ["base"],
        "enable_lora": True,
        "lora_modules": None,
    }
    given = Namespace(**served | options)
    before = dict(vars(given))
    requests = [LoRARequest(name, 1, f"/c/tasks/{name}.safetensors@{'0' * 32}") for name in tasks]
    manager = SimpleNamespace()
    _rust_frontend(start, lambda: requests, templates)(manager, "vllm-rs", None, args=given)
    assert vars(given) == before, "others read them too"
    return manager.args


def test_the_rust_frontend_is_given_every_task_beside_other_adapters() -> None:
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    other = LoRAModulePath("other", "/peft")
    args = _start_rust(["a", "b ü"], lora_modules=[other], port=1)
    assert args.port == 1
    assert [(m.name, m.path) for m in args.lora_modules] == [
        ("other", "/peft"),
        ("a", "/c/tasks/a.safetensors@" + "0" * 32),
        ("b ü", "/c/tasks/b ü.safetensors@" + "0" * 32),
    ]


def test_the_rust_frontend_is_given_no_task_whose_name_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    other = LoRAModulePath("other", "/peft")
    args = _start_rust(
        ["base", "Base", "second", "other"],
        served_model_name=["base", "second"],
        lora_modules=[other],
    )
    assert [(m.name, m.path) for m in args.lora_modules] == [
        ("other", "/peft"),
        ("Base", _path("Base")),
    ]
    assert [m.name for m in _start_rust(["m", "a"], served_model_name=None).lora_modules] == ["a"]
    said = [line.split(" is not served: ")[0] for line in caplog.messages]
    assert said == [f"vllm-vlora: task {name!r}" for name in ("base", "second", "other", "m")]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["a"], {"enable_lora": False}, "--enable-lora"),
        ([f"task-{i}" for i in range(2000)], {}, "2000 tasks and adapters are more than"),
    ],
)
def test_the_rust_frontend_is_not_started_with_what_it_cannot_serve(
    tasks: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        _start_rust(tasks, **options)
    with pytest.raises(SettingError, match="renders chats itself"):
        _start_rust(["a"], templates=True)


class _Engine:
    """Counts what an engine is asked to do; ``add_lora`` refuses a path that ends in zeros."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def load(self, request: Any) -> bool:
        self.calls.append("load")
        if request.lora_path.endswith("0"):
            raise CheckpointError("damaged")
        return True

    def take(self) -> str:
        self.calls.append("take")
        return "taken"


class _SyncEngine(_Engine):
    engine_core = None  # Not in this process.

    def add_lora(self, request: Any) -> bool:
        return self.load(request)

    def add_request(self, request_id: str, lora_request: Any = None) -> str:
        return self.take()


def test_a_task_is_loaded_before_its_first_request_is_queued() -> None:
    """A load inside the step that fails ends the engine; before it, it is an error of the caller."""
    from vllm.lora.request import LoRARequest

    from vllm_vlora.plugin import seams

    add_request = seams._add_request(_SyncEngine.add_request)
    engine = _SyncEngine()

    def ask(request: Any) -> Any:
        return add_request(engine, "id", lora_request=request)

    good, bad = (f"/ck/tasks/x.safetensors@{digit * 32}" for digit in "10")
    for _ in range(2):
        assert ask(LoRARequest("task", 5, good)) == "taken"
    assert engine.calls == ["load", "take", "take"]
    with pytest.raises(CheckpointError, match="damaged"):
        ask(LoRARequest("task", 6, bad))
    assert engine.calls[3:] == ["load"], "a request whose task cannot be loaded is not queued"
    assert ask(LoRARequest("ordinary", 7, "/adapters/ordinary")) == ask(None) == "taken"
    assert engine.calls[4:] == ["take", "take"]


def test_a_load_that_failed_in_another_process_is_the_callers_error() -> None:
    """vLLM's client raises a bare Exception of the text."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.exceptions import EngineDeadError

    from vllm_vlora.plugin import seams

    class Engine(_SyncEngine):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def add_lora(self, request: Any) -> bool:
            raise self.error

    add_request = seams._add_request(_SyncEngine.add_request)
    request = LoRARequest("task", 5, f"/ck/tasks/x.safetensors@{'1' * 32}")
    for error, expected in (
        (Exception("no room"), ValueError),
        (EngineDeadError(), EngineDeadError),
    ):
        with pytest.raises(expected) as caught:
            add_request(Engine(error), "id", lora_request=request)
        if expected is ValueError:
            assert isinstance(caught.value, TaskLoadError)
            assert str(caught.value) == "task 'task': no room"


def test_stock_code_is_shown_the_layers_that_the_writer_does_not_fill() -> None:
    """Else what an ordinary adapter left in a slot's experts would answer for our task."""
    from vllm.lora.layers import BaseLayerWithLoRA, FusedMoE3DWithLoRA, FusedMoEWithLoRA

    from vllm_vlora.plugin.manager import _layers_left_to_stock

    def bare(kind: type) -> Any:
        return kind.__new__(kind)

    class Head(BaseLayerWithLoRA):
        def set_module_to_save(self) -> None:
            """As a classification head has it."""

    class Linear(BaseLayerWithLoRA):
        """Filled by the writer."""

    experts = bare(FusedMoEWithLoRA)
    layers = {"experts": experts, "fused": bare(FusedMoE3DWithLoRA), "score": Head(), "q": Linear()}
    assert set(_layers_left_to_stock(layers, [])) == {"experts", "fused", "score"}
    assert set(_layers_left_to_stock(layers, [experts])) == {"fused", "score"}
