"""Which CUDA graph a batch gets, by vLLM's own dispatchers, and what was captured into it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plugin_world import build, make_path

from vllm_vlora.plugin.identity import task_path

MAX_LORAS = 4
SIZES = [1, 2, 4, 8]
# What requests are for -> (ordinary adapters, direct tasks) that the batch needs launched.
BATCHES = {
    (): (False, False),
    ("joint",): (False, True),
    ("joint", "private", "mixed", "one"): (False, True),
    ("ordinary",): (True, False),
    ("head",): (True, False),
    ("joint", "ordinary"): (True, True),
    ("never loaded",): (True, False),
}
# A graph for slots launches the direct kernels as well: there is none for slots alone.
GRAPHS = {(False, False): (False, False), (False, True): (False, True)}


@pytest.fixture(scope="module")
def cases() -> Any:
    return importlib.import_module("vllm_vlora.plugin.graph_cases")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from plugin_world import STORED, Store
    from vllm.lora.model_manager import LoRAModelManager

    from vllm_vlora.plugin.direct_slots import DirectSlots
    from vllm_vlora.plugin.manager import TaskLoRAManager

    store = Store().store
    checkpoint = store.preload(
        build(tmp_path / "ck", STORED).path, lambda opened: make_path(opened, slots=MAX_LORAS)
    )
    manager = object.__new__(TaskLoRAManager)
    manager.vlora_store, manager.checkpoint = store, checkpoint
    manager._direct_models, manager._direct_slots = {}, DirectSlots(store.direct)
    manager._routed_version = manager._ready_version = -1
    manager._ready = set()
    manager._warm_up, manager.direct_apart = None, False
    manager._last_mapping = manager._last_slot_layout = None
    manager.lora_index_to_id = [None] * 2
    manager.punica = []
    monkeypatch.setattr(
        LoRAModelManager, "_set_adapter_mapping", lambda self, mapping: self.punica.append(mapping)
    )
    return manager


def requests(manager: Any, names: tuple[str, ...]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    paths = {task: str(task_path(manager.checkpoint, task)) for task in manager.checkpoint.tasks}
    some = next(iter(paths.values()))
    paths["never loaded"] = some[:-1] + ("0" if some[-1] != "0" else "1")
    return [LoRARequest(n, i, paths.get(n, "/peft")) for i, n in enumerate(names, 1)]


def vllm_config(cudagraph_mode: Any, specialize: bool) -> Any:
    """The parts of vLLM's configuration that its dispatchers read."""
    from vllm.config import CompilationMode

    return SimpleNamespace(
        num_speculative_tokens=0,
        speculative_config=None,
        lora_config=SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
        observability_config=SimpleNamespace(cudagraph_metrics=False),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        compilation_config=SimpleNamespace(
            mode=CompilationMode.VLLM_COMPILE,
            cudagraph_mode=cudagraph_mode,
            is_attention_compiled_piecewise=lambda: True,
            splitting_ops=[],
            cudagraph_specialize_lora=specialize,
            cudagraph_capture_sizes=SIZES,
            max_cudagraph_capture_size=SIZES[-1],
            compile_sizes=[],
            pass_config=SimpleNamespace(enable_sp=False),
        ),
    )


# A runner is (keys of its graphs with their number of active adapters, key of a batch's graph).
Runner = tuple[dict[Any, int], Callable[[list[Any], int], Any]]


def runner_v1(cases: Any, manager: Any, config: Any, mode: Any) -> Runner:
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = object.__new__(GPUModelRunner)
    runner.vllm_config, runner.lora_config = config, config.lora_config
    runner.compilation_config, runner.parallel_config = (
        config.compilation_config,
        config.parallel_config,
    )
    runner.model_config = SimpleNamespace(is_encoder_decoder=False)
    runner.uniform_decode_query_len = 1
    runner.cudagraph_dispatcher = CudagraphDispatcher(config)
    runner.input_batch = SimpleNamespace(lora_id_to_lora_request={})
    manager.direct_apart = cases.capture_direct_apart(runner, manager)
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(mode)
    graphs = {
        (graph_mode, key): key.num_active_loras
        for graph_mode, keys in runner.cudagraph_dispatcher.get_capture_descs()
        for key in keys
    }

    def key_of(batch: list[Any], tokens: int) -> Any:
        runner.input_batch.lora_id_to_lora_request = {r.lora_int_id: r for r in batch}
        graph_mode, key, *_ = runner._determine_batch_execution_and_padding(
            num_tokens=tokens,
            num_reqs=tokens,
            num_scheduled_tokens_np=np.ones(tokens, dtype=np.int32),
            max_num_scheduled_tokens=1,
            use_cascade_attn=False,
        )
        return graph_mode, key

    # A dummy run asks for the graph that it says, whatever the batch before it left behind.
    for (graph_mode, key), count in graphs.items():
        asked, found, *_ = runner._determine_batch_execution_and_padding(
            num_tokens=key.num_tokens,
            num_reqs=key.num_tokens,
            num_scheduled_tokens_np=np.ones(key.num_tokens, dtype=np.int32),
            max_num_scheduled_tokens=1,
            use_cascade_attn=False,
            force_uniform_decode=key.uniform,
            force_has_lora=count > 0,
            force_num_active_loras=count,
        )
        assert (asked, found.num_active_loras) == (graph_mode, count) or key.num_reqs is None
    return graphs, key_of


def runner_v2(cases: Any, manager: Any, config: Any, mode: Any) -> Runner:
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner
    from vllm.v1.worker.gpu.lora_utils import LoraState, get_lora_capture_cases

    runner = SimpleNamespace(
        compilation_config=config.compilation_config,
        lora_config=config.lora_config,
        lora_state=LoraState(8),
        lora_capture_cases=get_lora_capture_cases(config.lora_config, config.compilation_config),
    )
    manager.direct_apart = cases.capture_direct_apart(runner, manager)
    graphs = object.__new__(cudagraph_utils.CudaGraphManager)
    vars(graphs).update(
        vllm_config=config, compilation_config=config.compilation_config, max_num_reqs=8,
        cudagraph_mode=mode, decode_query_len=1, varlen_decode=False, ubatch_runner=None,
        lora_capture_cases=runner.lora_capture_cases, _candidates={}, _capture_descs={},
        _graphs_captured=True,
    )  # fmt: skip
    graphs._lora_dispatch_map, graphs._max_lora_case = graphs._build_lora_dispatch_map()
    graphs._init_candidates()
    keys = {key: key.num_active_loras for keys in graphs._capture_descs.values() for key in keys}

    def key_of(batch: list[Any], tokens: int) -> Any:
        runner.lora_state.lora_requests = {r.lora_name: r for r in batch}
        names = [request.lora_name for request in batch]
        count = model_runner.get_num_active_loras_for_dispatch(
            config.lora_config, runner.lora_state, names, False
        )
        return graphs.dispatch(tokens, tokens, 1, count)

    def of_dummies() -> int:
        return model_runner.get_num_active_loras_for_dispatch(
            config.lora_config, runner.lora_state, [], True
        )

    assert of_dummies() == MAX_LORAS + 1
    with importlib.import_module("vllm_vlora.plugin.idle_steps")._idle(runner):
        assert of_dummies() == (0 if manager.direct_apart else MAX_LORAS + 1)
    assert of_dummies() == MAX_LORAS + 1
    return keys, key_of


def captured(cases: Any, manager: Any, count: int, max_loras: int = MAX_LORAS) -> tuple[bool, bool]:
    """What vLLM's warm-up batch of this many adapters captures, in a layer with direct tasks."""
    select = cases._maybe_select_dummy_loras(_mixin().maybe_select_dummy_loras)
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    runner._set_active_loras = lambda prompts, tokens, found, kind: manager.set_adapter_mapping(
        _mapping(tokens, prompts, kind)
    )
    config = SimpleNamespace(max_loras=max_loras)
    with select(runner, config, np.ones(4, dtype=np.int32), num_active_loras=count):
        pass
    # The second runner captures when the warm-up batch was set up, the first one within.
    return tuple(manager.in_graph)


def _mixin() -> Any:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    return LoRAModelRunnerMixin


def _mapping(tokens: tuple[int, ...], prompts: tuple[int, ...], kind: Any = None) -> Any:
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    return LoRAMapping(tokens, prompts, is_prefill=True, type=kind or LoRAMappingType.LANGUAGE)


@pytest.fixture(params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> Iterator[Callable[..., Runner]]:
    if request.param == "v1":
        yield runner_v1
        return
    module = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    original = module.get_num_active_loras_for_dispatch
    yield runner_v2
    module.get_num_active_loras_for_dispatch = original


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_a_batch_gets_a_graph_that_launches_what_it_needs_and_no_more(
    cases: Any, manager: Any, runner: Callable[..., Runner], mode: str
) -> None:
    from vllm.config import CUDAGraphMode

    mode = CUDAGraphMode[mode]
    graphs, key_of = runner(cases, manager, vllm_config(mode, specialize=True), mode)
    holds = {key: captured(cases, manager, count) for key, count in graphs.items()}
    assert set(graphs.values()) == {0, 1, MAX_LORAS + 1}
    for tokens in range(1, SIZES[-1] + 1):
        for names, needed in BATCHES.items():
            launched = holds[key_of(requests(manager, names), tokens)]
            assert launched == GRAPHS.get(needed, (True, True)), (tokens, names)


def test_without_graphs_for_the_base_model_there_is_one_for_everything(
    cases: Any, manager: Any, runner: Callable[..., Runner]
) -> None:
    from vllm.config import CUDAGraphMode

    mode = CUDAGraphMode.FULL
    graphs, key_of = runner(cases, manager, vllm_config(mode, specialize=False), mode)
    assert not manager.direct_apart
    holds = {key: captured(cases, manager, count) for key, count in graphs.items()}
    for names, needed in BATCHES.items():
        # vLLM's first runner has no graph for the base model alone, which then runs without one.
        launched = holds.get(key_of(requests(manager, names), 4), (False, False))
        assert launched == ((True, True) if any(needed) else (False, False))


def test_a_runner_that_has_changed_keeps_its_two_graphs(
    cases: Any, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    class Changed(CudagraphDispatcher):
        def _get_lora_cases(self, *, new: bool = True) -> list[int]:
            return super()._get_lora_cases()

    monkeypatch.setattr("vllm.v1.cudagraph_dispatcher.CudagraphDispatcher", Changed)
    mode = CUDAGraphMode.FULL
    graphs, key_of = runner_v1(cases, manager, vllm_config(mode, specialize=True), mode)
    assert not manager.direct_apart
    assert set(graphs.values()) == {0, MAX_LORAS + 1}
    assert captured(cases, manager, 1) == (True, True), "what vLLM means by one adapter"
    assert graphs[key_of(requests(manager, ("joint",)), 4)] == MAX_LORAS + 1


def test_a_runner_of_another_kind_is_left_alone(cases: Any, manager: Any) -> None:
    compilation = SimpleNamespace(cudagraph_specialize_lora=True)
    runner = SimpleNamespace(compilation_config=compilation)
    assert not cases.capture_direct_apart(runner, manager)
    assert vars(runner) == {"compilation_config": compilation}


def test_a_warm_up_batch_runs_everything_and_leaves_no_mapping_behind(
    cases: Any, manager: Any
) -> None:
    manager.direct_apart = True
    routing = manager.vlora_store.direct.routing
    for count, punica in ((MAX_LORAS + 1, (1, 2, 3, 4)), (1, (0,) * 4), (0, (0,) * 4)):
        captured(cases, manager, count)
        assert manager.in_batch == (True, True)
        assert manager.punica[-1].index_mapping == punica
        assert routing.token_slots[:4].tolist() == [0, 1, 2, 3]
        # The same mapping from a real batch is one of the base model alone, and is set anew.
        manager.set_adapter_mapping(_mapping((0,) * 4, (0,) * 4))
        assert (manager.in_batch, manager.in_graph) == ((False, False), (True, True))
        assert manager.punica[-1].index_mapping == (0,) * 4
        assert routing.token_slots[:4].tolist() == [routing.slots] * 4


def test_one_adapter_at_most_is_measured_as_an_adapter_and_captured_as_a_direct_task(
    cases: Any, manager: Any
) -> None:
    """``--max-loras 1``: vLLM's second runner measures memory with the number of direct tasks' graphs."""
    manager.direct_apart = True
    assert captured(cases, manager, 1, max_loras=1) == (False, True)
    assert manager.punica[-1].index_mapping == (1, 1, 1, 1)
    assert captured(cases, manager, 0, max_loras=1) == (False, False)
    assert manager.punica[-1].index_mapping == (0, 0, 0, 0)


def test_towers_are_no_business_of_ours(cases: Any, manager: Any) -> None:
    from vllm.lora.layers import LoRAMappingType

    manager.in_batch = manager.in_graph = "as before"
    select = cases._maybe_select_dummy_loras(_mixin().maybe_select_dummy_loras)
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    runner._set_active_loras = lambda prompts, tokens, found, kind: manager.set_adapter_mapping(
        _mapping(tokens, prompts, kind)
    )
    tokens = np.ones(2, dtype=np.int32)
    with select(runner, SimpleNamespace(max_loras=2), tokens, LoRAMappingType.TOWER, None, 3):
        assert manager.punica[-1].index_mapping == (1, 2)
    with select(runner, None, tokens):
        assert len(manager.punica) == 1
    assert manager.in_batch == manager.in_graph == "as before"


def test_a_runner_is_adapted_when_its_model_has_layers_with_direct_tasks(
    cases: Any, manager: Any
) -> None:
    loaded: list[Any] = []

    def load(self: Any, model: Any, config: Any, device: Any) -> str:
        loaded.append((model, config, device))
        return "model"

    runner = SimpleNamespace(
        lora_manager=SimpleNamespace(_adapter_manager=manager),
        compilation_config=SimpleNamespace(cudagraph_specialize_lora=True),
        lora_config=SimpleNamespace(max_loras=MAX_LORAS),
        lora_state=SimpleNamespace(),
        lora_capture_cases=[0, MAX_LORAS + 1],
    )
    adapt = cases._load_lora_model(load)
    path, manager.vlora_store.direct = manager.vlora_store.direct, None
    assert adapt(runner, 1, 2, torch.device("cpu")) == "model"
    assert not manager.direct_apart
    manager.vlora_store.direct = path
    module = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    original = module.get_num_active_loras_for_dispatch
    try:
        adapt(runner, 1, 2, torch.device("cpu"))
    finally:
        module.get_num_active_loras_for_dispatch = original
    assert manager.direct_apart
    assert runner.lora_capture_cases == [0, 1, MAX_LORAS + 1]
    assert loaded == [(1, 2, torch.device("cpu"))] * 2
